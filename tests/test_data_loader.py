import copy
import itertools
import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_emergence.config import SHIPPED
from moe_emergence.data import StepBatch, eval_batches, make_step_loader

LENGTH = 3


def train_blocks(*counts: int) -> dict[str, torch.Tensor]:
    """Blocks whose first token is the row number and whose second is the domain."""
    blocks, first = {}, 0
    for index, (domain, count) in enumerate(zip(SHIPPED, counts, strict=False)):
        rows = torch.arange(first, first + count)
        blocks[domain] = torch.stack([rows, torch.full_like(rows, index), rows * 2], 1).int()
        first += count
    return blocks


def loader(blocks, split=(1, 1, 1), seed=5, process=0):
    accum, batch, processes = split
    return make_step_loader(
        blocks,
        seed=seed,
        batch_size=batch,
        grad_accum_steps=accum,
        process_index=process,
        num_processes=processes,
    )


def global_rows(blocks, split, steps, seed=5, state=None) -> torch.Tensor:
    """(steps, G, L) rows in the global order, put together from all processes."""
    accum, batch, processes = split
    parts = []
    for process in range(processes):
        one = loader(blocks, split, seed, process)
        if state is not None:
            one.load_state_dict(copy.deepcopy(state))
        batches = list(itertools.islice(one, steps))
        parts.append(torch.stack([b.input_ids for b in batches]))
    rows = torch.stack(parts, 2)  # (steps, A, P, B, L)
    return rows.reshape(steps, accum * processes * batch, LENGTH)


def splits_of(rows_per_step: int) -> list[tuple[int, int, int]]:
    sizes = range(1, rows_per_step + 1)
    return [s for s in itertools.product(sizes, repeat=3) if s[0] * s[1] * s[2] == rows_per_step]


def test_batches_have_the_promised_shapes_types_and_labels() -> None:
    batch = next(iter(loader(train_blocks(5, 6, 7), (4, 2, 1))))
    assert isinstance(batch, StepBatch)
    assert batch.input_ids.shape == (4, 2, LENGTH)
    assert batch.domains.shape == (4, 2, 3)
    assert batch.input_ids.dtype == torch.int64
    assert (batch.domains.sum(dim=-1) == 1).all()
    assert torch.equal(batch.input_ids[..., 1], batch.domains.argmax(dim=-1))
    assert torch.equal(batch.input_ids[..., 2], batch.input_ids[..., 0] * 2)


@pytest.mark.parametrize("rows_per_step", [1, 6, 8])
def test_every_split_of_a_step_sees_the_same_rows_in_the_same_order(rows_per_step: int) -> None:
    blocks = train_blocks(5, 4, 6)
    expected = global_rows(blocks, (rows_per_step, 1, 1), 6)
    for split in splits_of(rows_per_step):
        assert torch.equal(global_rows(blocks, split, 6), expected), split


@given(
    st.tuples(*[st.integers(1, 6)] * 3), st.integers(1, 20), st.integers(0, 9), st.integers(0, 99)
)
@settings(max_examples=40)
def test_every_pass_holds_every_row_once(counts, rows_per_step, seed, skip) -> None:
    total = sum(counts)
    steps = 3 * total // rows_per_step + 1
    rows = global_rows(train_blocks(*counts), (1, rows_per_step, 1), steps, seed)
    stream = rows[..., 0].flatten().tolist()
    passes = [stream[i * total : (i + 1) * total] for i in range(3)]
    assert all(sorted(one) == list(range(total)) for one in passes)
    if total >= 10:
        assert passes[0] != passes[1] != passes[2]
        assert passes[0] != list(range(total))


def test_the_seed_changes_the_order() -> None:
    blocks = train_blocks(10, 10, 10)
    rows = [global_rows(blocks, (1, 30, 1), 1, seed) for seed in (1, 2, 1)]
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])


@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from(splits_of(4)))
@settings(max_examples=40)
def test_resume_at_any_step_with_any_split_is_the_same_as_never_stopping(
    first, second, split
) -> None:
    blocks = train_blocks(3, 4, 4)
    expected = global_rows(blocks, (4, 1, 1), 30)
    one = loader(blocks, (2, 1, 2), process=1)
    rows = iter(one)
    for _ in range(first):
        next(rows)
    state = json.loads(json.dumps(one.state_dict()))  # a checkpoint may be JSON
    assert torch.equal(global_rows(blocks, split, 5, state=state), expected[first : first + 5])

    again = loader(blocks, split)
    again.load_state_dict(state)
    rows = iter(again)
    for _ in range(second):
        next(rows)
    state = again.state_dict()
    total = first + second
    assert torch.equal(global_rows(blocks, split, 3, state=state), expected[total : total + 3])


def test_taking_the_state_does_not_disturb_the_stream() -> None:
    blocks = train_blocks(4, 4, 4)
    one = loader(blocks)
    one.state_dict()
    seen = []
    for batch in itertools.islice(one, 20):
        seen.append(batch.input_ids.flatten())
        one.state_dict()
    assert torch.equal(torch.stack(seen), global_rows(blocks, (1, 1, 1), 20)[:, 0])


def test_a_resume_far_on_is_cheap() -> None:
    blocks = train_blocks(50, 50, 50)
    one = loader(blocks, (4, 2, 1))
    state = one.state_dict()
    state["_sampler_iter_state"]["step"] = 10**9
    one.load_state_dict(state)
    start = time.perf_counter()
    next(iter(one))
    assert time.perf_counter() - start < 1
    assert one.state_dict()["_sampler_iter_state"] == {"step": 10**9 + 1}


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    one = loader(train_blocks(3, 3, 3))
    list(itertools.islice(one, 5))
    one.load_state_dict(one.state_dict())
    list(itertools.islice(one, 5))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_single_domain_is_all_of_every_batch() -> None:
    only = {"prose": train_blocks(2, 3, 4)["prose"]}
    assert next(iter(loader(only, (1, 4, 1)))).domains.tolist() == [[[1.0]] * 4]


def test_no_rows_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="--size-mb"):
        loader(train_blocks(0, 0, 0))


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 7))
def test_evaluation_covers_every_row_once_over_all_processes(rows, batch_size, processes) -> None:
    blocks = torch.arange(rows * 2, dtype=torch.int32).reshape(rows, 2)
    shares = [list(eval_batches(blocks, batch_size, p, processes)) for p in range(processes)]
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    flat = [batch for share in shares for batch in share]
    assert all(b.dtype == torch.int64 and 0 < len(b) <= batch_size for b in flat)
    assert all(len(b) == batch_size for share in shares for b in share[:-1])
    assert torch.equal(torch.cat([torch.empty(0, 2, dtype=torch.int64), *flat]), blocks.long())
