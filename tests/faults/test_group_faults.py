"""One process of a group fails: the others end in time, with one line and the last checkpoint."""

from pathlib import Path

import pytest
from equal_runs import assert_equal_runs
from group_faults import FAULTS, assert_ended_well, run_with_fault

from moe_emergence.errors import exit_code
from moe_emergence.run_folder import RunFolder
from moe_emergence.train import main as train_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def splits() -> dict[int, list[str]]:
    """Flags for the same short run in one process and in two."""
    short = ["--pretrain-steps", "1", "--eval-blocks", "1", "--grad-accum-steps", "1"]
    return {n: [*short, "--batch-size", str(8 // n)] for n in (1, 2)}


@pytest.mark.parametrize("name", FAULTS)
def test_all_end(
    name: str, tiny_flags: list[str], splits: dict[int, list[str]], tmp_path: Path
) -> None:
    layout = ["--fsdp-size", "2"] if name == "evaluations disagree" else []
    ended = run_with_fault(2, [*tiny_flags, *splits[2], *layout], name, tmp_path / "logs")
    run = RunFolder(tmp_path / "runs" / "tiny")
    assert_ended_well(name, ended, run)
    if name == "killed":
        alone = [*tiny_flags, *splits[1]]
        assert exit_code(train_command, [*alone, "--resume", "auto"]) == 0
        assert exit_code(train_command, [*alone, "--output-dir", str(tmp_path / "whole")]) == 0
        assert_equal_runs(RunFolder(tmp_path / "whole" / "tiny"), run)
