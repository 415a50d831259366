"""The training suite: whole optimizer steps, dense against mixture, by dispatcher.

Letters: A micro-batches, B sequences in one, L tokens in a sequence.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.footprint import peak_bytes
from benchmarks.layer import error_row, timing_fields
from benchmarks.predecessor import predecessor_model, predecessor_optimizer, predecessor_step
from benchmarks.results import Record, Row
from benchmarks.stopwatch import Work, interleave
from moe_emergence.config import OptimConfig
from moe_emergence.models import MoEGPT2LMHeadModel, upcycle
from moe_emergence.moe import RouterNoise, auxiliary_losses
from moe_emergence.training.schedules import build_optimizer

REFERENCE = "predecessor"
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative difference of first loss and gradient norm from the sequential model in fp32."""
OPTIM = OptimConfig()


@dataclass(frozen=True)
class Setup:
    """A model and a batch."""

    name: str
    layers: int
    hidden: int
    heads: int
    moe_layers: tuple[int, ...]
    vocabulary: int
    block: int
    batch: int
    accumulate: int
    experts: int = 8
    top_k: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.block * self.batch * self.accumulate


SETUPS = {
    setup.name: setup
    for setup in (
        Setup("demo", 4, 256, 4, (2, 3), 4096, 128, 4, 1),
        Setup("gpt2-small", 12, 768, 12, (8, 9, 10, 11), 50257, 512, 2, 4),
        Setup("gpt2-small-batch16", 12, 768, 12, (8, 9, 10, 11), 50257, 512, 16, 1),
        Setup("tiny", 2, 16, 2, (1,), 64, 8, 2, 2, experts=4),
    )
}
MODELS = ("predecessor", "dense", "sequential", "grouped", "fused", "auto")


@dataclass(frozen=True)
class Contender:
    """A model in training: one step of it, and its first loss and gradient norm."""

    step: Work
    first_loss: float
    first_norm: float


class Bench:
    """Models and data of one setup. All dispatchers share one mixture and its optimizer."""

    def __init__(self, setup: Setup, device: str, precision: str) -> None:
        self.setup, self.device, self.precision = setup, device, precision
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=setup.vocabulary,
            n_positions=setup.block,
            n_layer=setup.layers,
            n_embd=setup.hidden,
            n_head=setup.heads,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        self.dense = GPT2LMHeadModel(config)
        torch.nn.Module.to(self.dense, device)
        self.dense.train()
        self.mixture = upcycle(self.dense, setup.moe_layers, setup.experts, setup.top_k)
        size = (setup.accumulate, setup.batch, setup.block)
        self.input_ids_ABL = torch.randint(setup.vocabulary, size).to(device)
        self.domain_ids_AB = (torch.arange(size[0] * size[1]).view(size[:2]) % 3).to(device)
        self.optimizers: dict[int, torch.optim.Optimizer] = {}

    def contender(self, name: str) -> Contender:
        """Build `name` of `MODELS`, and look at its first loss and gradient before any step."""
        if name == "predecessor":
            model = predecessor_model(self.mixture, self.dense)
            optimizer = predecessor_optimizer(model, OPTIM.learning_rate)
            coefficients = {"balance": OPTIM.lb_coef, "z": OPTIM.z_coef}
            loss, norm = self._first(model, "fp32")
            return Contender(
                lambda: predecessor_step(
                    model, optimizer, self.input_ids_ABL, self.domain_ids_AB, coefficients
                ),
                loss,
                norm,
            )
        if name == "dense":
            loss, norm = self._first(self.dense)
            return Contender(lambda: self._step(self.dense), loss, norm)
        self.mixture.set_dispatch(name)
        loss, norm = self._first(self.mixture)

        def step() -> None:
            self.mixture.set_dispatch(name)
            self._step(self.mixture)

        return Contender(step, loss, norm)

    def reference(self) -> tuple[float, float]:
        """First loss and gradient norm of the sequential mixture in fp32."""
        self.mixture.set_dispatch("sequential")
        return self._first(self.mixture, "fp32")

    def _first(self, model: torch.nn.Module, precision: str | None = None) -> tuple[float, float]:
        with self._autocast(precision):
            logits = model(input_ids=self.input_ids_ABL[0], use_cache=False).logits
        loss = row_losses(logits, self.input_ids_ABL[0]).mean()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        model.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    def _step(self, model: torch.nn.Module) -> Tensor:
        """One optimizer step as the trainer takes it; the summed loss of every domain."""
        optimizer = self.optimizers.get(id(model))
        if optimizer is None:
            optimizer = self.optimizers[id(model)] = build_optimizer(model, OPTIM)
        noise = {}
        if isinstance(model, MoEGPT2LMHeadModel):
            noise = {"router_noise": RouterNoise(OPTIM.noise_std, 0, 0)}
        rows = []
        for input_ids_BL in self.input_ids_ABL:
            with self._autocast():
                outputs = model(input_ids=input_ids_BL, use_cache=False, **noise)
            rows.append(row_losses(outputs.logits, input_ids_BL))
            loss = rows[-1].mean()
            decisions = outputs.get("router_decisions")
            if decisions:
                balance, z = auxiliary_losses(decisions)
                loss = loss + OPTIM.lb_coef * balance + OPTIM.z_coef * z
            (loss / len(self.input_ids_ABL)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        domains = functional.one_hot(self.domain_ids_AB.flatten(), 3)
        return torch.cat(rows).detach() @ domains.to(rows[0].dtype)

    def _autocast(self, precision: str | None = None) -> contextlib.AbstractContextManager[object]:
        enabled = (precision or self.precision) == "bf16"
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled)


def row_losses(logits_BLV: Tensor, input_ids_BL: Tensor) -> Tensor:
    """(B,) mean next-token cross-entropy of every sequence, in fp32."""
    losses = functional.cross_entropy(
        logits_BLV[:, :-1].float().flatten(0, 1), input_ids_BL[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(input_ids_BL), -1).mean(dim=1)


def measure_training(
    setup: Setup,
    device: str,
    precision: str,
    *,
    budget_s: float,
    models: Sequence[str] = MODELS,
    on_rows: Record | None = None,
) -> list[Row]:
    """One row per model. The predecessor runs in fp32 whatever `precision`, as it did.

    The gate: first loss and gradient norm agree with those of the sequential mixture in fp32.
    """
    bench = Bench(setup, device, precision)
    group = f"{setup.name}/{precision}"
    blank = Row("training", group, "step", "", "", parameters={**vars(setup), "dtype": precision})
    expected = bench.reference()
    works: dict[str, Work] = {}
    rows: dict[str, Row] = {}
    for name in models:
        row = replace(blank, contestant=name)
        try:
            contender = bench.contender(name)
            row = replace(row, **_judge(name, contender, expected, precision))
            if row.verdict != "failed":
                works[name] = contender.step
        except Exception as error:  # noqa: BLE001 - one model that cannot run is a row
            row = error_row(row, error, device)
        rows[name] = row
    # only now: a step changes the weights that the dispatchers share
    for name, step in works.items():
        step()
        if device == "cuda":
            rows[name] = replace(rows[name], peak_bytes=peak_bytes(step))
    samples = interleave(works, device, budget_s)
    for name, timed in samples.items():
        rows[name] = replace(
            rows[name],
            **timing_fields(timed, samples, REFERENCE),
            tokens_per_s=setup.tokens / timed.median,
        )
    found = [rows[name] for name in models]
    if on_rows:
        on_rows(found)
    return found


def _judge(
    name: str, contender: Contender, expected: tuple[float, float], precision: str
) -> dict[str, Any]:
    if name == "dense":
        return {"verdict": "floor", "note": "the model without mixture layers"}
    # the predecessor's arithmetic is fp32 always
    tolerance = LOSS_TOLERANCE["fp32" if name == "predecessor" else precision]
    found = (contender.first_loss, contender.first_norm)
    for what, ours, theirs in zip(("loss", "gradient norm"), found, expected, strict=True):
        if not abs(ours - theirs) <= tolerance * abs(theirs):
            note = f"first {what} {ours:.6g}, sequential in fp32 {theirs:.6g}"
            return {"verdict": "failed", "note": note}
    return {"verdict": "passed"}
