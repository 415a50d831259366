"""Nothing is added to a run as it goes on: the short form of `long_run.py`, by what can be counted.

A trainer that keeps every batch, and one that opens a file at every evaluation, fail it.
"""

import gc
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import pytest
from long_run import judge
from rich.progress import ProgressSample

from moe_emergence.config import RunConfig
from moe_emergence.run_folder import MetricsWriter
from moe_emergence.training.experiment import run_experiment

STEPS, EVERY, SETTLED = 440, 40, 240
"""Steps, steps between counts, and the step from which on nothing may be added."""


class Held:
    """Objects, open files and threads at every count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.objects: list[int] = []
        self.files: list[int] = []
        self.threads: list[int] = []
        write = MetricsWriter.append

        def append(writer: MetricsWriter, rows: list[dict[str, Any]]) -> None:
            write(writer, rows)
            step = rows[-1]["step"]
            if step > SETTLED and step % EVERY == 0 and "eval/lm_loss" not in rows[-1]:
                gc.collect()
                # the progress bar keeps those of the last 30 seconds
                found = [o for o in gc.get_objects() if not isinstance(o, ProgressSample)]
                self.objects.append(len(found))
                self.files.append(psutil.Process().num_fds())
                self.threads.append(threading.active_count())

        monkeypatch.setattr(MetricsWriter, "append", append)


def long(config: RunConfig) -> RunConfig:
    """With logging, evaluations and checkpoints as a user has them."""
    return replace(
        config,
        optim=replace(config.optim, max_steps=STEPS, pretrain_steps=1),
        monitor=replace(
            config.monitor, eval_every=EVERY, save_every=EVERY, keep_last_k=2, log_every=10,
            track="tensorboard",
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_nothing_grows_with_the_steps(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    assert run_experiment(long(tiny_config)).status == "completed"
    assert len(held.objects) == (STEPS - SETTLED) // EVERY
    # less than one object for every evaluation and its forty steps
    assert held.objects[-1] - held.objects[0] < len(held.objects) - 1, held.objects
    for counts in (held.files, held.threads):
        assert max(counts[1:]) <= counts[0], counts


def samples(memory: Sequence[float], files: Sequence[int]) -> list[dict[str, float]]:
    return [
        {"step": 10 * n + 1, "resident_bytes": m, "open_files": f, "threads": 3}
        for n, (m, f) in enumerate(zip(memory, files, strict=True))
    ]


@pytest.mark.parametrize(
    ("bytes_per_step", "opened", "slower", "fails"),
    [(0, 0, 1.0, None), (200, 0, 1.0, "memory"), (0, 1, 1.0, "open_files"), (0, 0, 1.3, "time")],
)
def test_the_verdict_of_a_long_run(
    bytes_per_step: int, opened: int, slower: float, fails: str | None
) -> None:
    at = range(0, 1000, 10)
    seen = samples([5e8 + bytes_per_step * n for n in at], [9 + opened * (n > 800) for n in at])
    times = [(n + 1, 0.01 * (slower if n > 700 else 1)) for n in at]
    found = judge(seen, times, 1000)
    verdicts: Any = found["verdicts"]
    assert [name for name, passes in verdicts.items() if not passes] == ([fails] if fails else [])
    assert found["passes"] == (fails is None)
