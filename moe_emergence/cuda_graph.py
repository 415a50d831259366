"""Capturing work on a GPU as a CUDA graph, and hearing beforehand why it cannot be."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class NotCapturableError(Exception):
    """The work does what a CUDA graph cannot hold; the message says what."""


class CudaCapture:
    """Makes graphs of work on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def rehearse(self, work: Callable[[], T]) -> tuple[T, str | None]:
        """Do `work` on a stream of its own, as a capture does, and say what waits for the host.

        Libraries and kernels set themselves up in the first few rehearsals, and may wait then.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as heard, torch.cuda.stream(self.stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        current.wait_stream(self.stream)
        for warning in heard:
            if "synchronizing CUDA operation" in str(warning.message):
                return result, f"it waits for the device at {warning.filename}:{warning.lineno}"
        return result, None

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """What does `work`, which is not done yet, and returns the same tensors each time.

        Raises:
            NotCapturableError: with everything as it was before.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = work()
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            # a capture that fails leaves torch's generator in it, where it refuses to draw
            fresh = torch.Generator(self.device).graphsafe_get_state()
            generators = torch.cuda.default_generators
            generators[self.device.index or 0].graphsafe_set_state(fresh)
            raise NotCapturableError(str(error).partition("\n")[0]) from error

        def replay() -> T:
            graph.replay()
            return result

        return replay
