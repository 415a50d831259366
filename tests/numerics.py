"""What the numerical tests share: inputs, memory that shows who did not write it, comparisons.

Letters: T tokens, H model width, E experts, K experts per token.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from unittest import mock

import torch
from torch import Tensor

from benchmarks import footprint
from moe_emergence.moe import MoELayer

FP64 = torch.float64
# how far a low-precision path may be from fp64, as a multiple of the plain path's own error
FACTOR = {torch.float32: 2.0, torch.bfloat16: 1.5, torch.float16: 1.5}
GUARD = 64
"""Elements on either side of guarded memory; whole cache lines, so that alignment stays."""

Results = Mapping[str, Tensor | None]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=FP64).to(dtype)


def choose(tokens: int, experts: int, top_k: int, kind: str, seed: int) -> Tensor:
    """(T, K) distinct experts: anything, all tokens alike, or K+1 of the experts only."""
    pool = min(top_k + 1, experts) if kind == "few" else experts
    rows = 1 if kind == "same" else tokens
    chosen = torch.rand(rows, pool, generator=seeded(seed)).argsort(dim=1)[:, :top_k]
    if kind == "few":
        chosen = experts - 1 - chosen  # the first experts are the empty ones
    return chosen.expand(tokens, top_k)


def _poison(dtype: torch.dtype) -> float | int:
    """NaN; of integers the smallest, an index that nothing survives."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min


def _is_poison(tensor: Tensor) -> bool:
    value = _poison(tensor.dtype)
    return bool((tensor.isnan() if value != value else tensor == value).all())


@contextlib.contextmanager
def poisoned_empty(guarded: bool = False) -> Iterator[None]:
    """Memory that nobody wrote is NaN (or the smallest integer) instead of perhaps zero.

    With `guarded` it has poison on either side too, and that must still be there at the end: a
    write outside a result is an error even where its neighbour would overwrite it.
    """
    empty, buffers = torch.empty, list[Tensor]()

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args, **kwargs) -> Tensor:
            result = make(*args, **kwargs)
            if not guarded:
                return result.fill_(_poison(result.dtype))
            size = result.numel() + 2 * GUARD
            buffer = empty(size, dtype=result.dtype, device=result.device)
            buffers.append(buffer.fill_(_poison(buffer.dtype)))
            return buffer.as_strided(result.size(), result.stride(), GUARD)

        return made

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield
    for buffer in buffers:
        assert _is_poison(buffer[:GUARD]), "written before the beginning of a result"
        assert _is_poison(buffer[-GUARD:]), "written behind the end of a result"


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides and NaN between them (expanded: one row for all)."""
    rows, columns = tensor.shape
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "strided":
        wide = tensor.new_full((rows, 2 * columns), float("nan"))
        wide[:, ::2] = tensor
        return wide[:, ::2]
    if layout == "rows apart":
        wide = tensor.new_full((rows + 2, columns + 5), float("nan"))
        wide[1:-1, 2:-3] = tensor
        return wide[1:-1, 2:-3]
    if layout == "expanded" and rows:
        return tensor[:1].expand_as(tensor)
    return tensor


def assert_close(
    found: Results, expected: Results, tolerance: float = 1e-10, least: float = 0.0
) -> None:
    """Largest difference relative to the largest value, both finite.

    `least` is the size of what is summed: results that cancel are not held to less.
    """
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = found[name]
        assert (ours is None) == (theirs is None), name
        if ours is None or theirs is None:
            continue
        assert ours.shape == theirs.shape, name
        assert ours.dtype == theirs.dtype, name
        assert ours.isfinite().all(), name
        if theirs.numel():
            difference = (ours - theirs).abs().max()
            largest = max(float(theirs.abs().max()), least)
            assert difference <= tolerance * largest, f"{name}: off by {difference:.3g}"


def assert_as_accurate(
    draws: Sequence[tuple[Results, Results, Results]], dtype: torch.dtype
) -> None:
    """Errors against fp64, over several draws of the numbers: at most FACTOR times the plain
    path's in the mean square, and twice that in the worst element (the ratio of two maxima
    fluctuates: it reached 2.4 for paths whose mean squares agreed to 5%). No path is asked for
    less than the error of a correctly rounded result, half an ulp."""
    half_ulp = torch.finfo(dtype).eps / 2
    for name in draws[0][2]:
        squares, worst = [0.0, 0.0], [0.0, 0.0]
        for ours, plain, exact in draws:
            reference = exact[name]
            if reference is None or not reference.numel():
                assert ours[name] is None or ours[name].shape == reference.shape, name
                continue
            scale = max(float(reference.abs().max()), torch.finfo(FP64).tiny)
            for path, found in enumerate((ours[name], plain[name])):
                assert found.dtype == plain[name].dtype, name
                assert found.isfinite().all(), name
                error = (found.double() - reference) / scale
                squares[path] += float(error.square().mean())
                worst[path] = max(worst[path], float(error.abs().max()))
        rms = [(square / len(draws)) ** 0.5 for square in squares]
        # a rounding error is uniform: its mean square is a third of the largest
        bound = FACTOR[dtype] * max(rms[1], half_ulp / 3**0.5)
        assert rms[0] <= bound, f"{name}: rms {rms[0]:.3g} against {rms[1]:.3g}"
        bound = 2 * FACTOR[dtype] * max(worst[1], half_ulp)
        assert worst[0] <= bound, f"{name}: worst {worst[0]:.3g} against {worst[1]:.3g}"


def saved_bytes(name: str, layer: MoELayer, x: Tensor) -> int:
    """Bytes of the distinct storages kept for backward, without the parameters'."""
    layer.dispatch = name
    return footprint.saved_bytes(lambda: layer(x)[0], layer.parameters())
