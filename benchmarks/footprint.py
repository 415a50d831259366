"""Memory: what a pass keeps for its backward, and peaks of the device and of the process."""

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Tensor], owned: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that `run` keeps for backward, apart from those of `owned`."""
    ours = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            # the tensor is held, so that no later one can have its address
            kept[storage.data_ptr()] = (storage.nbytes(), tensor.detach())
        # an output that its own node saves would keep the graph alive for good
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(size for size, _ in kept.values())


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak CUDA memory of one pass above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_peak() -> int | None:
    """Peak resident memory of this process in bytes; None where Python does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
