"""The train command, or another function, in several processes without a launcher."""

import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch

from emergence_kernels.processes import warm_processes
from moe_emergence.errors import exit_code
from moe_emergence.train import main as train_command


def run_processes(count: int, flags: list[str]) -> list[int | None]:
    """Exit codes of `count` processes that train with `flags`, as under torchrun."""
    return in_processes(count, train, flags)


def train(flags: list[str]) -> None:
    sys.exit(exit_code(train_command, flags))


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Exit codes of `count` processes that call `function`, as torchrun would start them.

    A launcher's imports are all of the time that it takes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = warm_processes("moe_emergence.train.work", "datasets")
    all_of_them = [
        context.Process(target=one_of, args=(rank, count, port, function, arguments))
        for rank in range(count)
    ]
    for process in all_of_them:
        process.start()
    running = {process.sentinel: process for process in all_of_them}
    patience = 300.0
    while running and (ended := wait(list(running), patience)):
        for sentinel in ended:
            if running.pop(sentinel).exitcode:
                patience = 10.0  # for others that wait for this one
    for process in all_of_them:
        process.kill()
        process.join()
    return [process.exitcode for process in all_of_them]


def one_of(
    rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    # a machine with GPUs shards over these
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    function(*arguments)
