"""What layers that are not trained compute, kept on disk: a text costs their forward pass once.

Letters: B sequences, L tokens each, H model width.
"""

import json
import logging
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_emergence.disk import DAY, clear_unfinished, make_folder, whole_file
from moe_emergence.errors import RunError
from moe_emergence.models.families import FAMILIES
from moe_emergence.models.lower_layers import lower_modules, lower_states
from moe_emergence.models.mode import evaluating

logger = logging.getLogger(__name__)

_NOT_OF_THE_LAYERS = frozenset(
    {"architectures", "dtype", "model_type", "transformers_version", "_name_or_path", "use_cache"}
)


class FrozenStates:
    """The hidden states that layer `first` reads, from a file for every sequence.

    Each sequence is computed by itself, so that its states do not depend on its batch. Files lie in
    a folder named by all that they depend on: runs with the same base, dense or mixture, share it,
    and processes may fill it at the same time.

    Args:
        model: the layers below `first` are dense, and not trained.
        first: index of a layer, at least 1.
        cache_dir: the folders are made in it.
        precision: of the forward pass, as accelerate has it ("no", "bf16").
    """

    def __init__(self, model: PreTrainedModel, first: int, cache_dir: Path, precision: str) -> None:
        self.model, self.first = model, first
        name = f"layer-{first}-{_identity(model, first, precision)}"
        self.folder = cache_dir / "hidden-states" / name
        make_folder(self.folder)
        clear_unfinished(self.folder, idle_seconds=DAY)
        logger.info("hidden states that layer %d reads are kept in %s", first, self.folder)

    def __call__(self, input_ids_BL: Tensor) -> Tensor:
        """(B, L, H) in fp32, on the device of the tokens.

        Raises:
            RunError: for a file that cannot be written, or is damaged.
        """
        rows = [self._of_row(row_L) for row_L in input_ids_BL]
        return torch.stack(rows).to(input_ids_BL.device)

    def _of_row(self, row_L: Tensor) -> Tensor:
        tokens = row_L.to("cpu", torch.int64).numpy().tobytes()
        path = self.folder / f"{blake2b(tokens, digest_size=16).hexdigest()}.npy"
        if path.exists():
            return _read(path)
        with evaluating(self.model):
            states_LH = lower_states(self.model, self.first, row_L[None])[0].float().cpu()
        with whole_file(path) as new, new.open("wb") as file:
            np.save(file, states_LH.numpy())
        return states_LH


def _read(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise RunError(f"{path}: damaged ({error}); delete it, it will be made again") from error


def _identity(model: PreTrainedModel, first: int, precision: str) -> str:
    """Of the weights and settings of everything below layer `first`."""
    family = next(f for f in FAMILIES.values() if isinstance(model, (f.dense, f.mixture)))
    keys = family.dense.config_class().to_dict().keys() - _NOT_OF_THE_LAYERS
    settings = {k: v for k, v in model.config.to_dict().items() if k in keys}
    digest = blake2b(json.dumps([family.name, settings, precision], sort_keys=True).encode())
    for module in lower_modules(model, first):
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
