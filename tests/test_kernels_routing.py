"""Routing and sorting: the operators and their Triton kernels against their twins."""

import itertools
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from conftest import KERNEL_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

import emergence_kernels
from emergence_kernels import Routing, reference

FP32, FP64 = torch.float32, torch.float64
# results of `route` that have a gradient, by their place
GRADIENTS = {"probs": 0, "noisy": 1, "weights": 3, "logsumexp": 4, "prob_sums": 6, "z_sum": 7}


def poisoned() -> "mock._patch":
    """Memory that nobody wrote is NaN (or the smallest integer) instead of perhaps zero."""
    new_empty = torch.Tensor.new_empty

    def poison(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).min)

    return mock.patch.object(torch.Tensor, "new_empty", poison)


def randn(*shape: int, seed: int, dtype: torch.dtype = FP64, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FP64).to(device, dtype)


def kernel_forward(logits, top_k, noise=None, bias=None) -> tuple[torch.Tensor, ...]:
    pytest.importorskip("triton")
    from emergence_kernels.gpu.routing import route_forward

    with poisoned():
        return route_forward(logits, top_k, noise, bias)


def assert_close(found: torch.Tensor, exact: torch.Tensor, what: str, ulps: float = 32) -> None:
    """fp32 against fp64, relative to the largest value: sums of a few hundred fp32 terms."""
    assert found.shape == exact.shape, what
    assert found.isfinite().all(), what
    if exact.numel():
        bound = ulps * torch.finfo(found.dtype).eps * max(float(exact.abs().max()), 1.0)
        assert float((found.double().cpu() - exact).abs().max()) <= bound, what


@st.composite
def cases(draw):
    experts = draw(st.sampled_from([1, 2, 3, 5, 8, 17]), label="E")
    return {
        "tokens": draw(st.sampled_from([0, 1, 2, 7, 33, 150]), label="T"),
        "experts": experts,
        "top_k": draw(st.integers(1, min(experts, 4)), label="K"),
        "noise": draw(st.booleans(), label="noise"),
        "bias": draw(st.booleans(), label="bias"),
        "seed": draw(st.integers(0, 1000)),
        "scale": draw(st.sampled_from([0.0, 1.0, 30.0]), label="scale"),
        "wanted": draw(
            st.sets(st.sampled_from([*GRADIENTS]), min_size=1).filter(lambda s: s), label="wanted"
        ),
    }


def inputs_of(case, dtype: torch.dtype = FP64, device: str = "cpu"):
    shape = (case["tokens"], case["experts"])
    logits = (case["scale"] * randn(*shape, seed=case["seed"])).to(device, dtype)
    noise = randn(*shape, seed=case["seed"] + 1).to(device, dtype) if case["noise"] else None
    bias = None
    if case["bias"]:
        bias = (0.1 * randn(case["experts"], seed=case["seed"] + 2)).to(device, dtype)
    return logits, case["top_k"], noise, bias


def gradient_of(
    route: Callable[..., Routing], case, upstream: dict[str, torch.Tensor]
) -> tuple[Routing, torch.Tensor]:
    logits, *others = inputs_of(case)
    logits.requires_grad_()
    routing = route(logits, *others)
    wanted = [(routing[GRADIENTS[name]], upstream[name]) for name in sorted(case["wanted"])]
    outputs, grads = zip(*wanted, strict=True)
    (gradient,) = torch.autograd.grad(outputs, [logits], grads)
    return routing, gradient


def upstream_of(case) -> dict[str, torch.Tensor]:
    tokens, experts, top_k = case["tokens"], case["experts"], case["top_k"]
    shapes = {
        "probs": (tokens, experts),
        "noisy": (tokens, experts),
        "weights": (tokens, top_k),
        "logsumexp": (tokens,),
        "prob_sums": (experts,),
        "z_sum": (),
    }
    return {
        name: randn(*shape, seed=case["seed"] + 10 + i)
        for i, (name, shape) in enumerate(shapes.items())
    }


@given(cases())
@settings(max_examples=120)
def test_route_equals_its_twin_in_value_and_gradient(case) -> None:
    upstream = upstream_of(case)
    theirs, expected = gradient_of(reference.route, case, upstream)
    with poisoned():
        ours, found = gradient_of(emergence_kernels.route, case, upstream)
    for name, a, b in zip(Routing._fields, ours, theirs, strict=True):
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=name)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@given(cases())
@settings(max_examples=30)
def test_the_kernels_equal_the_twin(case) -> None:
    """Forward against fp64 on the experts that the kernel chose (a near-tie may fall either way,
    and then both must be best), backward on the forward's own results."""
    logits, top_k, noise, bias = inputs_of(case, FP32, KERNEL_DEVICE)
    found = Routing(*kernel_forward(logits, top_k, noise, bias))
    wide = [None if t is None else t.double().cpu() for t in (logits, noise, bias)]
    exact = reference.route(wide[0], top_k, wide[1], wide[2])
    experts_TK = found.experts_TK.cpu()
    scores = exact.noisy_probs_TE if bias is None else exact.noisy_probs_TE + wide[2]
    if len(logits):
        assert int(experts_TK.min()) >= 0
        assert int(experts_TK.max()) < case["experts"]
        chosen, best = scores.gather(1, experts_TK), scores.topk(top_k, dim=1).values
        assert (chosen - best).abs().max() <= 1e-5
        assert all(len(set(row)) == top_k for row in experts_TK.tolist())
    assert_close(found.probs_TE, exact.probs_TE, "probs")
    assert_close(found.logsumexp_T, exact.logsumexp_T, "logsumexp")
    assert_close(found.prob_sums_E, exact.prob_sums_E, "prob_sums", 64)
    assert_close(found.z_sum, exact.z_sum, "z_sum", 64)
    counts = torch.bincount(experts_TK.reshape(-1), minlength=case["experts"])
    assert torch.equal(found.expert_counts_E.cpu(), counts)
    if noise is not None:
        assert_close(found.noisy_probs_TE, exact.noisy_probs_TE, "noisy")
    picked = exact.noisy_probs_TE.gather(1, experts_TK)
    weights = torch.ones_like(picked) if top_k == 1 else picked / picked.sum(1, keepdim=True)
    assert_close(found.weights_TK, weights, "weights", 256)

    from emergence_kernels.gpu.routing_gradient import route_backward
    from emergence_kernels.routing import _gradient

    saved = (
        found.probs_TE, found.noisy_probs_TE, experts_TK.to(KERNEL_DEVICE), found.weights_TK,
        found.logsumexp_T,
    )  # fmt: skip
    upstream = [upstream_of(case)[n] if n in case["wanted"] else None for n in GRADIENTS]
    if noise is None:
        upstream[1] = None
    narrow = [None if g is None else g.to(KERNEL_DEVICE, FP32) for g in upstream]
    with poisoned():
        dlogits = route_backward(*saved, *narrow)
    on_cpu = [t.double().cpu() if t.is_floating_point() else t.cpu() for t in saved]
    expected = _gradient(*on_cpu, *(None if g is None else g.double().cpu() for g in narrow))
    # the gradient of a renormalised weight divides by the chosen probabilities
    assert_close(dlogits, expected, "dlogits", 512)


@pytest.mark.parametrize("kernel", [False, True], ids=["operator", "kernel"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_ties_go_to_the_lower_index_and_no_token_sees_another(kernel, top_k) -> None:
    logits = torch.tensor([[0.0, 0, 0, 0, 0], [1, 2, 2, 2, 0], [-5, 3, 3, -5, -5]])
    route = kernel_forward if kernel else emergence_kernels.route
    device = KERNEL_DEVICE if kernel else "cpu"
    together = Routing(*route(logits.to(device), top_k))
    assert together.experts_TK.tolist() == [
        row[:top_k] for row in ([0, 1, 2], [1, 2, 3], [1, 2, 0])
    ]
    for t in range(3):
        alone = Routing(*route(logits[t : t + 1].to(device), top_k))
        for a, b in itertools.islice(zip(together, alone, strict=True), 0, 5):
            if b.numel():
                assert torch.equal(a[t : t + 1], b)


@pytest.mark.parametrize("kernel", [False, True], ids=["operator", "kernel"])
def test_extreme_logits_stay_finite(kernel) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [float("-inf"), 0.0, 0.0]])
    route = kernel_forward if kernel else emergence_kernels.route
    found = Routing(*route(logits.to(KERNEL_DEVICE if kernel else "cpu"), 1))
    assert found.experts_TK.flatten().tolist() == [0, 0, 1]
    expected = torch.tensor([[1.0, 0, 0], [1 / 3] * 3, [0, 0.5, 0.5]])
    torch.testing.assert_close(found.probs_TE.cpu(), expected)
    torch.testing.assert_close(found.logsumexp_T.cpu(), logits.logsumexp(1))


def test_a_logit_that_is_no_number_never_names_an_expert_that_does_not_exist() -> None:
    logits = torch.tensor([[float("nan"), 0.0, 1.0]], device=KERNEL_DEVICE)
    for top_k in (1, 3):
        experts = Routing(*kernel_forward(logits, top_k)).experts_TK
        assert ((experts >= 0) & (experts < 3)).all()


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_logits_in_any_layout(layout) -> None:
    plain = randn(9, 5, seed=1, dtype=FP32, device=KERNEL_DEVICE)
    wide = torch.full((9, 10), float("nan"), device=KERNEL_DEVICE)
    wide[:, ::2] = plain
    laid_out = plain.t().contiguous().t() if layout == "transposed" else wide[:, ::2]
    for a, b in zip(kernel_forward(laid_out, 2), kernel_forward(plain, 2), strict=True):
        assert torch.equal(a, b)


def test_gradcheck_of_everything_that_has_a_gradient() -> None:
    logits = randn(5, 4, seed=3).requires_grad_()
    noise = randn(5, 4, seed=4)

    def differentiable(logits):
        routing = emergence_kernels.route(logits, 2, noise)
        return tuple(routing[place] for place in GRADIENTS.values())

    assert torch.autograd.gradcheck(differentiable, logits)


# sorting ----------------------------------------------------------------------------------------


def kernel_sort(chosen: torch.Tensor, experts: int) -> list[torch.Tensor]:
    pytest.importorskip("triton")
    from emergence_kernels.gpu.permutation import sort_by_expert

    with poisoned():
        found = sort_by_expert(chosen.to(KERNEL_DEVICE).contiguous(), experts)
    return [tensor.cpu() for tensor in found]


@given(
    st.integers(1, 9),
    st.data(),
    st.sampled_from([0, 1, 2, 40, 200]),
    st.sampled_from(["random", "same", "few"]),
    st.integers(0, 1000),
)
@settings(max_examples=30)
def test_the_counting_sort_equals_the_twin(experts, data, tokens, kind, seed) -> None:
    top_k = data.draw(st.integers(1, experts))
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    if kind == "same":
        scores[:] = scores[:1].clone() if tokens else scores
    elif kind == "few":
        scores[:, top_k + 1 :] = -1
    chosen = scores.argsort(dim=1, descending=True)[:, :top_k]
    for found, expected in zip(
        kernel_sort(chosen, experts), reference.sort_by_expert(chosen, experts), strict=True
    ):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("tokens", "experts"),
    [(3000, 3), (1024, 8), (1025, 8), (700, 130), (600, 1024)],
    ids=[
        "stable-over-blocks",
        "one-block",
        "one-more-than-a-block",
        "many-experts",
        "most-experts",
    ],
)
def test_the_counting_sort_over_several_blocks(tokens, experts) -> None:
    chosen = torch.randint(experts, (tokens, 1), generator=torch.Generator().manual_seed(0))
    flat = chosen.flatten()
    perm, inv_perm, token_idx, offsets = kernel_sort(chosen, experts)
    assert torch.equal(perm, torch.sort(flat, stable=True).indices)
    assert torch.equal(inv_perm[perm], torch.arange(tokens))
    assert torch.equal(token_idx, perm)
    assert torch.equal(offsets.diff().long(), torch.bincount(flat, minlength=experts))
    assert offsets[0] == 0
