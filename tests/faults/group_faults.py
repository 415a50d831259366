"""Runs of several processes in which one fails.

`python tests/faults/group_faults.py` tries every fault in groups of 2 and 4, with a copy of the
weights each and with shares of them, and goes on with 1, 2 and 4 processes.
"""

import argparse
import contextlib
import errno
import io
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from conftest import flags_of, tiny
from equal_runs import assert_equal_runs
from process_groups import one_of, run_processes
from signal_moments import Ended
from small_texts import write_texts

from emergence_kernels.processes import warm_processes
from moe_emergence.errors import RunError, exit_code
from moe_emergence.run_folder import RunFolder, read_json
from moe_emergence.train import main as train_command

PATIENCE_SECONDS = 4.0
"""Of these runs, for a process that does not answer; it is minutes elsewhere."""
LIMIT_SECONDS = 15.0
"""Within which all others have ended."""


def _kill(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _fail(trainer: Any) -> None:
    raise RunError("this process alone cannot go on")


def _poison(trainer: Any) -> None:
    with torch.no_grad():
        for parameter in trainer.unwrapped.parameters():
            parameter.mul_(torch.nan)


def _fill_disk(trainer: Any) -> None:
    from moe_emergence.training import checkpoint

    def full(path: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint._sha256 = full


def _disagree(trainer: Any) -> None:
    """One more of what all processes do together in an evaluation."""
    from moe_emergence.training import evaluation

    original = evaluation._domain_sums

    def once_more(*arguments: Any) -> Any:
        evaluation.forward(trainer.model, arguments[2][:1].long())
        return original(*arguments)

    evaluation._domain_sums = once_more


FAULTS: dict[str, tuple[int, Callable[[Any], None], str]] = {
    "killed": (1, _kill, "does not answer"),
    "the first one killed": (0, _kill, "does not answer"),
    "hangs": (1, _stop, "does not answer"),
    "fails alone": (1, _fail, "does not answer"),
    "not finite": (1, _poison, "lm_loss is nan at step 5"),
    "full disk": (0, _fill_disk, "cannot write"),
    "evaluations disagree": (1, _disagree, "does not answer"),
}
"""Which process, what happens to it before its step 5, and what the others say."""


def run_with_fault(count: int, flags: list[str], name: str, where: Path) -> list[Ended]:
    """How every process ended; `seconds` is from the fault on, negative for one killed here."""
    where.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = warm_processes("moe_emergence.train.work", "datasets")
    group = [
        context.Process(target=one_of, args=(rank, count, port, _train, (flags, name, rank, where)))
        for rank in range(count)
    ]
    for process in group:
        process.start()
    deadline, ends = time.time() + 300, dict[int, float]()
    mark = where / "fault"
    while len(ends) < count and time.time() < deadline:
        time.sleep(0.02)
        for rank, process in enumerate(group):
            if rank not in ends and process.exitcode is not None:
                ends[rank] = time.time()
        if mark.exists():
            deadline = min(deadline, float(mark.read_text()) + LIMIT_SECONDS)
    started = float(mark.read_text())
    for process in group:
        process.kill()
        process.join()
    return [
        Ended(
            process.exitcode,
            (where / f"out-{rank}").read_text("utf-8"),
            (where / f"err-{rank}").read_text("utf-8"),
            ends.get(rank, 0.0) - started,
        )
        for rank, process in enumerate(group)
    ]


def _train(flags: list[str], name: str, rank: int, where: Path) -> None:
    from moe_emergence.training import processes, trainer

    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(where / f"{kind}-{rank}", os.O_WRONLY | os.O_CREAT), number)
    processes.PATIENCE = timedelta(seconds=PATIENCE_SECONDS)
    broken, fault, _ = FAULTS[name]
    original = trainer.Trainer._train_step

    def step(self: Any, batch: Any) -> Any:
        if self.config.run_name == "tiny" and self.step == 4 and rank == broken:
            (where / "fault").write_text(str(time.time()))
            fault(self)
        return original(self, batch)

    trainer.Trainer._train_step = step  # type: ignore[method-assign]
    sys.exit(exit_code(train_command, flags))


def assert_ended_well(name: str, ended: list[Ended], run: RunFolder) -> None:
    """All but the one with the fault in time and by themselves, each with the one line."""
    broken, _, says = FAULTS[name]
    said = set()
    for rank, one in enumerate(ended):
        if rank == broken and name in ("killed", "the first one killed", "hangs"):
            continue
        one.assert_tidy()
        assert one.code == 1, (name, rank, one)
        assert 0 <= one.seconds < LIMIT_SECONDS, (name, rank, one)
        [line] = one.errors()
        if rank != broken or name in ("not finite", "full disk"):
            assert says in line, (name, rank, line)
            said.add(line)
    if name in ("not finite", "full disk"):
        assert len(said) == 1, said
    assert run.checkpoint_steps() == [3]
    if broken != 0 or name == "full disk":
        assert read_json(run.summary)["status"] == "failed"


def main() -> None:
    """Try everything; assertions fail where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", nargs="*", default=[*FAULTS], help="some of them, all by default")
    faults = parser.parse_args().faults
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        write_texts(where / "data")
        config = tiny(where / "data", where / "cache", where / "whole")
        flags = [*flags_of(config), "--grad-accum-steps", "1"]
        _quietly([*flags, "--batch-size", "8"])
        whole = RunFolder(where / "whole" / "runs" / "tiny")
        slowest = 0.0
        for name in faults:
            for count, layout in ((2, ()), (2, ("--fsdp-size", "2")), (4, ())):
                for go_on in (1, 2, 4):
                    place = where / f"{name}-{count}-{len(layout)}-{go_on}"
                    mine = [*flags, "--output-dir", str(place / "runs"), *layout]
                    split = ["--batch-size", str(8 // count)]
                    ended = run_with_fault(count, [*mine, *split], name, place)
                    run = RunFolder(place / "runs" / "tiny")
                    assert_ended_well(name, ended, run)
                    slowest = max(slowest, *(one.seconds for one in ended))
                    again = [*flags, "--output-dir", str(place / "runs"), "--resume", "auto"]
                    again += ["--batch-size", str(8 // go_on)]
                    if go_on == 1:
                        _quietly(again)
                    else:
                        assert run_processes(go_on, again) == [0] * go_on
                    assert_equal_runs(whole, run)
            print(
                f"{name}: 2 and 4 processes ended; 1, 2 and 4 went on to the same run", flush=True
            )
        print(f"the slowest end took {slowest:.1f} s with {PATIENCE_SECONDS:.0f} s of patience")


def _quietly(flags: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = exit_code(train_command, flags)
    assert code == 0, said.getvalue()


if __name__ == "__main__":
    main()
