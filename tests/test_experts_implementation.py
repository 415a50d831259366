"""`experts_implementation="emergence"`: transformers' mixtures through this library's kernels."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

import moe_emergence
from moe_emergence.certificate import FAMILIES, Family, certify_family, get_arithmetic
from moe_emergence.errors import exit_code
from moe_emergence.integrations.transformers import (
    ImplementationDispatcher,
    experts_forward,
    get_implementation,
)
from moe_emergence.models import MoEGPT2Config, MoEGPT2LMHeadModel
from moe_emergence.moe import MoELayer
from moe_emergence.verify import main as verify

CPU, FP64 = torch.device("cpu"), torch.float64
BY_NAME = {family.name: family for family in FAMILIES}
FUSED, BETWEEN = "mixtral", "gpt_oss"
"""Families whose experts are one operator, and whose gate runs between two."""


def certified(name: str, family: str, *dtypes: str) -> list[str]:
    """What failed; at least one row per dtype has to have run."""
    arithmetics = [get_arithmetic(dtype, CPU) for dtype in dtypes]
    rows = certify_family(name, BY_NAME[family], arithmetics, CPU)
    assert {row.dtype for row in rows} == set(dtypes)
    return [f"{row.name} {row.dtype}: {row.note}" for row in rows if row.status != "passed"]


@pytest.mark.parametrize("family", BY_NAME)
def test_every_family_computes_what_its_own_loop_does(family: str) -> None:
    """Experts in fp64, and in bf16 also the whole model: loss, logits and every gradient."""
    assert certified("emergence", family, "fp64", "bf16") == []


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_in_the_other_arithmetics_and_generated_tokens(family: str) -> None:
    assert certified("emergence", family, "fp32", "fp16", "autocast-bf16") == []


# wrong implementations --------------------------------------------------------------------------


def without_limits(self, hidden_states, top_k_index, top_k_weights):
    changed = copy.copy(self)
    changed.limit = 100.0
    return experts_forward(changed, hidden_states, top_k_index, top_k_weights)


def swapped_halves(self, hidden_states, top_k_index, top_k_weights):
    changed = copy.copy(self)
    changed.is_concatenated = True
    changed._apply_gate = lambda pre: type(self)._apply_gate(
        self, torch.stack(pre.unflatten(-1, (-1, 2)).unbind(-1)[::-1], dim=-1).flatten(-2)
    )
    return experts_forward(changed, hidden_states, top_k_index, top_k_weights)


def no_router_gradient(self, hidden_states, top_k_index, top_k_weights):
    return experts_forward(self, hidden_states, top_k_index, top_k_weights.detach())


def loses_the_last_token(self, hidden_states, top_k_index, top_k_weights):
    y = experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return torch.cat([y[:-1], torch.zeros_like(y[-1:])])


def a_hundredth_off(self, hidden_states, top_k_index, top_k_weights):
    return 1.01 * experts_forward(self, hidden_states, top_k_index, top_k_weights)


def wrong_for_some_single_tokens(self, hidden_states, top_k_index, top_k_weights):
    """As a path for decoding may be, of which a pass over whole sequences sees nothing."""
    y = experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return -y if len(y) <= 2 and y.detach().sum() > 0 else y


WRONG = (
    swapped_halves,
    no_router_gradient,
    loses_the_last_token,
    a_hundredth_off,
)


@pytest.fixture
def registered():
    """Registers functions under their names for one test."""
    names = []

    def add(function):
        ExpertsInterface.register(function.__name__, function)
        names.append(function.__name__)
        return function.__name__

    yield add
    for name in names:
        ExpertsInterface._global_mapping.pop(name)


def test_limits_left_out_are_found(registered) -> None:
    """They are within reach of the experts alone."""
    problems = certified(registered(without_limits), "gpt_oss", "fp32", "bf16")
    assert len(problems) == 2
    assert all(problem.startswith("gpt_oss experts") for problem in problems)


def test_tokens_generated_otherwise_are_found(registered) -> None:
    problems = certified(registered(wrong_for_some_single_tokens), "gpt_oss", "fp32")
    assert problems == ["gpt_oss model fp32: AssertionError: other tokens are generated"]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda function: function.__name__)
def test_a_wrong_implementation_is_found(wrong, registered) -> None:
    problems = certified(registered(wrong), "gpt_oss", "fp32")
    assert len(problems) == 2, problems


def test_a_refusal_is_no_failure(registered) -> None:
    def refuses(self, hidden_states, top_k_index, top_k_weights):
        raise ValueError("--implementation refuses: of this")

    rows = certify_family(
        registered(refuses), BY_NAME["mixtral"], [get_arithmetic("fp32", CPU)], CPU
    )
    assert {row.status for row in rows} == {"refused"}


# expert parallelism -----------------------------------------------------------------------------


def random_experts(family: str, seed: int = 0):
    return BY_NAME[family].experts(FP64, CPU, seed)


@given(st.sampled_from([FUSED, BETWEEN, "nemotron_h"]), st.integers(0, 999), st.integers(0, 12))
@settings(max_examples=25)
def test_experts_that_are_elsewhere_add_nothing(family, seed, tokens) -> None:
    """An id of E has weight 0, as transformers gives it; its gradient is 0 and nothing is NaN."""
    experts = random_experts(family)
    count, rng = experts.num_experts, torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, count + 2, generator=rng).argsort(dim=1)[:, :3].clamp(max=count)
    absent = chosen == count
    weights = torch.rand(tokens, 3, generator=rng, dtype=FP64).masked_fill(absent, 0)
    x, dy = (torch.randn(tokens, 32, generator=rng, dtype=FP64) for _ in range(2))
    results = []
    for parallel in (True, False):
        experts._is_expert_parallel = parallel
        # an expert that is here with weight 0 adds nothing either, but has a gradient
        ids = chosen if parallel else chosen.clamp(max=count - 1)
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = experts_forward(experts, leaves[0], ids, leaves[1])
        given_ = [*leaves, *experts.parameters()]
        results.append([y.detach(), *torch.autograd.grad(y, given_, dy)])
    found, expected = results
    expected[2] = expected[2].masked_fill(absent, 0)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# layouts, refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [FUSED, BETWEEN])
def test_gradients_lie_as_the_weights_do(family) -> None:
    """No optimizer has to copy one."""
    experts = random_experts(family)
    x = torch.randn(9, 32, dtype=FP64)
    chosen = torch.arange(9).unsqueeze(1) % experts.num_experts
    experts_forward(experts, x, chosen, torch.ones(9, 1, dtype=FP64)).sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def test_a_gate_of_the_module_itself_is_respected() -> None:
    experts = random_experts(FUSED)
    experts._apply_gate = lambda pre: pre.chunk(2, dim=-1)[0]
    x, chosen = torch.randn(9, 32, dtype=FP64), torch.zeros(9, 1, dtype=torch.int64)
    found = experts_forward(experts, x, chosen, torch.ones(9, 1, dtype=FP64))
    gate = experts.gate_up_proj[0].chunk(2)[0]
    torch.testing.assert_close(found, x @ gate.T @ experts.down_proj[0].T)


def test_quantized_weights_are_refused_by_name() -> None:
    experts = random_experts(FUSED)
    experts.gate_up_proj = torch.nn.Parameter(
        experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(ValueError, match="gate_up_proj of MixtralExperts is torch"):
        experts_forward(experts, torch.randn(1, 32), torch.zeros(1, 1).long(), torch.ones(1, 1))


@pytest.mark.slow
def test_a_compiled_model_is_the_same() -> None:
    model = BY_NAME[FUSED].model(torch.float32, CPU, 0)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    model.set_experts_implementation("emergence")
    found = torch.compile(model, backend="aot_eager")(input_ids=ids, labels=ids, use_cache=False)
    torch.testing.assert_close(found.loss, expected)


# names ------------------------------------------------------------------------------------------


def test_registering_is_one_call_and_may_be_repeated() -> None:
    moe_emergence.register()
    moe_emergence.register()
    assert ALL_EXPERTS_FUNCTIONS["emergence"] is experts_forward


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--implementation magic: transformers knows .*emergence"):
        ImplementationDispatcher("magic")
    with pytest.raises(ValueError, match=r"--implementation no\.such:magic: no\.such: No module"):
        get_implementation("no.such:magic")


def test_an_implementation_of_another_module(tmp_path: Path, monkeypatch, registered) -> None:
    (tmp_path / "their_kernels.py").write_text(
        "from transformers.integrations.moe import ExpertsInterface\n"
        "from moe_emergence.integrations.transformers import experts_forward\n"
        "ExpertsInterface.register('theirs', experts_forward)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert get_implementation("their_kernels:theirs") == ("theirs", experts_forward)
    finally:
        ExpertsInterface._global_mapping.pop("theirs", None)
        sys.modules.pop("their_kernels", None)


@pytest.mark.slow
def test_the_command_certifies_an_implementation(capsys) -> None:
    dtypes = ("--dtype", "autocast-bf16")
    flags = ["--implementation", "emergence", *dtypes, "--family", "mixtral", "gpt_oss"]
    assert exit_code(verify, [*flags, "--cases", "0"]) == 0
    printed = capsys.readouterr().out
    assert "mixtral experts" in printed
    assert "gpt_oss experts" in printed
    assert "verdict: certified: emergence on cpu" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--implementation", "magic"], "--implementation magic: transformers knows"),
        (["--family", "mixtral"], "--family mixtral: give"),
        (["--implementation", "emergence", "--family", "gpt5"], "--family gpt5: choose"),
        (["--implementation", "emergence", "--dispatch", "fused"], "--dispatch fused: certify"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], message: str, capsys) -> None:
    assert exit_code(verify, flags) == 2
    assert message in capsys.readouterr().err


# this library's own models ----------------------------------------------------------------------


@pytest.fixture
def model() -> MoEGPT2LMHeadModel:
    config = MoEGPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32, bos_token_id=0,
        eos_token_id=0, moe_layers=[0, 1], num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return MoEGPT2LMHeadModel(config).eval()


def taken(model: MoEGPT2LMHeadModel) -> set[str]:
    found = (layer.experts.dispatcher for layer in model.moe_layers().values())
    return {getattr(d, "name", type(d).__name__) for d in found}


def test_our_models_take_any_registered_implementation(model, tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids, labels=ids).loss
    assert taken(model) == {"AutoDispatcher"}
    for name in ("emergence", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        assert taken(model) == {name}
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
    model.set_experts_implementation("eager")
    assert taken(model) == {"AutoDispatcher"}
    with pytest.raises(ValueError, match="nonsense"):
        model.set_experts_implementation("nonsense")
    model.save_pretrained(tmp_path)
    loaded = MoEGPT2LMHeadModel.from_pretrained(tmp_path, experts_implementation="grouped_mm")
    assert taken(loaded) == {"grouped_mm"}
    loaded.set_dispatch("fused")
    assert taken(loaded) == {"FusedDispatcher"}
    assert loaded.get_experts_implementation() == {"": "eager"}
    assert taken(MoEGPT2LMHeadModel.from_pretrained(tmp_path)) == {"AutoDispatcher"}


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_our_layer_through_an_implementation_has_the_router_gradient(activation, top_k) -> None:
    layer = MoELayer(16, 24, 4, top_k, activation=activation)
    x, dy = (torch.randn(20, 16, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    results = []
    for name in ("eager", "emergence", "grouped_mm", "batched_mm"):
        if name != "eager":
            layer.experts.dispatcher = ImplementationDispatcher(name)
        y, _ = layer(x)
        results.append([y.detach(), *torch.autograd.grad(y, list(layer.parameters()), dy)])
    for found in results[1:]:
        for ours, theirs in zip(found, results[0], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_families_are_told_apart() -> None:
    assert len(BY_NAME) == len(FAMILIES) >= 8
    assert all(isinstance(family, Family) and family.about for family in FAMILIES)
