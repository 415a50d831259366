"""The device that `--device` names, and that of a model."""

import torch

from moe_emergence.settings import check


def find_device(name: str) -> torch.device:
    """The device called `name`; auto is cuda where there is one.

    Raises:
        ValueError: for a device that is not there.
    """
    found = torch.cuda.is_available()
    wants_cuda = name.startswith("cuda")
    check(found or not wants_cuda, "--device", name, "this PyTorch sees no CUDA device; give cpu")
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    return torch.device(name)


def input_device(model: torch.nn.Module) -> torch.device:
    """Where a model reads its tokens; weights that are offloaded are nowhere."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
