"""One process at a time writes to a run folder or a suite's."""

import errno
import fcntl
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command_environment

from moe_emergence import suite, train
from moe_emergence.errors import exit_code
from moe_emergence.run_folder import RunFolder
from moe_emergence.run_lock import locked

HOLDS = """
import sys, time
from pathlib import Path
from moe_emergence.run_lock import locked
with locked(Path(sys.argv[1]), "--run-name x"):
    print("holds", flush=True)
    sys.stdin.readline()
"""
OTHER = f"on {socket.gethostname()}"


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that has the lock of `tmp_path/runs/tiny` until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "runs" / "tiny")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=command_environment(),
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_refused_until_the_first_ends_or_is_killed(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "tiny"
    said = rf"--run-name x: .*tiny is in use by process {holder.pid} {OTHER}; wait"
    for _ in range(2):  # a refusal leaves the lock as it is
        with pytest.raises(ValueError, match=said), locked(folder, "--run-name x"):
            pass
    holder.kill()
    holder.wait()
    assert (folder / ".lock").exists()
    assert not RunFolder(folder).exists
    with locked(folder, "--run-name x"), pytest.raises(ValueError, match=f"process {os.getpid()} "):
        locked(folder, "--run-name x").__enter__()
    assert list(folder.iterdir()) == []


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "run", "--run-name run"):
        assert [p.name for p in (tmp_path / "a" / "run").iterdir()] == [".lock"]
    assert not (tmp_path / "a" / "run").exists()


@pytest.mark.slow
def test_train_and_suite_are_refused_where_another_works(
    holder: "subprocess.Popen[str]",
    tiny_flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(train.main, [*tiny_flags, "--resume", "auto"]) == 2
    said = capsys.readouterr().err
    assert f"error: --run-name tiny: {tmp_path}/runs/tiny is in use by process {holder.pid}" in said
    folder = tmp_path / "runs" / "tiny"
    assert exit_code(suite.main, ["run", "demo", "--out", str(folder)]) == 2
    assert f"error: --out {folder}: {folder} is in use by process" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_a_warning_is_all(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), locked(tmp_path / "run", "--run-name run"):
        (tmp_path / "run" / "written").touch()
    assert "cannot be locked here" in caplog.text
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["written"]
