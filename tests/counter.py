"""What test_benchmark_workers.py builds in other processes: a module that imports in no time."""

import os


class Counter:
    """Counts the steps of every name in its own process."""

    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError("cannot be built")
        self.count = start

    def look(self, name: str) -> tuple[int, int]:
        return os.getpid(), self.count

    def step(self, name: str) -> None:
        if name == "bad":
            raise ArithmeticError("a step went wrong")
        if name == "crash":
            os._exit(3)
        self.count += 1
