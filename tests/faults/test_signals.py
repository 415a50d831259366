"""A signal ends a command in every phase: in time, with one line, and nothing half made."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command, command_environment
from signal_moments import TRAINING, Moment, at_moment, strays

from moe_emergence.errors import exit_code
from moe_emergence.interrupt import SIGNALS, EndAtOnce, StopRequest, finishing
from moe_emergence.run_folder import RunFolder, read_json
from moe_emergence.train import main as train_command

pytestmark = pytest.mark.slow

TRAIN = ("-m", "moe_emergence.train")
MATRIX = [(name, SIGNALS[i % len(SIGNALS)]) for i, name in enumerate(TRAINING)]
MATRIX += [("step", number) for number in SIGNALS]


@pytest.mark.parametrize(("name", "number"), MATRIX, ids=lambda v: str(getattr(v, "name", v)))
def test_training_ends_in_every_phase(
    name: str, number: signal.Signals, tiny_flags: list[str], tmp_path: Path
) -> None:
    moment = TRAINING[name]
    cache = ["--cache-dir", str(tmp_path / "cache")]
    done = at_moment([*TRAIN, *tiny_flags, *cache], moment, [number], tmp_path / "here")
    done.assert_tidy()
    assert done.code == 128 + number, done.stderr
    assert not strays(tmp_path)
    run = RunFolder(tmp_path / "runs" / "tiny")
    if moment.finishes_step:
        assert f"{number.name}: stopping after this step" in done.stderr
        assert "to go on:" in done.stdout
        assert not done.errors()
        assert read_json(run.summary)["status"] == "interrupted"
    else:
        assert done.errors() == [f"error: interrupted by {number.name}"]
        assert ("to go on: python -m moe_emergence.train" in done.stderr) == (name != "parsing")
    if run.root.exists() and name != "figures":
        assert read_json(run.summary)["status"] == "interrupted"


@pytest.mark.parametrize("name", ["step", "swap of a folder", "making a cache"])
def test_a_signal_that_insists_ends_at_once(
    name: str, tiny_flags: list[str], tmp_path: Path
) -> None:
    """At once, but for a folder that is being swapped in."""
    cache = ["--cache-dir", str(tmp_path / "cache")]
    flags = [*tiny_flags, *cache]
    done = at_moment([*TRAIN, *flags], TRAINING[name], [signal.SIGTERM] * 2, tmp_path / "here")
    done.assert_tidy()
    assert done.code == 143, done.stderr
    assert exit_code(train_command, [*flags, "--resume", "auto"]) == 0
    run = RunFolder(tmp_path / "runs" / "tiny")
    assert read_json(run.summary)["status"] == "completed"
    assert not strays(run.root)


COMMANDS = {
    "analyze": ("moe_emergence.analyze.work:output_folder", ["nothing"]),
    "generate": ("moe_emergence.generate.work:load", ["--checkpoint", "no", "--prompt", "a"]),
    "verify": ("moe_emergence.verify.work:certify", ["--dtype", "fp32", "--json", "found.json"]),
    "suite": ("moe_emergence.suite.work:describe", ["run", "demo", "--out", "out"]),
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_other_commands_end_at_once(verb: str, tmp_path: Path) -> None:
    function, flags = COMMANDS[verb]
    number = SIGNALS[list(COMMANDS).index(verb) % len(SIGNALS)]
    done = at_moment(
        [*("-m", f"moe_emergence.{verb}"), *flags], Moment(function), [number], tmp_path
    )
    done.assert_tidy()
    assert (done.code, done.errors()) == (128 + number, [f"error: interrupted by {number.name}"])
    assert not strays(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["tyro", "transformers"])
def test_imports_are_interrupted_without_a_word_too_many(
    package: str, command: Command, tmp_path: Path
) -> None:
    """A package that gets the signal while it is imported, in a process that starts cold."""
    fake = tmp_path / "packages"
    fake.mkdir()
    (fake / f"{package}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environment = command_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(fake), environment["PYTHONPATH"]])
    done = command("-m", "moe_emergence.train", env=environment)
    assert (done.returncode, done.stderr) == (130, "error: interrupted by SIGINT\n")


@pytest.fixture
def _handlers_of_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers_of_before")
def test_a_package_that_makes_another_error_of_a_signal() -> None:
    def main(argv: list[str]) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("cannot import") from error
        return 0

    with EndAtOnce():
        assert exit_code(main, []) == 143


@pytest.mark.usefixtures("_handlers_of_before")
def test_ignored_signals_stay_ignored() -> None:
    """As under nohup, and in the background of a script."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop, finishing():
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.number == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_what_launchers_repeat_does_not_insist() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.number == signal.SIGINT


@pytest.mark.usefixtures("_handlers_of_before")
def test_tidying_up_is_not_cut_in_two() -> None:
    done = []

    def tidy() -> None:
        with finishing():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("tidy")
        done.append("never")

    def main(argv: list[str]) -> int:
        try:
            raise OSError("disk")
        finally:
            tidy()

    with EndAtOnce():
        assert exit_code(main, []) == 143
    assert done == ["tidy"]


CLOSED_TERMINAL = """
import os, pty, subprocess, sys, time
from pathlib import Path
child, terminal = pty.fork()
if child == 0:
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
metrics = Path(sys.argv[1])
seen = b""
while not metrics.exists() or b"step 3" not in seen:
    seen += os.read(terminal, 1000)
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_terminal_that_is_closed_costs_nothing(
    command: Command, tiny_flags: list[str], tmp_path: Path
) -> None:
    endless = ["--max-steps", "100000", "--eval-every", "3", "--save-every", "100000"]
    run = RunFolder(tmp_path / "runs" / "tiny")
    train = [*TRAIN, *tiny_flags, *endless, "--pretrain-steps", "1"]
    done = command("-c", CLOSED_TERMINAL, str(run.metrics), *train)
    assert done.stdout == "129\n", done.stderr
    summary = read_json(run.summary)
    assert summary["status"] == "interrupted"
    assert run.checkpoint_steps() == [summary["final_step"]]
