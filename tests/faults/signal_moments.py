"""Commands that get signals at moments that are chosen, or by chance.

`python tests/faults/signal_moments.py` tries every moment of training with every signal, once and
twice, goes on with each run and compares it with one that was left alone; then it sends signals
at random moments to commands that start from nothing.
"""

import argparse
import contextlib
import importlib
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import command_environment, flags_of, tiny
from equal_runs import assert_same_run
from small_texts import write_texts
from warm_commands import IMPORTS, _run, alone

from emergence_kernels.processes import warm_processes
from moe_emergence import interrupt
from moe_emergence.errors import exit_code
from moe_emergence.interrupt import SIGNALS, interrupted_code
from moe_emergence.run_folder import RunFolder, read_json
from moe_emergence.train import main as train_command

LIMIT_SECONDS = 20.0
"""Within which a signal ends a command of these, on a busy machine."""


@dataclass(frozen=True)
class Moment:
    """When `function` ("module:name") is called, `skip` calls passed over."""

    function: str
    skip: int = 0
    finishes_step: bool = False
    """Whether the run ends after its step, with a checkpoint, rather than at once."""


EXPERIMENT, STAGES, TRAINER = (
    f"moe_emergence.training.{n}" for n in ("experiment", "stages", "trainer")
)
CHECKPOINT = "moe_emergence.training.checkpoint"
TRAINING = {
    "parsing": Moment("moe_emergence.command:spelled_out"),
    "starting": Moment("moe_emergence.train.work:begin"),
    "reading data": Moment("moe_emergence.data.prepare:read_sources"),
    "making a cache": Moment("moe_emergence.data.tokenizer:train_bpe"),
    "loading": Moment(f"{STAGES}:new_dense_model"),
    "upcycling": Moment(f"{STAGES}:upcycle"),
    "starting a folder": Moment(f"{EXPERIMENT}:recover_folders", 1),
    "first evaluation": Moment(f"{TRAINER}:evaluate", 0, True),
    "step of the base": Moment(f"{TRAINER}:Trainer._train_step", 1, True),
    "step": Moment(f"{TRAINER}:Trainer._train_step", 6, True),
    "evaluation": Moment(f"{TRAINER}:evaluate", 4, True),
    "checkpoint": Moment(f"{CHECKPOINT}:_sha256", 1, True),
    "swap of a folder": Moment("moe_emergence.disk:_sync_all", 3, True),
    "figures": Moment("moe_emergence.train.work:plot_expert_domain"),
}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    """Since its first signal."""

    def errors(self) -> list[str]:
        """Lines of stderr that say why it ended."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]

    def assert_tidy(self) -> None:
        """One line at most, no traceback, in time."""
        for word in ("Traceback", "Exception ignored", "Logging error", "panicked"):
            assert word not in self.stderr + self.stdout, self.stderr[-3000:]
        assert len(self.errors()) <= 1, self.stderr
        assert self.seconds < LIMIT_SECONDS


def at_moment(
    arguments: Sequence[str], moment: Moment, numbers: Sequence[int], where: Path
) -> Ended:
    """`python ARGUMENTS` in the folder `where`, to which `numbers` are sent at the moment.

    The second and later of them insist, as if a person had waited.
    """
    option, module, *flags = arguments
    assert option == "-m"
    where.mkdir(parents=True, exist_ok=True)
    out, err, sent = (where / name for name in ("stdout.txt", "stderr.txt", "sent.txt"))
    context = warm_processes(*IMPORTS)
    process = context.Process(
        target=_signalled, args=(module, flags, moment, [*numbers], where, out, err, sent)
    )
    process.start()
    process.join(120)
    ended = time.time()
    if process.exitcode is None:
        process.kill()
        process.join()
    seconds = ended - float(sent.read_text()) if sent.exists() else 0.0
    return Ended(process.exitcode, out.read_text("utf-8"), err.read_text("utf-8"), seconds)


def _signalled(
    module: str,
    flags: list[str],
    moment: Moment,
    numbers: list[int],
    where: Path,
    out: Path,
    err: Path,
    sent: Path,
) -> None:
    interrupt._AGAIN_SECONDS = 0.0
    place, _, name = moment.function.partition(":")
    owner: Any = importlib.import_module(place)
    *path, name = name.split(".")
    for step in path:
        owner = getattr(owner, step)
    original, calls = getattr(owner, name), 0

    def with_signal(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == moment.skip + 1:
            sent.write_text(str(time.time()))
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*args, **options)

    setattr(owner, name, with_signal)
    _run(module, flags, where, out, err, {**alone(), "COLUMNS": "200"})


def strays(*folders: Path) -> list[Path]:
    """What was left half made: hidden, and beside its place."""
    found = [path for folder in folders for path in folder.rglob(".*")]
    return [path for path in found if path.name != ".lock"]


def quietly(flags: list[str]) -> None:
    """Train to the end here."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = exit_code(train_command, flags)
    assert code == 0, said.getvalue()


def whole_run(where: Path) -> tuple[list[str], RunFolder]:
    """The flags of a small run, and its folder after it was left alone."""
    write_texts(where / "data")
    config = tiny(where / "data", where / "cache", where / "whole")
    quietly(flags_of(config))
    return flags_of(config), RunFolder(Path(config.output_dir) / "tiny")


def main() -> None:
    """Try everything; assertions fail where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=60, help="signals at random moments")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        flags, whole = whole_run(where)
        _every_moment(flags, whole, where)
        _random_moments(flags, whole, where, options.random, random.Random(options.seed))


def _every_moment(flags: list[str], whole: RunFolder, where: Path) -> None:
    slowest = 0.0
    for name, moment in TRAINING.items():
        for number in SIGNALS:
            for times in (1, 2):
                place = where / "one"
                mine = ["--output-dir", str(place / "runs"), "--cache-dir", str(place / "cache")]
                done = at_moment(
                    ["-m", "moe_emergence.train", *flags, *mine], moment, [number] * times, place
                )
                done.assert_tidy()
                assert done.code == interrupted_code(number), (name, number, times, done)
                slowest = max(slowest, done.seconds)
                if times == 1:
                    assert not strays(place / "runs", place / "cache"), name
                _go_on(flags, mine, whole, place)
        print(f"{name}: ended by every signal, sent once and twice; goes on to the same run")
    print(f"the slowest end took {slowest:.1f} s")


def _go_on(flags: list[str], mine: list[str], whole: RunFolder, place: Path) -> None:
    quietly([*flags, *mine, "--resume", "auto"])
    run = RunFolder(place / "runs" / "tiny")
    assert read_json(run.summary)["status"] == "completed"
    assert not strays(place / "runs")
    assert_same_run(whole, run)
    shutil.rmtree(place)


def _random_moments(
    flags: list[str], whole: RunFolder, where: Path, count: int, rng: random.Random
) -> None:
    """Signals to cold commands, from the start of the interpreter to past the end of the run."""
    outcomes: Counter[str] = Counter()
    place = where / "random"
    mine = ["--output-dir", str(place / "runs"), "--cache-dir", str(place / "cache")]
    command = [sys.executable, "-m", "moe_emergence.train", *flags, *mine]
    place.mkdir()
    started = time.monotonic()
    subprocess.run(command, env=command_environment(), check=True, capture_output=True)
    length = time.monotonic() - started
    shutil.rmtree(place)
    for _ in range(count):
        place.mkdir()
        number, delay = rng.choice(SIGNALS), rng.uniform(0, length)
        delay = delay / 10 if rng.random() < 0.3 else delay
        process = subprocess.Popen(
            command, env=command_environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        time.sleep(delay)
        sent = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        done = Ended(process.returncode, out, err, time.monotonic() - sent)
        done.assert_tidy()
        expected = {0: "was done", interrupted_code(number): "ended by it", -number: "not begun"}
        assert done.code in expected, (number, delay, done)
        outcomes[expected[done.code]] += 1
        assert not strays(*(p for p in (place / "runs", place / "cache") if p.exists()))
        _go_on(flags, mine, whole, place)
    print(f"{count} signals within {length:.1f} s: {dict(outcomes)}")


if __name__ == "__main__":
    main()
