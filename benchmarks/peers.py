"""Other people's mixtures of experts, run on this library's weights.

transformers: every experts function that is registered there, this library's among them, and its
own loop. For GELU experts with biases the loop is that of a `GptOssExperts` whose gate is replaced
by the tanh GELU (its weights are (E, in, out) with biases); for SwiGLU that of a `MixtralExperts`,
which holds (E, out, in).
Liger's fused layer is SwiGLU without biases, bf16 and fp16 on a GPU; MegaBlocks takes part through
this library's dispatcher of that name.
"""

import importlib
import importlib.util
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.contestants import (
    FLOOR,
    OURS,
    Contestant,
    Entry,
    dispatcher_entry,
    not_applicable,
    not_installed,
)
from benchmarks.gate import Results
from benchmarks.workloads import Problem
from emergence_kernels.activations import activate
from moe_emergence.integrations.transformers import ImplementationDispatcher

BATCHED_LIMIT = {"cpu": 0.3e9, "cuda": 12e9}
"""Bytes of weights that `batched_mm` may copy in a forward pass, by device type."""


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    # a package built for another torch or triton fails with more than ImportError
    except Exception as error:
        raise not_installed(error) from error


def _transposed_copy(weight_EIO: Tensor) -> Tensor:
    return weight_EIO.detach().transpose(1, 2).contiguous().requires_grad_()


def _gelu_experts(problem: Problem) -> Contestant:
    experts = problem.experts
    num_experts, hidden, width = experts.w1.shape
    modeling = _import("transformers.models.gpt_oss.modeling_gpt_oss")
    config = SimpleNamespace(
        num_local_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=width,
        swiglu_alpha=1.0,
        swiglu_limit=1.0,
        _experts_implementation="eager",
    )
    with torch.device("meta"):
        module: Any = modeling.GptOssExperts(config)
    module.gate_up_proj, module.gate_up_proj_bias = experts.w1, experts.w1_bias
    module.down_proj, module.down_proj_bias = experts.w2, experts.w2_bias
    module._apply_gate = lambda pre: activate(pre, "gelu_tanh")
    decision = problem.decision
    return Contestant(
        lambda: module(problem.x_TH, decision.topk_experts, decision.topk_weights), problem.leaves
    )


def _swiglu_experts(problem: Problem) -> Contestant:
    experts = problem.experts
    modeling = _import("transformers.models.mixtral.modeling_mixtral")
    config = SimpleNamespace(
        num_local_experts=experts.num_experts,
        hidden_size=experts.w1.shape[1],
        intermediate_size=experts.w2.shape[1],
        hidden_act="silu",
        _experts_implementation="eager",
    )
    with torch.device("meta"):
        module: Any = modeling.MixtralExperts(config)
    module.gate_up_proj = nn.Parameter(_transposed_copy(experts.w1))
    module.down_proj = nn.Parameter(_transposed_copy(experts.w2))
    decision = problem.decision
    leaves = {**problem.leaves, "w1": module.gate_up_proj, "w2": module.down_proj}
    return Contestant(
        lambda: module(problem.x_TH, decision.topk_experts, decision.topk_weights),
        leaves,
        frozenset({"w1", "w2"}),
    )


def _prepare_eager(problem: Problem) -> Contestant:
    is_gelu = problem.experts.activation == "gelu_tanh"
    return _gelu_experts(problem) if is_gelu else _swiglu_experts(problem)


def implementation_entry(name: str) -> Entry:
    """What transformers has registered as `name`, on this library's experts."""

    def prepare(problem: Problem) -> Contestant:
        experts, decision = problem.experts, problem.decision
        chosen_TK, weights_TK = decision.topk_experts, decision.topk_weights
        if name == "batched_mm":
            per_row = experts.w1[0].numel() + experts.w2[0].numel()
            size = chosen_TK.numel() * per_row * experts.w1.element_size()
            if size > BATCHED_LIMIT[problem.x_TH.device.type]:
                raise not_applicable(f"it would copy {size / 1e9:.1f} GB of weights, one per row")
        path = ImplementationDispatcher(name)
        try:
            path(problem.x_TH[:1], chosen_TK[:1], weights_TK[:1], experts)
        except ValueError as refusal:
            raise not_applicable(str(refusal)) from refusal
        return Contestant(
            lambda: path(problem.x_TH, chosen_TK, weights_TK, experts), problem.leaves
        )

    return Entry(f"hf-{name}", prepare, f"registered in transformers as {name}")


def _prepare_liger(problem: Problem) -> Contestant:
    experts = problem.experts
    if importlib.util.find_spec("liger_kernel") is None:
        raise not_installed(ImportError("No module named 'liger_kernel'"))
    if experts.activation != "swiglu":
        raise not_applicable("SwiGLU experts only")
    if not problem.x_TH.is_cuda:
        raise not_applicable("needs a GPU")
    operator: Any = _import("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    w1_EPH, w2_EHF = _transposed_copy(experts.w1), _transposed_copy(experts.w2)
    chosen_TK = problem.decision.topk_experts.int()
    return Contestant(
        lambda: operator.apply(
            problem.x_TH, w1_EPH, w2_EHF, chosen_TK, problem.decision.topk_weights
        ),
        {**problem.leaves, "w1": w1_EPH, "w2": w2_EHF},
        frozenset({"w1", "w2"}),
    )


def _prepare_scattermoe(problem: Problem) -> Contestant:
    if importlib.util.find_spec("scattermoe") is None:
        raise not_installed(ImportError("No module named 'scattermoe'"))
    experts, decision = problem.experts, problem.decision
    if experts.activation != "swiglu":
        raise not_applicable("its MLP with biases differs between releases; SwiGLU only")
    if not problem.x_TH.is_cuda:
        raise not_applicable("needs a GPU")
    top_k = decision.topk_experts.shape[1]
    build: Any = _import("scattermoe.mlp").GLUMLP
    module = build(experts.w1.shape[1], experts.w2.shape[1], experts.num_experts, top_k)
    # its rows are the up projection's, then the gate's
    gate_EHF, up_EHF = experts.w1.detach().chunk(2, dim=2)
    swapped_EHP = torch.cat([up_EHF, gate_EHF], dim=2)
    module.experts.weight = nn.Parameter(_transposed_copy(swapped_EHP))
    module.output_experts.weight = nn.Parameter(_transposed_copy(experts.w2))

    def run() -> Tensor:
        y_TH: Tensor = module(problem.x_TH, decision.topk_weights, decision.topk_experts)
        return y_TH

    leaves = {"w1": module.experts.weight, "w2": module.output_experts.weight}
    return _Swapped(run, {**problem.leaves, **leaves}, frozenset({"w1", "w2"}))


class _Swapped(Contestant):
    """Holds the up projection before the gate."""

    def canonical(self, found: Results) -> Results:
        results = dict(super().canonical(found))
        results["w1"] = torch.cat(results["w1"].chunk(2, dim=2)[::-1], dim=2)
        return results


PEERS = (
    Entry("hf-eager", _prepare_eager, "transformers' loop"),
    *map(implementation_entry, sorted(ALL_EXPERTS_FUNCTIONS)),
    Entry("liger", _prepare_liger, "Liger's fused mixture of experts"),
    dispatcher_entry("megablocks", "MegaBlocks' gather and scatter around torch's grouped_mm"),
    Entry("scattermoe", _prepare_scattermoe, "ScatterMoE"),
)
ENTRIES = (*OURS, FLOOR, *PEERS)
