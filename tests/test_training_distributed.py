"""Two processes train what one process trains: losses, routing statistics and weights."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ACCELERATE, command_environment, flags_of
from equal_runs import assert_equal_runs
from process_groups import run_processes

from moe_emergence.config import RunConfig
from moe_emergence.errors import exit_code
from moe_emergence.run_folder import RunFolder, read_json
from moe_emergence.train import main as train_command
from moe_emergence.training.launch import missing_processes

pytestmark = pytest.mark.slow

# A step sees 8 sequences in every one of them: (batch size, accumulation, processes)
ONE, TWO_HALVES, TWO_QUARTERS = (8, 1, 1), (4, 1, 2), (2, 2, 2)


def train(
    config: RunConfig,
    split: tuple[int, int, int],
    *more: str,
    by_launcher: bool = False,
) -> RunFolder:
    batch_size, accumulation, processes = split
    flags = [
        *flags_of(config),
        *("--batch-size", str(batch_size), "--grad-accum-steps", str(accumulation)),
        *more,
    ]
    folder = RunFolder(Path(config.output_dir) / config.run_name)
    if processes == 1:
        assert exit_code(train_command, flags) == 0
        return folder
    if not by_launcher:
        assert run_processes(processes, flags) == [0] * processes
        return folder
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            *ACCELERATE[1:],
            "-m",
            "moe_emergence.train",
            *flags,
        ],
        cwd=Path(config.output_dir).parent,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def noisy_config(tiny_config: RunConfig) -> RunConfig:
    """Router noise on at every step, top-2 of 8 experts on few tokens: some experts go empty."""
    return replace(
        tiny_config,
        model=replace(tiny_config.model, num_experts=8, top_k=2),
        optim=replace(
            tiny_config.optim,
            lb_coef=0.1,
            variance_coef=1.0,
            noise_anneal_fraction=1.0,
            learning_rate=1e-3,
        ),
    )


def test_two_processes_equal_one_also_when_one_goes_on(noisy_config: RunConfig) -> None:
    one = train(replace(noisy_config, run_name="one"), ONE)
    halves = train(replace(noisy_config, run_name="halves"), TWO_HALVES, by_launcher=True)
    assert_equal_runs(one, halves)
    assert read_json(halves.environment)["processes"] == 2
    stopped = replace(noisy_config, run_name="stopped")
    quarters = train(stopped, TWO_QUARTERS, "--stop-after", "4")
    assert read_json(quarters.summary)["final_step"] == 4
    assert_equal_runs(one, train(stopped, ONE, "--resume", "auto"))


def test_experts_without_tokens_do_not_hang_two_processes(tiny_config: RunConfig) -> None:
    """64 experts see 2 x 16 tokens a process: most have none, and not the same ones."""
    config = replace(tiny_config, model=replace(tiny_config.model, num_experts=64))
    run = train(config, (2, 1, 2), "--lb-coef", "0", "--z-coef", "0", "--pretrain-steps", "1")
    assert read_json(run.summary)["status"] == "completed"


CPU_LAUNCH = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "parent", "missing"),
    [
        (CPU_LAUNCH, ["accelerate", "launch", "--num_processes", "2", "--cpu"], 2),
        (CPU_LAUNCH, ["accelerate", "launch", "--num-processes=3", "--cpu"], 3),
        ({**CPU_LAUNCH, "LOCAL_RANK": "0"}, ["torchrun", "--num_processes", "2"], 0),
        ({"ACCELERATE_USE_CPU": "True"}, ["accelerate", "launch", "--cpu"], 0),
        ({"MASTER_PORT": "29500"}, ["bash", "--num_processes", "2"], 0),
        ({}, ["bash"], 0),
    ],
)
def test_processes_that_the_launcher_did_not_start(
    environment: dict[str, str], parent: list[str], missing: int
) -> None:
    assert missing_processes(environment, parent) == missing


def test_an_unknown_number_of_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        missing_processes(CPU_LAUNCH, ["accelerate", "launch", "--config_file", "two.yaml"])
