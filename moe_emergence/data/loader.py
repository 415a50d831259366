"""Batches of one optimizer step each, the same rows however the step is split.

Letters: P processes, A micro-batches per step and process, B rows per micro-batch, G = A*B*P rows
per step, R rows of all D domains, L tokens per row.
"""

import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader


class StepBatch(NamedTuple):
    """One process's rows of one optimizer step; micro-batch m is `input_ids[m]`."""

    input_ids: torch.Tensor  # (A, B, L) int64
    domains: torch.Tensor  # (A, B, D) float64, 1 for the domain of the row


class StepDataset(Dataset[StepBatch]):
    """Item n is what this process trains on in step n; it depends on n alone.

    Rows come from an endless stream of permutations of all rows, one permutation per pass, each
    drawn from the seed and the number of the pass. Micro-batch m of process p holds the rows
    [(m*P + p)*B, (m*P + p + 1)*B) of the G rows of the step.
    """

    def __init__(
        self,
        train_blocks: Mapping[str, torch.Tensor],
        *,
        seed: int,
        batch_size: int,
        grad_accum_steps: int,
        process_index: int,
        num_processes: int,
    ) -> None:
        self.rows = torch.cat(list(train_blocks.values()))  # (R, L)
        sizes = torch.tensor([len(rows) for rows in train_blocks.values()])
        each = torch.eye(len(sizes), dtype=torch.float64)
        self.row_domains = each.repeat_interleave(sizes, dim=0)  # (R, D)
        if not len(self.rows):
            raise ValueError("no train blocks to load: raise --size-mb or lower --block-size")
        micro = np.arange(grad_accum_steps)[:, None] * num_processes + process_index
        self.offsets_AB = micro * batch_size + np.arange(batch_size)
        self.rows_per_step = grad_accum_steps * batch_size * num_processes
        self.seed = seed
        # A step touches one pass or two unless it holds more rows than there are.
        self.order_of_pass = functools.lru_cache(maxsize=2)(self._order_of_pass)

    def _order_of_pass(self, number: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, number]).permutation(len(self.rows))

    def __getitem__(self, step: int) -> StepBatch:
        passes_AB, places_AB = np.divmod(
            step * self.rows_per_step + self.offsets_AB, len(self.rows)
        )
        rows_AB = np.empty_like(places_AB)
        for number in np.unique(passes_AB).tolist():
            here = passes_AB == number
            rows_AB[here] = self.order_of_pass(number)[places_AB[here]]
        index = torch.from_numpy(rows_AB)
        return StepBatch(self.rows[index].long(), self.row_domains[index])


class StepCounter(Iterator[int]):
    """0, 1, 2, ... without end; its state is the next number."""

    def __init__(self) -> None:
        self.step = 0

    def __next__(self) -> int:
        self.step += 1
        return self.step - 1

    def state_dict(self) -> dict[str, Any]:
        """The step that comes next."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the step of a `state_dict`."""
        self.step = state_dict["step"]


class StepSampler:
    """Gives every iteration over the loader its own `StepCounter`."""

    def __iter__(self) -> StepCounter:
        return StepCounter()


def whole(batch: StepBatch) -> StepBatch:
    """Collate function for items that are batches already."""
    return batch


def make_step_loader(
    train_blocks: Mapping[str, torch.Tensor],
    *,
    seed: int,
    batch_size: int,
    grad_accum_steps: int,
    process_index: int,
    num_processes: int,
) -> StatefulDataLoader[StepBatch]:
    """An endless loader of `StepBatch`, one per optimizer step, for this process.

    `train_blocks` are (N, L) integer tensors by domain. The G rows of a step and their order are
    the same for every split of G into micro-batches and processes. `state_dict()` after step n,
    loaded before iterating into a loader with the same G, blocks and seed, continues with step
    n + 1, at a cost that does not grow with n. The global random state is left alone.
    """
    dataset = StepDataset(
        train_blocks,
        seed=seed,
        batch_size=batch_size,
        grad_accum_steps=grad_accum_steps,
        process_index=process_index,
        num_processes=num_processes,
    )
    with warnings.catch_warnings():
        # torchdata 0.11 calls a function that newer versions of torch no longer want called
        warnings.filterwarnings("ignore", message=".*set_vital", category=UserWarning)
        return StatefulDataLoader(
            dataset,
            batch_size=None,
            sampler=StepSampler(),
            collate_fn=whole,
            num_workers=0,
            generator=torch.Generator().manual_seed(seed),  # else it draws from the global one
        )


def eval_batches(
    blocks: torch.Tensor, batch_size: int, process_index: int, num_processes: int
) -> Iterator[torch.Tensor]:
    """This process's share of `blocks` (N, L) as contiguous (at most `batch_size`, L) int64.

    Over all processes every row comes once, without padding; shares differ by at most one row.
    """
    first = len(blocks) * process_index // num_processes
    last = len(blocks) * (process_index + 1) // num_processes
    for start in range(first, last, batch_size):
        yield blocks[start : min(start + batch_size, last)].long()
