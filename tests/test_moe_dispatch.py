"""Every dispatcher computes what the sequential one defines: outputs, gradients, and nothing else.

Letters: T tokens, H model width, F expert width, E experts, K experts per token.
"""

import copy
import importlib.machinery
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    FACTOR,
    FP64,
    assert_as_accurate,
    assert_close,
    choose,
    laid_out,
    poisoned_empty,
    randn,
    saved_bytes,
    seeded,
)
from torch.utils.checkpoint import checkpoint

from moe_emergence.moe import (
    Experts,
    MoELayer,
    RouterDecision,
    RouterNoise,
    auxiliary_losses,
    get_dispatcher,
)

ACTIVATIONS = ("gelu_tanh", "swiglu")


def make_experts(
    num_experts: int, hidden: int, width: int, activation: str, seed: int = 0
) -> Experts:
    """fp64 experts whose biases are not zero and whose pre-activations are of order one."""
    experts = Experts(num_experts, hidden, width, activation).double()
    with torch.no_grad():
        for i, parameter in enumerate(experts.parameters()):
            fan_in = parameter.shape[1] if parameter.ndim == 3 else 1
            parameter.copy_(randn(*parameter.shape, seed=seed + i) / fan_in**0.5)
    return experts


def make_decision(
    chosen_TK: torch.Tensor, num_experts: int, dtype: torch.dtype, seed: int = 0
) -> RouterDecision:
    """A decision with weights that are a leaf, so that their gradient can be looked at."""
    tokens, top_k = chosen_TK.shape
    probs = torch.full((tokens, num_experts), 1 / num_experts, dtype=dtype)
    weights = (0.1 + torch.rand(tokens, top_k, generator=seeded(seed), dtype=FP64)).to(dtype)
    return RouterDecision(probs.log(), probs, probs, chosen_TK, weights.requires_grad_())


def run(
    name: str,
    x_TH: torch.Tensor,
    decision: RouterDecision,
    experts: Experts,
    dy_TH: torch.Tensor,
) -> dict[str, torch.Tensor | None]:
    """Output and the gradient of every input that wants one."""
    leaves = {"x": x_TH, "weights": decision.topk_weights, **dict(experts.named_parameters())}
    for leaf in leaves.values():
        leaf.grad = None
    y_TH = get_dispatcher(name)(x_TH, decision.topk_experts, decision.topk_weights, experts)
    if y_TH.requires_grad:
        y_TH.backward(dy_TH.to(y_TH.dtype))
    return {"y": y_TH.detach(), **{k: v.grad for k, v in leaves.items()}}


# the definition itself --------------------------------------------------------------------------


def loop_over_tokens(x_TH, decision, experts) -> torch.Tensor:
    """One token and one expert at a time, with the activations written out."""
    rows = []
    for t in range(len(x_TH)):
        row = torch.zeros_like(x_TH[t])
        for k in range(decision.topk_experts.shape[1]):
            e = int(decision.topk_experts[t, k])
            pre = x_TH[t] @ experts.w1[e]
            pre = pre if experts.w1_bias is None else pre + experts.w1_bias[e]
            if experts.activation == "swiglu":
                gate, up = pre[: len(pre) // 2], pre[len(pre) // 2 :]
                act = gate * torch.sigmoid(gate) * up
            else:
                inner = (2 / torch.pi) ** 0.5 * (pre + 0.044715 * pre**3)
                act = 0.5 * pre * (1 + torch.tanh(inner))
            out = act @ experts.w2[e]
            out = out if experts.w2_bias is None else out + experts.w2_bias[e]
            row = row + decision.topk_weights[t, k] * out
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sequential_is_a_loop_over_tokens(activation, top_k) -> None:
    experts = make_experts(4, 5, 6, activation)
    x_TH = randn(9, 5, seed=1).requires_grad_()
    decision = make_decision(choose(9, 4, top_k, "random", 2), 4, FP64)
    dy_TH = randn(9, 5, seed=3)
    ours = run("sequential", x_TH, decision, experts, dy_TH)
    leaves = [x_TH, decision.topk_weights, *experts.parameters()]
    y_TH = loop_over_tokens(x_TH, decision, experts)
    names = ["x", "weights", *dict(experts.named_parameters())]
    theirs = dict(zip(names, torch.autograd.grad(y_TH, leaves, dy_TH), strict=True))
    assert_close(ours, {"y": y_TH.detach(), **theirs})


def separated_layer(activation: str, top_k: int, dispatch: str) -> tuple[MoELayer, torch.Tensor]:
    """A layer and an input whose router logits are far enough apart that no probe flips them."""
    for seed in range(1000):
        layer = MoELayer(4, 3, 4, top_k, activation=activation, dispatch=dispatch).double()
        with torch.no_grad():
            for i, parameter in enumerate(layer.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=seed * 10 + i))
        x_TH = randn(5, 4, seed=seed + 5000)
        logits = layer.router(x_TH).router_logits.sort(dim=1, descending=True).values
        if (logits[:, top_k - 1] - logits[:, top_k]).min() > 0.05:
            return layer, x_TH
    raise AssertionError("no such layer")


@pytest.mark.parametrize("dispatch", ["sequential", "fused"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_layer_with_renormalised_weights(activation, dispatch) -> None:
    layer, x_TH = separated_layer(activation, 2, dispatch)
    names, values = zip(*layer.named_parameters(), strict=True)

    def forward(x, *parameters):
        y, decision = torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (x,)
        )
        balance, z = auxiliary_losses([decision])
        return y, balance, z

    assert torch.autograd.gradcheck(forward, (x_TH.requires_grad_(), *values))


@pytest.mark.parametrize("dispatch", ["sequential", "fused"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_experts_and_the_straight_through_router_at_top_1(
    activation, dispatch
) -> None:
    """Forward the weight is constant, so finite differences see the experts alone; the router's
    gradient is that of `p * expert(x)` at the point where the output is scaled by p."""
    layer, x_TH = separated_layer(activation, 1, dispatch)
    x_TH.requires_grad_()
    chosen = layer.router(x_TH).topk_experts

    def experts_only(x, *parameters):
        experts = copy.deepcopy(layer.experts)
        named = dict(zip(dict(experts.named_parameters()), parameters, strict=True))
        for name, value in named.items():
            delattr(experts, name)
            setattr(experts, name, value)
        decision = make_decision(chosen, 4, FP64)
        ones = torch.ones_like(decision.topk_weights)
        decision = RouterDecision(*[decision.router_logits] * 3, chosen, ones)
        return get_dispatcher(dispatch)(x, decision.topk_experts, decision.topk_weights, experts)

    assert torch.autograd.gradcheck(experts_only, (x_TH, *layer.experts.parameters()))
    # the whole layer: d/dW [p_chosen * expert(x)] with expert(x) held constant, plus the experts'
    dy_TH = randn(5, 4, seed=9)
    y_TH, decision = layer(x_TH)
    (ours,) = torch.autograd.grad(y_TH, layer.router.weight, dy_TH)
    out_TH = loop_over_tokens(x_TH, decision, layer.experts).detach()
    probs = (x_TH.detach() @ layer.router.weight.T).softmax(-1)
    scaled = probs.gather(1, chosen) * out_TH
    (theirs,) = torch.autograd.grad(scaled, layer.router.weight, dy_TH)
    torch.testing.assert_close(y_TH, out_TH, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# fused against sequential -----------------------------------------------------------------------


@st.composite
def cases(draw):
    experts = draw(st.integers(1, 9), label="E")
    top_k = draw(st.integers(1, experts), label="K")
    return {
        "tokens": draw(st.integers(0, 40), label="T"),
        "hidden": draw(st.integers(1, 11), label="H"),
        "width": draw(st.integers(1, 11), label="F"),
        "experts": experts,
        "top_k": top_k,
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "kind": draw(st.sampled_from(["random", "same", "few"])),
        "seed": draw(st.integers(0, 10_000)),
        "x_layout": draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"])),
        "dy_layout": draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"])),
        "wanted": draw(st.sampled_from([*WANTED])),
    }


WANTED = {
    "everything": ("x", "weights", "w1", "w1_bias", "w2", "w2_bias"),
    "only x": ("x",),
    "only the router's weights": ("weights",),
    "only w1": ("w1",),
    "only b1": ("w1_bias",),
    "only w2": ("w2",),
    "only b2": ("w2_bias",),
    "frozen experts": ("x", "weights"),
    "experts alone": ("w1", "w1_bias", "w2", "w2_bias"),
    "nothing": (),
}


@given(cases())
@settings(max_examples=250)
def test_fused_equals_sequential_in_output_and_every_gradient(case) -> None:
    experts = make_experts(
        case["experts"], case["hidden"], case["width"], case["activation"], case["seed"]
    )
    shape = (case["tokens"], case["hidden"])
    x_TH = laid_out(randn(*shape, seed=case["seed"] + 20), case["x_layout"])
    dy_TH = laid_out(randn(*shape, seed=case["seed"] + 21), case["dy_layout"])
    chosen = choose(case["tokens"], case["experts"], case["top_k"], case["kind"], case["seed"])
    decision = make_decision(chosen, case["experts"], FP64, case["seed"])
    wanted = WANTED[case["wanted"]]
    x_TH = x_TH.detach().requires_grad_("x" in wanted)
    decision.topk_weights.requires_grad_("weights" in wanted)
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(name in wanted)
    expected = run("sequential", x_TH, decision, experts, dy_TH)
    with poisoned_empty():
        found = run("fused", x_TH, decision, experts, dy_TH)
    assert_close(found, expected)


class _Loss:
    """The three ways a gradient reaches the router."""

    @staticmethod
    def task(y, decision, dy):
        return (y * dy).sum()

    @staticmethod
    def balance(y, decision, dy):
        return auxiliary_losses([decision])[0]

    @staticmethod
    def z(y, decision, dy):
        return auxiliary_losses([decision])[1]

    @staticmethod
    def all_of_them(y, decision, dy):
        balance, z = auxiliary_losses([decision])
        return (y * dy).sum() + 0.3 * balance + 0.2 * z


@pytest.mark.parametrize("loss", ["task", "balance", "z", "all_of_them"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("top_k", "noise"),
    [
        (1, None),
        (1, RouterNoise(0.5, 1, 2)),
        (2, None),
        (2, RouterNoise(0.5, 1, 2)),
        (5, None),
    ],
    ids=["top-1", "top-1-noisy", "top-2", "top-2-noisy", "all-experts"],
)
def test_the_layer_has_one_gradient_whatever_the_dispatcher(loss, activation, top_k, noise) -> None:
    x = randn(3, 7, 6, seed=1)
    dy = randn(3, 7, 6, seed=2)
    layer = MoELayer(6, 8, 5, top_k, activation=activation, dispatch="sequential").double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=10 + i))
    results = {}
    for name in ("sequential", "fused", "auto"):
        layer.dispatch = name
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y, decision = layer(leaf, noise)
        assert y.shape == x.shape
        getattr(_Loss, loss)(y, decision, dy).backward()
        results[name] = {
            "y": y.detach(),
            "x": leaf.grad,
            **{k: v.grad for k, v in layer.named_parameters()},
        }
    if loss == "balance" and top_k == 5:  # every expert takes 1/E of the assignments: a constant
        for result in results.values():
            assert result.pop("router.weight").abs().max() < 1e-15
            assert result.pop("x").abs().max() < 1e-15
    else:
        assert results["sequential"]["router.weight"].abs().max() > 1e-4
    assert_close(results["fused"], results["sequential"])
    assert_close(results["auto"], results["sequential"])


# low precision, relative to the sequential path -------------------------------------------------

SHAPES = [
    pytest.param(96, 32, 64, 8, 1, "random", id="top-1"),
    pytest.param(96, 32, 64, 8, 2, "random", id="top-2"),
    pytest.param(96, 32, 64, 8, 2, "few", id="empty-experts"),
    pytest.param(130, 24, 40, 4, 1, "same", id="one-expert-takes-all"),
    pytest.param(33, 16, 24, 3, 3, "random", id="every-expert"),
    pytest.param(1, 32, 64, 8, 2, "random", id="one-token"),
    pytest.param(200, 64, 16, 16, 4, "random", id="more-experts-than-tokens-per-expert"),
]


def three_ways(name, dtype, shape, activation, autocast=False, seed=0):
    """(name, sequential, fp64) results on the same numbers, rounded to `dtype` first."""
    tokens, hidden, width, num_experts, top_k, kind = shape
    stored = torch.float32 if autocast else dtype
    exact = make_experts(num_experts, hidden, width, activation, 100 * seed).to(stored)
    chosen = choose(tokens, num_experts, top_k, kind, 100 * seed + 7)
    results = []
    # routing weights are fp32 in low precision too, as the router makes them
    weights = (0.1 + torch.rand(tokens, top_k, generator=seeded(100 * seed + 8))).float()
    for path, precision in ((name, stored), ("sequential", stored), ("sequential", FP64)):
        experts = copy.deepcopy(exact).to(precision)
        x_TH = randn(tokens, hidden, seed=100 * seed + 10).to(stored).to(precision)
        x_TH.requires_grad_()
        dy_TH = randn(tokens, hidden, seed=100 * seed + 11).to(dtype)
        wide = torch.promote_types(precision, torch.float32)
        probs = torch.full((tokens, num_experts), 1 / num_experts, dtype=wide)
        leaf = weights.to(wide).clone().requires_grad_()
        decision = RouterDecision(probs, probs, probs, chosen, leaf)
        with torch.autocast("cpu", dtype, enabled=autocast and precision != FP64):
            y_TH = get_dispatcher(path)(x_TH, decision.topk_experts, decision.topk_weights, experts)
        assert y_TH.dtype == (dtype if precision != FP64 else FP64)
        y_TH.backward(dy_TH.to(y_TH.dtype))
        leaves = {"x": x_TH, "weights": leaf, **dict(experts.named_parameters())}
        results.append({"y": y_TH.detach(), **{k: v.grad for k, v in leaves.items()}})
    return results


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FACTOR, ids=str)
@pytest.mark.parametrize("name", ["fused", "grouped"])
@pytest.mark.parametrize(("tokens", "hidden", "width", "experts", "top_k", "kind"), SHAPES)
def test_pure_low_precision_is_as_accurate_as_sequential(
    name, dtype, tokens, hidden, width, experts, top_k, kind, activation
) -> None:
    shape = (tokens, hidden, width, experts, top_k, kind)
    draws = [three_ways(name, dtype, shape, activation, seed=s) for s in range(4)]
    assert_as_accurate(draws, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["fused", "grouped"])
@pytest.mark.parametrize(("tokens", "hidden", "width", "experts", "top_k", "kind"), SHAPES)
def test_bf16_autocast_is_as_accurate_as_sequential(
    name, tokens, hidden, width, experts, top_k, kind, activation
) -> None:
    shape = (tokens, hidden, width, experts, top_k, kind)
    draws = [three_ways(name, torch.bfloat16, shape, activation, True, s) for s in range(4)]
    assert_as_accurate(draws, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["fused", "grouped"])
def test_bias_gradients_of_thousands_of_tokens_are_summed_in_fp32(name, dtype) -> None:
    """In bf16 a sum of ones stops at 256."""
    experts = make_experts(2, 16, 16, "gelu_tanh").to(dtype)
    decision = make_decision(torch.ones(4096, 1, dtype=torch.long), 2, torch.float32)
    decision = RouterDecision(
        *[decision.router_probs] * 3, decision.topk_experts, torch.ones(4096, 1)
    )
    x_TH = randn(4096, 16).to(dtype)
    found = run(name, x_TH, decision, experts, torch.ones(4096, 16, dtype=dtype))
    assert found["w2_bias"].tolist() == [[0.0] * 16, [4096.0] * 16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sequential", "fused", "grouped"])
def test_the_weighted_sum_of_a_token_is_rounded_once(name, dtype) -> None:
    """Weights and sums stay in fp32: with experts that return their bias, the output is the
    correctly rounded weighted sum of the biases."""
    experts = make_experts(8, 16, 16, "gelu_tanh").to(dtype)
    with torch.no_grad():
        experts.w2.zero_()
        experts.w2_bias.copy_(1 + torch.rand(8, 16, generator=seeded(1)))
    chosen = choose(64, 8, 8, "random", 2)
    weights = torch.rand(64, 8, generator=seeded(3)).softmax(dim=1)
    decision = RouterDecision(*[torch.full((64, 8), 1 / 8)] * 3, chosen, weights)
    y_TH = get_dispatcher(name)(
        randn(64, 16).to(dtype), decision.topk_experts, decision.topk_weights, experts
    )
    exact = (weights.double().unsqueeze(-1) * experts.w2_bias.detach().double()[chosen]).sum(dim=1)
    # half an ulp, and eight fp32 roundings on the way
    bound = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    assert ((y_TH.double() - exact).abs() <= bound * exact).all()


@pytest.mark.parametrize("name", ["fused", "grouped"])
def test_fp64_under_autocast_is_treated_as_sequential_treats_it(name) -> None:
    """Autocast leaves fp64 alone."""
    layer = MoELayer(8, 16, 3, 1, dispatch="sequential").double()
    x_TH = randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = layer(x_TH)
        assert expected.dtype == FP64
        layer.dispatch = name
        if name == "grouped":
            with pytest.raises(ValueError, match="float64"):
                layer(x_TH)
        else:
            found, _ = layer(x_TH)
            assert found.dtype == FP64
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "fp64-autocast"])
def test_tokens_and_weights_of_two_dtypes_are_refused(autocast) -> None:
    """Without autocast, or for fp64 tokens, nobody said which to compute in."""
    experts = make_experts(4, 16, 32, "gelu_tanh").float()
    dtype = FP64 if autocast else torch.bfloat16
    decision = make_decision(choose(20, 4, 2, "random", 3), 4, torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(ValueError, match=f"tokens are {dtype}, expert weights torch.float32"),
    ):
        get_dispatcher("fused")(
            randn(20, 16).to(dtype), decision.topk_experts, decision.topk_weights, experts
        )


def test_backward_of_the_fused_experts_inside_autocast_is_the_same() -> None:
    results = []
    for inside in (False, True):
        experts = make_experts(4, 16, 32, "gelu_tanh").float()
        decision = make_decision(choose(20, 4, 2, "random", 3), 4, torch.float32)
        x_TH = randn(20, 16, dtype=torch.float32).requires_grad_()
        dy_TH = randn(20, 16, seed=1, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            y_TH = get_dispatcher("fused")(
                x_TH, decision.topk_experts, decision.topk_weights, experts
            )
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            y_TH.backward(dy_TH)
        results.append(
            [x_TH.grad, decision.topk_weights.grad, *(p.grad for p in experts.parameters())]
        )
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


# edges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequential", "fused", "grouped"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_no_tokens(name, activation, top_k) -> None:
    layer = MoELayer(8, 16, 4, top_k, activation=activation, dispatch=name)
    x = torch.zeros(2, 0, 8, requires_grad=True)
    with poisoned_empty():
        y, decision = layer(x)
        assert y.shape == (2, 0, 8)
        balance, z = auxiliary_losses([decision])
        (y.sum() + balance + z).backward()
    assert x.grad is not None
    for parameter in layer.parameters():
        assert parameter.grad is None or (parameter.grad == 0).all()


@pytest.mark.parametrize("name", ["sequential", "fused", "grouped"])
def test_experts_without_tokens_get_a_zero_gradient_not_none_or_nan(name) -> None:
    """None would hang DistributedDataParallel."""
    experts = make_experts(4, 8, 16, "gelu_tanh").float()
    decision = make_decision(torch.full((6, 1), 2), 4, torch.float32)
    x_TH = randn(6, 8, dtype=torch.float32).requires_grad_()
    with poisoned_empty():
        found = run(name, x_TH, decision, experts, randn(6, 8, seed=1, dtype=torch.float32))
    for key in ("w1", "w1_bias", "w2", "w2_bias"):
        assert (found[key][[0, 1, 3]] == 0).all()
        assert found[key][2].abs().max() > 0


@pytest.mark.parametrize("name", ["sequential", "fused", "grouped"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_repeated_runs_are_bitwise_equal(name, top_k) -> None:
    torch.set_num_threads(2)  # where sums by atomics would show
    results = []
    for _ in range(3):
        experts = make_experts(8, 16, 32, "gelu_tanh").float()
        decision = make_decision(choose(2000, 8, top_k, "random", 3), 8, torch.float32)
        x_TH = randn(2000, 16, dtype=torch.float32).requires_grad_()
        dy_TH = randn(2000, 16, seed=1, dtype=torch.float32)
        results.append(run(name, x_TH, decision, experts, dy_TH))
    for again in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("name", ["sequential", "fused", "grouped"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
def test_recomputation_changes_no_gradient(name, top_k, autocast) -> None:
    """Noise is a function of the token, so a recomputed forward routes the same way."""
    torch.manual_seed(0)
    layer = MoELayer(16, 32, 4, top_k, dispatch=name)
    noise = RouterNoise(std=1.0, seed=1, step=2, first_token=30, layer=3)
    dy = randn(2, 20, 16, seed=1, dtype=torch.float32)
    results = []
    for recompute in (False, True):
        layer.zero_grad()
        x = randn(2, 20, 16, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if recompute:
                y, decision = checkpoint(layer, x, noise, use_reentrant=False)
            else:
                y, decision = layer(x, noise)
        balance, z = auxiliary_losses([decision])
        ((y.float() * dy).sum() + balance + z).backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16-autocast"])
def test_fused_keeps_at_most_half_of_what_sequential_keeps(autocast, top_k, activation) -> None:
    """Under autocast no copies of the weights either."""
    layer = MoELayer(192, 768, 8, top_k, activation=activation)
    x = randn(512, 192, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused, sequential = (saved_bytes(name, layer, x) for name in ("fused", "sequential"))
    assert fused <= sequential / 2, f"{fused / 1e6:.2f} MB against {sequential / 1e6:.2f} MB"


# auto -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP64], ids=str)
def test_auto_takes_the_fused_path_where_nothing_was_measured(dtype) -> None:
    auto = get_dispatcher("auto")
    auto.paths = {name: lambda *_, taken=name: taken for name in auto.paths}
    decision = make_decision(torch.zeros(4096, 2, dtype=torch.long), 4, dtype)
    experts = make_experts(4, 8, 16, "gelu_tanh").to(dtype)
    assert (
        auto(randn(4096, 8, dtype=dtype), decision.topk_experts, decision.topk_weights, experts)
        == "fused"
    )


# names ------------------------------------------------------------------------------------------


def test_an_unknown_dispatcher_is_refused_with_the_choices() -> None:
    match = "dispatch quick: choose from auto, sequential, grouped, fused, megablocks"
    with pytest.raises(ValueError, match=match):
        get_dispatcher("quick")
    with pytest.raises(ValueError, match=match):
        MoELayer(4, 4, 2, 1, dispatch="quick")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_state_dict_serves_every_dispatcher(activation, fake_megablocks) -> None:
    layers = {
        name: MoELayer(8, 16, 3, 2, activation=activation, dispatch=name)
        for name in ("auto", "sequential", "grouped", "fused", "megablocks")
    }
    state = layers["sequential"].state_dict()
    expected = {"router.weight", "experts.w1", "experts.w2"}
    if activation == "gelu_tanh":
        expected |= {"experts.w1_bias", "experts.w2_bias"}
    assert set(state) == expected
    x = randn(10, 8, dtype=torch.float32)
    y = layers["sequential"](x)[0]
    for layer in layers.values():
        assert list(layer.state_dict()) == list(state)
        layer.load_state_dict(state)
        torch.testing.assert_close(layer(x)[0], y)


@pytest.mark.parametrize(
    ("dtype", "hidden", "width"),
    [
        (torch.float64, 16, 16),
        (torch.float32, 6, 16),
        (torch.float32, 16, 6),
        (torch.bfloat16, 12, 16),
        (torch.bfloat16, 16, 12),
        (torch.float16, 16, 20),
    ],
    ids=["fp64", "fp32-odd-H", "fp32-odd-F", "bf16-odd-H", "bf16-odd-F", "fp16-odd-F"],
)
def test_grouped_refuses_what_grouped_mm_does_not_take(dtype, hidden, width) -> None:
    layer = MoELayer(hidden, width, 2, 1, dispatch="grouped").to(dtype)
    with pytest.raises(ValueError, match=r"dispatch grouped: .*use dispatch fused"):
        layer(torch.zeros(3, hidden, dtype=dtype))
    layer.dispatch = "fused"
    assert layer(torch.zeros(3, hidden, dtype=dtype))[0].shape == (3, hidden)


def test_grouped_judges_the_widths_in_the_autocast_dtype() -> None:
    layer = MoELayer(12, 16, 2, 1, dispatch="grouped")
    layer(torch.zeros(3, 12))  # 48 bytes in fp32
    with (
        torch.autocast("cpu", torch.bfloat16),  # 24 bytes in bf16
        pytest.raises(ValueError, match="bfloat16"),
    ):
        layer(torch.zeros(3, 12))


# MegaBlocks -------------------------------------------------------------------------------------


def _gather(x, indices, bin_ids, bins, top_k):
    """MegaBlocks' `gather` without padding: sorted copies of the tokens."""
    assert indices.dtype == bin_ids.dtype == bins.dtype == torch.int32
    assert bins.is_contiguous()
    _check_bins(indices, bin_ids, bins)
    return x[indices.long() // top_k]


def _scatter(x, indices, bin_ids, weights, bins, top_k):
    """MegaBlocks' `scatter`: weighted rows back in token order, summed over top_k."""
    _check_bins(indices, bin_ids, bins)
    assert weights.ndim == 1
    rows = x * weights[indices.long()].unsqueeze(1)
    out = torch.zeros(len(indices), x.shape[1], dtype=rows.dtype)
    return out.index_put((indices.long(),), rows).view(-1, top_k, x.shape[1]).sum(dim=1)


def _check_bins(indices, bin_ids, bins) -> None:
    assert torch.equal(indices.sort().values, torch.arange(len(indices), dtype=torch.int32))
    assert (bin_ids.diff() >= 0).all()
    counts = torch.bincount(bin_ids, minlength=len(bins))
    assert torch.equal(bins, counts.cumsum(0).int())


@pytest.fixture
def fake_megablocks(monkeypatch) -> None:
    package, ops = types.ModuleType("megablocks"), types.ModuleType("megablocks.ops")
    ops.gather, ops.scatter, package.ops = _gather, _scatter, ops
    monkeypatch.setitem(sys.modules, "megablocks", package)
    monkeypatch.setitem(sys.modules, "megablocks.ops", ops)


@pytest.mark.usefixtures("fake_megablocks")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "hidden", "width", "experts", "top_k", "kind"), SHAPES)
def test_megablocks_is_as_accurate_as_sequential(
    dtype, tokens, hidden, width, experts, top_k, kind, activation
) -> None:
    shape = (tokens, hidden, width, experts, top_k, kind)
    draws = [three_ways("megablocks", dtype, shape, activation, seed=s) for s in range(4)]
    assert_as_accurate(draws, dtype)


class _Gmm(types.ModuleType):
    """`grouped_gemm.ops`: a product per group, bf16 only, sizes on the host."""

    def __init__(self) -> None:
        super().__init__("grouped_gemm.ops")
        self.calls = 0

    def gmm(self, a, b, batch_sizes, trans_b=False):
        self.calls += 1
        assert a.dtype == b.dtype == torch.bfloat16
        assert batch_sizes.dtype == torch.int64
        assert batch_sizes.device.type == "cpu"
        assert int(batch_sizes.sum()) == len(a)
        parts = a.split(batch_sizes.tolist())
        return torch.cat([part @ w for part, w in zip(parts, b.unbind(), strict=True)])


@pytest.mark.usefixtures("fake_megablocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_megablocks_uses_its_own_grouped_product_where_it_is_installed(dtype, monkeypatch) -> None:
    package, ops = types.ModuleType("grouped_gemm"), _Gmm()
    package.__spec__ = importlib.machinery.ModuleSpec("grouped_gemm", None)
    package.ops = ops
    monkeypatch.setitem(sys.modules, "grouped_gemm", package)
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", ops)
    shape = (96, 32, 64, 8, 2, "few")
    draws = [three_ways("megablocks", dtype, shape, "gelu_tanh", seed=s) for s in range(4)]
    assert_as_accurate(draws, dtype)
    assert ops.calls == (8 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("missing", ["megablocks", "megablocks.ops"])
def test_without_megablocks_the_error_says_what_to_install(missing, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # makes its import an ImportError
    message = r"dispatch megablocks: .*pip install .*megablocks.*dispatch fused"
    with pytest.raises(ValueError, match=message):
        get_dispatcher("megablocks")
    with pytest.raises(ValueError, match=message):
        MoELayer(4, 4, 2, 1, dispatch="megablocks")


@pytest.mark.slow
def test_layers_import_nothing_optional_unasked() -> None:
    """Of models the test in test_models_hf.py says it."""
    program = """
import sys, torch
import emergence_kernels
from moe_emergence.moe import MoELayer
for name in ("auto", "sequential", "fused", "grouped"):
    MoELayer(8, 8, 2, 1, dispatch=name)(torch.zeros(3, 8))
print(*{"megablocks", "wandb", "triton", "transformers"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == ""
