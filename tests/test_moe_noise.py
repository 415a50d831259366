"""Router noise is a function of (seed, step, layer, token, expert), and it is Gaussian."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_emergence.moe import RouterNoise
from moe_emergence.moe.noise import gaussian_noise

CPU = torch.device("cpu")
BASE = RouterNoise(std=1.0, seed=42, step=7)


def draw(tokens: int, experts: int, **changes: float) -> torch.Tensor:
    return gaussian_noise(dataclasses.replace(BASE, **changes), tokens, experts, CPU)


@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 9),
    first=st.one_of(st.integers(0, 100), st.integers(2**32 - 50, 2**36)),
    seed=st.integers(-(2**31), 2**31),
    step=st.integers(0, 10**6),
    layer=st.integers(0, 47),
    data=st.data(),
)
@settings(max_examples=60)
def test_a_part_of_the_tokens_sees_its_rows_of_the_whole(
    tokens, experts, first, seed, step, layer, data
) -> None:
    a = data.draw(st.integers(0, tokens))
    b = data.draw(st.integers(a, tokens))
    key = {"seed": seed, "step": step, "layer": layer}
    whole = draw(tokens, experts, first_token=first, **key)
    assert whole.shape == (tokens, experts)
    assert whole.dtype == torch.float32
    assert whole.isfinite().all()
    assert torch.equal(draw(b - a, experts, first_token=first + a, **key), whole[a:b])
    assert torch.equal(draw(tokens, experts, first_token=first, **key), whole)


@settings(max_examples=50)
@given(
    runs=st.integers(1, 5),
    run=st.integers(1, 7),
    processes=st.integers(1, 4),
    last=st.integers(0, 6),
    experts=st.integers(1, 5),
)
def test_runs_are_taken_from_their_places(
    runs: int, run: int, processes: int, last: int, experts: int
) -> None:
    """Processes that take turns see, together, the noise of the whole step."""
    whole = draw(runs * processes * run, experts).view(runs, processes, run, experts)
    for process in range(processes):
        kept = runs * run - min(last, run - 1)
        part = draw(kept, experts, first_token=process * run, run=run, stride=processes * run)
        assert torch.equal(part, whole[:, process].flatten(0, 1)[:kept])


def test_it_ignores_and_leaves_the_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw(10, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(draw(10, 4), first)


def test_std_is_a_factor() -> None:
    torch.testing.assert_close(draw(50, 4, std=0.25), 0.25 * draw(50, 4))


@pytest.mark.parametrize(
    "start",
    [0, 2**20, 2**32 // 8 - 12_500, 2**32, 2**40],
    ids=["zero", "million", "across-2^32", "beyond-2^32", "far"],
)
def test_the_deviates_are_standard_normal(start) -> None:
    x = draw(25_000, 8, first_token=start).double().flatten()
    n = x.numel()
    assert n == 200_000
    # standard errors of mean, std, skewness and excess kurtosis of n normal deviates, 5 sigma
    mean, std = x.mean(), x.std()
    z = (x - mean) / std
    assert abs(mean) < 5 / math.sqrt(n)
    assert abs(std - 1) < 5 / math.sqrt(2 * n)
    assert abs((z**3).mean()) < 5 * math.sqrt(6 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(24 / n)
    # Kolmogorov-Smirnov: P(D > 2.2/sqrt(n)) is 1e-4
    ordered = x.sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    rank = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum((cdf - rank).max(), (rank + 1 / n - cdf).max())
    assert distance < 2.2 / math.sqrt(n)
    assert x.abs().max() > 4  # tails are there


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 43},
        {"seed": -42},
        {"step": 8},
        {"layer": 1},
        {"seed": 7, "step": 42},
        {"first_token": 1},
        {"first_token": 20_000},
        {"first_token": 2**29},
        {"first_token": 2**32},
        {"first_token": 2**40},
    ],
    ids=str,
)
def test_other_keys_and_places_give_independent_noise(other) -> None:
    a, b = draw(20_000, 8), draw(20_000, 8, **other)
    correlation = (a.double() * b.double()).mean(dim=0)
    # products of independent normals have variance 1: 5 standard errors, for each expert
    assert correlation.abs().max() < 5 / math.sqrt(20_000)
    # and no deviates shared in the same place
    assert (a == b).float().mean() < 1e-3


def test_experts_and_neighbouring_tokens_are_uncorrelated() -> None:
    x = draw(40_000, 8).double()
    covariance = x.T @ x / len(x)
    assert (covariance - torch.eye(8)).fill_diagonal_(0).abs().max() < 5 / math.sqrt(len(x))
    for lag in (1, 2, 4, 8, 512, 1024):
        assert abs((x[lag:] * x[:-lag]).mean()) < 5 / math.sqrt(x[lag:].numel())
    # the squares too: the radius of the transform must not repeat
    square = (x**2 - 1) / math.sqrt(2)
    covariance = square.T @ square / len(x)
    # the product of two such squares has kurtosis; its standard error is still 1/sqrt(n)
    assert covariance.fill_diagonal_(0).abs().max() < 5 / math.sqrt(len(x))


def test_streams_of_layers_and_steps_are_uncorrelated() -> None:
    rows = torch.stack(
        [draw(4_000, 4, step=s, layer=k).flatten() for s in range(6) for k in range(6)]
    ).double()
    covariance = rows @ rows.T / rows.shape[1]
    assert covariance.fill_diagonal_(0).abs().max() < 5.5 / math.sqrt(rows.shape[1])
