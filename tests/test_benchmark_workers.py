"""Contestants in processes of their own, and the training suite built on them."""

import os
from pathlib import Path

import pytest
import torch
from counter import Counter
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.grid import tasks
from benchmarks.peers import ENTRIES
from benchmarks.projection import project, projection_table
from benchmarks.results import Row, read_document
from benchmarks.setups import SETUPS, Setup
from benchmarks.step_changes import ALL
from benchmarks.step_changes import main as step_changes
from benchmarks.workers import Worker, take_turns

pytestmark = pytest.mark.slow


def test_works_take_turns_in_their_own_processes() -> None:
    with Worker("cpu", Counter, 10) as one, Worker("cpu", Counter, 20) as two:
        samples = take_turns({"a": one, "b": two, "c": two}, budget_s=0.0)
        (pid_one, count_one), (pid_two, count_two) = one.ask("look"), two.ask("look")
    assert len({pid_one, pid_two, os.getpid()}) == 3
    rounds = len(samples["a"].seconds)
    assert {len(s.seconds) for s in samples.values()} == {rounds}
    assert (count_one, count_two) == (10 + rounds + 1, 20 + 2 * (rounds + 1))
    assert all(second >= 0 for s in samples.values() for second in s.seconds)


def test_what_goes_wrong_in_a_worker_is_raised_here() -> None:
    with Worker("cpu", Counter, -1) as broken, pytest.raises(RuntimeError, match="cannot be built"):
        broken.ask("look")
    with Worker("cpu", Counter, 0) as worker:
        with pytest.raises(RuntimeError, match="ArithmeticError: a step went wrong"):
            worker.ask("step", "bad")
        assert worker.ask("peak") > 10**7
        with pytest.raises(RuntimeError, match="its process ended"):
            worker.ask("step", "crash")


def test_flops_of_a_step_are_those_that_torch_counts() -> None:
    setup = Setup("counted", 3, 16, 2, (1,), 40, 8, 2, 1)
    config = GPT2Config(
        vocab_size=40,
        n_positions=8,
        n_layer=3,
        n_embd=16,
        n_head=2,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    ids = torch.zeros(2, 8, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    # torch counts all of attention's products, the suite those that are not masked
    masked = 6 * setup.tokens * setup.layers * setup.block * setup.hidden
    assert setup.flops(is_moe=False) + masked == counter.get_total_flops()
    router = 6 * setup.tokens * setup.experts * setup.hidden
    assert setup.flops(is_moe=True) == setup.flops(is_moe=False) + router


def test_large_runs_are_asked_for() -> None:
    small, large = (
        {t.group for t in tasks("cpu", ["fp32"], 1.0, ENTRIES, large=large)}
        for large in (False, True)
    )
    assert large - small == {"gpt2-small/fp32"}
    assert "gpt2-small" in SETUPS


def test_step_changes_are_measured(tmp_path: Path) -> None:
    flags = ["--tiny", "--device", "cpu", "--dtype", "fp32", "--budget", "0"]
    step_changes(["--out", str(tmp_path), *flags])
    rows = read_document(tmp_path / "step_changes.json").rows
    assert rows[0].contestant == ALL
    assert rows[0].speedup == 1.0
    assert len(rows) == 4
    assert all(row.median_s and row.peak_bytes for row in rows)
    assert ALL in (tmp_path / "step_changes.md").read_text("utf-8")


def test_full_size_runs_are_projected_from_what_was_measured() -> None:
    rows = [
        Row("training", "gpt2-small/bf16", "step", name, "passed", median_s=1.0, tokens_per_s=speed)
        for name, speed in (("dense", 4096.0), ("fused-micro", 2048.0), ("fused", 1e9))
    ]
    minutes = {p.preset: p.minutes for p in project(rows, "bf16")}
    # 5,000, 10,000 and 2,000 steps of 4,096 tokens
    expected = {"dense": 5_000 / 60, "moe-main": 20_000 / 60, "no-lb": 4_000 / 60, "top2": None}
    assert minutes == pytest.approx(expected)
    table = projection_table(rows)
    assert table is not None
    assert "| top2 | 10,000 | bf16 | fused-micro | unmeasured | unmeasured |" in table
    assert projection_table([]) is None
