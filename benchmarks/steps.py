"""A model in training, whose steps are the trainer's own but for the predecessor's.

Letters: A micro-batches, B sequences in one, L tokens in a sequence.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.predecessor import predecessor_model, predecessor_optimizer, predecessor_step
from benchmarks.setups import Setup
from moe_emergence.config import OptimConfig
from moe_emergence.cuda_graph import CudaCapture
from moe_emergence.models import MoEGPT2LMHeadModel, upcycle
from moe_emergence.models.loading import LanguageModel
from moe_emergence.moe import RouterNoise
from moe_emergence.training.graph import GraphedUpdate
from moe_emergence.training.memory import keep_freed_memory
from moe_emergence.training.objective import NextTokenLoss
from moe_emergence.training.operators import use_fast_operators
from moe_emergence.training.schedules import Rates, build_optimizer
from moe_emergence.training.update import Update

OPTIM = OptimConfig()
MICRO, GRAPH = "-micro", "-graph"
"""Endings of those that count balance by micro-batch, and of those that replay the whole step."""
Change = Literal["kept memory", "fast operators", "head loss"]
"""What the trainer does for speed that can be left out."""


@dataclass(frozen=True)
class First:
    """Of a model before any step: loss and gradient norm, and how many parameters it has."""

    loss: float
    norm: float
    parameters: int


class Batch(NamedTuple):
    """A step's tokens (A, B, L) and domains (A, B, D), as the loader's `StepBatch`."""

    input_ids: Tensor
    domains: Tensor


@dataclass(frozen=True)
class OneProcess:
    """What the step asks of accelerate's `Accelerator`, which a GPU machine may lack."""

    device: torch.device
    num_processes: int = 1
    process_index: int = 0
    scaler: None = None

    def backward(self, loss: Tensor) -> None:
        """Of this process."""
        loss.backward()

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
        domains_ABD = torch.eye(3, dtype=torch.float64)[domain_ids_AB]
        self.batch = Batch(input_ids_ABL.to(self.device), domains_ABD.to(self.device))
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
                self.batch.domains.argmax(dim=2),
                coefficients,
            )
            return
        self._dispatch(name)
        noise = RouterNoise(OPTIM.noise_std, 0, 0) if self.kind == "mixture" else None
        if name not in self.updates:
            self.updates[name] = self._update(name)
        batch: Any = self.batch
        self.updates[name](batch, noise, Rates.at(0, OPTIM))

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
