"""The training suite: whole optimizer steps, dense against mixture, by dispatcher.

Every step is the trainer's own, in a process of its own, but for the predecessor's.
Letters: A micro-batches, B sequences in one, L tokens in a sequence.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.layer import error_row, timing_fields
from benchmarks.predecessor import predecessor_model, predecessor_optimizer, predecessor_step
from benchmarks.results import Record, Row
from benchmarks.roofline import measure_rates
from benchmarks.workers import Worker, take_turns
from moe_emergence.config import OptimConfig
from moe_emergence.cuda_graph import CudaCapture
from moe_emergence.models import MoEGPT2LMHeadModel, upcycle
from moe_emergence.models.loading import LanguageModel
from moe_emergence.moe import RouterNoise
from moe_emergence.training.graph import WARM_UP, GraphedUpdate
from moe_emergence.training.memory import keep_freed_memory
from moe_emergence.training.objective import NextTokenLoss
from moe_emergence.training.operators import use_fast_operators
from moe_emergence.training.schedules import build_optimizer
from moe_emergence.training.update import Update

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

    def flops(self, *, is_moe: bool) -> float:
        """Multiplications and additions of a step's matrix products, forward and backward.

        Causal attention counts the half that is not masked.
        """
        attention = self.layers * (4 * self.hidden**2 + self.block * self.hidden)
        dense, moe = self.layers - len(self.moe_layers), len(self.moe_layers)
        mlp = 8 * self.hidden**2 * (dense + moe * (self.top_k if is_moe else 1))
        routers = moe * self.experts * self.hidden if is_moe else 0
        return 6.0 * self.tokens * (attention + mlp + routers + self.vocabulary * self.hidden)


SETUPS = {
    setup.name: setup
    for setup in (
        Setup("demo", 4, 256, 4, (2, 3), 4096, 128, 8, 1),
        Setup("gpt2-small", 12, 768, 12, (8, 9, 10, 11), 50257, 512, 2, 4),
        Setup("gpt2-small-micro-batch", 12, 768, 12, (8, 9, 10, 11), 50257, 512, 2, 1),
        Setup("gpt2-small-top2", 12, 768, 12, (8, 9, 10, 11), 50257, 512, 2, 4, top_k=2),
        Setup("gpt2-small-batch16", 12, 768, 12, (8, 9, 10, 11), 50257, 512, 16, 1),
        Setup("tiny", 2, 16, 2, (1,), 64, 8, 2, 2, experts=4),
    )
}
MIXTURES = ("fused", "fused-micro", "sequential", "grouped", "auto")
"""Dispatchers, the one whose memory is measured first."""
MODELS = ("predecessor", "dense", *MIXTURES)
GRAPHED = ("dense-graph", "fused-graph", "grouped-graph")
"""For a GPU."""
MICRO, GRAPH = "-micro", "-graph"
"""Endings of those that count balance by micro-batch, and of those that replay the whole step."""
Change = Literal["kept memory", "fast operators", "head loss"]
"""What the trainer does for speed that can be left out."""
BYTES_PER_PARAMETER = 16
"""Weight, gradient and two moments of AdamW, in fp32."""


@dataclass(frozen=True)
class First:
    """Of a model before any step: loss and gradient norm, and how many parameters it has."""

    loss: float
    norm: float
    parameters: int


class Batch(NamedTuple):
    """A step's tokens (A, B, L) and domains (A, B), as the loader's `StepBatch`."""

    input_ids: Tensor
    domain_ids: Tensor


@dataclass(frozen=True)
class OneProcess:
    """What the step asks of accelerate's `Accelerator`, which a GPU machine may lack."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0

    def backward(self, loss: Tensor) -> None:
        """Of this process."""
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """As torch does."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def no_sync(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """There is nobody to wait for."""
        return contextlib.nullcontext()


class Autocast(torch.nn.Module):
    """A model whose forward pass is in bf16 where that is enabled."""

    def __init__(self, model: torch.nn.Module, device: torch.device, *, enabled: bool) -> None:
        super().__init__()
        self.model, self.device, self.enabled = model, device, enabled

    def forward(self, *inputs: Any) -> Any:
        """What the model returns."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.enabled):
            return self.model(*inputs)


class Bench:
    """One kind of model in training, with its data; dispatchers share one mixture."""

    def __init__(
        self,
        setup: Setup,
        device: str,
        precision: str,
        kind: Literal["predecessor", "dense", "mixture"],
        without: Sequence[Change] = (),
    ) -> None:
        self.setup, self.precision = setup, "fp32" if kind == "predecessor" else precision
        self.kind = kind
        self.accelerator = OneProcess(torch.device(device))
        self.device = self.accelerator.device
        size = (setup.accumulate, setup.batch, setup.block)
        torch.manual_seed(0)
        input_ids_ABL = torch.randint(setup.vocabulary, size)
        domain_ids_AB = torch.arange(size[0] * size[1]).view(size[:2]) % 3
        self.batch = Batch(input_ids_ABL.to(self.device), domain_ids_AB.to(self.device))
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
        self.model: LanguageModel = GPT2LMHeadModel(config)
        if kind != "dense":
            dense = self.model
            self.model = upcycle(dense, setup.moe_layers, setup.experts, setup.top_k)
            if kind == "predecessor":
                self.model = predecessor_model(self.model, dense)
        torch.nn.Module.to(self.model, self.device)
        self.model.train()
        if kind == "predecessor":
            self.optimizer: Any = predecessor_optimizer(self.model, OPTIM.learning_rate)
            return
        if self.device.type == "cpu" and "kept memory" not in without:
            keep_freed_memory()
        self.optimizer = build_optimizer(self.model, OPTIM)
        self.updates: dict[str, Update | GraphedUpdate] = {}
        if "fast operators" not in without:
            use_fast_operators(self.model, self.device, self.precision)
        loss = PlainLoss(self.model) if "head loss" in without else NextTokenLoss(self.model)
        self.trained = Autocast(loss, self.device, enabled=self.precision == "bf16")

    def look(self, name: str) -> First:
        """First loss and gradient norm over the first micro-batch."""
        self._dispatch(name)
        exact = name == "reference"
        ids = self.batch.input_ids[0]
        if self.kind == "predecessor":
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            model = NextTokenLoss(self.model) if exact else self.trained
            loss = model(ids)[0].mean()
        loss.backward()
        # in fp64: over a stacked weight's 19 million gradients fp32 loses the fourth digit
        norms = [
            torch.linalg.vector_norm(p.grad, dtype=torch.float64)
            for p in self.model.parameters()
            if p.grad is not None
        ]
        norm = torch.stack(norms).norm()
        self.model.zero_grad(set_to_none=True)
        count = sum(p.numel() for p in self.model.parameters())
        return First(float(loss.detach()), float(norm), count)

    def step(self, name: str) -> None:
        """One optimizer step as the trainer takes it, or the predecessor."""
        if self.kind == "predecessor":
            assert isinstance(self.model, GPT2LMHeadModel)
            coefficients = {"balance": OPTIM.lb_coef, "z": OPTIM.z_coef}
            predecessor_step(
                self.model,
                self.optimizer,
                self.batch.input_ids,
                self.batch.domain_ids,
                coefficients,
            )
            return
        self._dispatch(name)
        noise = RouterNoise(OPTIM.noise_std, 0, 0) if self.kind == "mixture" else None
        if name not in self.updates:
            self.updates[name] = self._update(name)
        batch: Any = self.batch
        self.updates[name](batch, noise, OPTIM.learning_rate)

    def _update(self, name: str) -> Update | GraphedUpdate:
        optim = replace(OPTIM, balance_scope="micro" if name.endswith(MICRO) else "global")
        one: Any = self.accelerator
        update = Update(one, self.trained, self.optimizer, optim)
        if name.endswith(GRAPH):
            return GraphedUpdate(update, required=True, capture=CudaCapture(self.device))
        return update

    def _dispatch(self, name: str) -> None:
        if isinstance(self.model, MoEGPT2LMHeadModel):
            dispatch = name.removesuffix(MICRO).removesuffix(GRAPH)
            self.model.set_dispatch("sequential" if name == "reference" else dispatch)


class PlainLoss(torch.nn.Module):
    """`NextTokenLoss` of a dense model with torch's own cross-entropy over its logits."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids_BL: Tensor, router_noise: None = None) -> tuple[Tensor, tuple[()]]:
        """Losses (B, L-1) in nats, and no decisions."""
        logits = self.model(input_ids=input_ids_BL, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(
            logits.flatten(0, 1), input_ids_BL[:, 1:].flatten(), reduction="none"
        )
        return losses.view(len(input_ids_BL), -1), ()


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
    `peak_bytes` is of the whole process (resident on a CPU, allocated on a GPU) after two steps;
    of the dispatchers, which share a process, the first has it.
    """
    group = f"{setup.name}/{precision}"
    parameters = {**vars(setup), "dtype": precision}
    rates = {dtype: measure_rates(device, dtype) for dtype in ("fp32", precision)}
    rows: dict[str, Row] = {}
    works: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        mixture = stack.enter_context(Worker(device, Bench, setup, device, precision, "mixture"))
        expected: First = mixture.ask("look", "reference")
        for name in models:
            worker = mixture
            if name.removesuffix(GRAPH) not in MIXTURES:
                kind = name.removesuffix(GRAPH)
                worker = stack.enter_context(Worker(device, Bench, setup, device, precision, kind))
            row = Row("training", group, "step", name, "", parameters=parameters)
            try:
                first: First = worker.ask("look", name)
                state = {"state_bytes": BYTES_PER_PARAMETER * first.parameters}
                row = replace(row, parameters=parameters | state)
                row = replace(row, **_judge(name, first, expected, precision))
                if row.verdict != "failed":
                    works[name] = worker
            except RuntimeError as error:
                row = error_row(row, error, device)
            rows[name] = row
        # only now: a step changes the weights that the dispatchers share
        seen: set[int] = set()
        for name, worker in works.items():
            for _ in range(WARM_UP + 1 if name.endswith(GRAPH) else 2):
                worker.ask("step", name)
            if id(worker) not in seen:
                seen.add(id(worker))
                rows[name] = replace(rows[name], peak_bytes=worker.ask("peak"))
        samples = take_turns(works, budget_s)
    for name, timed in samples.items():
        flops = setup.flops(is_moe=name.removesuffix(GRAPH) != "dense")
        limit_s = flops / rates["fp32" if name == "predecessor" else precision].flops_per_s
        rows[name] = replace(
            rows[name],
            **timing_fields(timed, samples, REFERENCE),
            tokens_per_s=setup.tokens / timed.median,
            flops=flops,
            roofline_fraction=limit_s / timed.median,
        )
    found = [rows[name] for name in models]
    if on_rows:
        on_rows(found)
    return found


def _judge(name: str, first: First, expected: First, precision: str) -> dict[str, Any]:
    if name.removesuffix(GRAPH) == "dense":
        return {"verdict": "floor", "note": "the model without mixture layers"}
    # the predecessor's arithmetic is fp32 always
    tolerance = LOSS_TOLERANCE["fp32" if name == "predecessor" else precision]
    pairs = (("loss", first.loss, expected.loss), ("gradient norm", first.norm, expected.norm))
    for what, ours, theirs in pairs:
        if not abs(ours - theirs) <= tolerance * abs(theirs):
            note = f"first {what} {ours:.6g}, sequential in fp32 {theirs:.6g}"
            return {"verdict": "failed", "note": note}
    return {"verdict": "passed"}
