"""Two processes train what one process trains: losses, routing statistics and weights."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ACCELERATE, TORCHRUN, command_environment, flags_of
from safetensors.torch import load_file

from emergence_kernels.processes import warm_processes
from moe_emergence.config import RunConfig
from moe_emergence.errors import exit_code
from moe_emergence.run_folder import RunFolder, read_json, read_metrics
from moe_emergence.train import main as train_command
from moe_emergence.training.launch import missing_processes

pytestmark = pytest.mark.slow

# A step sees 8 sequences in every one of them: (batch size, accumulation, processes)
ONE, TWO_HALVES, TWO_QUARTERS = (8, 1, 1), (4, 1, 2), (2, 2, 2)


LAUNCHERS = {
    "accelerate": "accelerate.commands.accelerate_cli",
    "torchrun": "torch.distributed.run",
}


def one_of_two(flags: list[str], rank: int, port: int) -> None:
    """What torchrun's processes do, in one of ours."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    sys.exit(exit_code(train_command, flags))


def run_two(flags: list[str]) -> None:
    """Both processes without a launcher, whose imports are all of the time that it takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = warm_processes("moe_emergence.train")
    both = [context.Process(target=one_of_two, args=(flags, rank, port)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]


def train(
    config: RunConfig,
    split: tuple[int, int, int],
    *more: str,
    launcher: tuple[str, ...] | None = None,
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
    if launcher is None:
        run_two(flags)
        return folder
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            LAUNCHERS[launcher[0]],
            *launcher[1:],
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


def assert_equal_runs(one: RunFolder, other: RunFolder) -> None:
    """Equal up to the rounding of sums taken in another order."""
    rows, other_rows = (read_metrics(run.metrics) for run in (one, other))
    assert [row["step"] for row in rows] == [row["step"] for row in other_rows]
    for row, other_row in zip(rows, other_rows, strict=True):
        comparable: dict[str, Any] = {k: v for k, v in row.items() if not k.startswith("perf/")}
        for key, value in comparable.items():
            assert other_row[key] == pytest.approx(value, rel=2e-5, abs=1e-7), (row["step"], key)
    weights, other_weights = (load_file(r.final_model / "model.safetensors") for r in (one, other))
    for name, tensor in weights.items():
        # a step moves a weight by at most the learning rate; equal runs differ by much less
        torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=2e-5)


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
    halves = train(replace(noisy_config, run_name="halves"), TWO_HALVES, launcher=ACCELERATE)
    assert_equal_runs(one, halves)
    assert read_json(halves.environment)["processes"] == 2
    stopped = replace(noisy_config, run_name="stopped")
    quarters = train(stopped, TWO_QUARTERS, "--stop-after", "4", launcher=TORCHRUN)
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
