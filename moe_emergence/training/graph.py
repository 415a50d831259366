"""The whole optimizer step as one CUDA graph: captured once, then launched with a single call.

A step of a small model is thousands of launches, which the host cannot issue as fast as a GPU works
them off. A graph reads its inputs where they were at the capture, so all that changes with the step
(tokens, domains, learning rate, router noise) lies on the device and is overwritten there. Dropout
draws from torch's generator, whose seed a replay reads anew.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from moe_emergence.config import RunConfig
from moe_emergence.cuda_graph import CudaCapture, NotCapturableError
from moe_emergence.errors import RunError
from moe_emergence.moe import RouterNoise
from moe_emergence.names import DispatchName
from moe_emergence.training.schedules import Rates
from moe_emergence.training.step import StepStatistics
from moe_emergence.training.update import Outcome, Update

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moe_emergence.data.loader import StepBatch

logger = logging.getLogger(__name__)

WARM_UP = 3
"""Steps before the capture, in which libraries and kernels set themselves up."""
Work = Callable[[], Outcome]


class Capture(Protocol):
    """What makes graphs: CUDA, or a stand-in for it under test."""

    def rehearse(self, work: Work) -> tuple[Outcome, str | None]:
        """Do `work` as it would be captured, and say what in it waits for the host, if anything."""
        ...

    def record(self, work: Work) -> Work:
        """What does the work of `work` when called, and returns the same tensors each time.

        Raises:
            NotCapturableError: with everything as it was before.
        """
        ...


class GraphedUpdate:
    """An `Update` whose steps are replayed after the first few.

    Args:
        update: takes the steps.
        required: whether a step that cannot be captured is an error; otherwise steps go on as
            `update` takes them, and the log says why.
        capture: makes the graphs.
    """

    def __init__(self, update: Update, *, required: bool, capture: Capture) -> None:
        self.update, self.required, self.capture = update, required, capture
        self.device = update.accelerator.device
        self.rates = (torch.zeros((), device=self.device), torch.zeros((), device=self.device))
        self.noise_std = torch.zeros((), dtype=torch.float64, device=self.device)
        self.step = torch.zeros((), dtype=torch.int64, device=self.device)
        self.batch: StepBatch | None = None
        self.rehearsed = 0
        self.replay: Work | None = None
        self.replays_noise = False
        self.given_up = False

    def __call__(self, batch: "StepBatch", noise: RouterNoise | None, rates: Rates) -> Outcome:
        """Take a step, see `Update`; the outcome's tensors are the caller's."""
        if self.given_up:
            return self.update(batch, noise, rates)
        self._write_inputs(batch, noise, rates)
        is_noisy = noise is not None and noise.is_on
        if self.rehearsed < WARM_UP:
            return self._rehearse(noise)
        if self.replay is None or self.replays_noise != is_noisy:
            # the old graph's memory is free before the new one asks for some
            self.replay = None
            self.replay, self.replays_noise = self._record(noise), is_noisy
        if self.replay is None:
            return self.update(batch, noise, rates)
        outcome = self.replay()
        sums = StepStatistics(*(t.clone() for t in vars(outcome.sums).values()))
        return Outcome(sums, outcome.grad_norm.clone())

    def _write_inputs(self, batch: "StepBatch", noise: RouterNoise | None, rates: Rates) -> None:
        if self.batch is None:
            self.batch = type(batch)(batch.input_ids.clone(), batch.domains.clone())
        self.batch.input_ids.copy_(batch.input_ids)
        self.batch.domains.copy_(batch.domains)
        for on_device, rate in zip(self.rates, rates, strict=True):
            on_device.fill_(rate)
        if noise is not None:
            self.noise_std.fill_(noise.std)
            self.step.fill_(noise.step)

    def _work(self, noise: RouterNoise | None) -> Work:
        batch = self.batch
        assert batch is not None
        on_device = noise
        if noise is not None and noise.is_on:
            on_device = RouterNoise(self.noise_std, noise.seed, self.step)
        return lambda: self.update(batch, on_device, Rates(*self.rates))

    def _rehearse(self, noise: RouterNoise | None) -> Outcome:
        outcome, reason = self.capture.rehearse(self._work(noise))
        self.rehearsed += 1
        if reason is not None and self.rehearsed == WARM_UP:
            self._give_up(reason)
        return outcome

    def _record(self, noise: RouterNoise | None) -> Work | None:
        groups = self.update.optimizer.param_groups
        for group in groups:
            group["capturable"] = True
        try:
            return self.capture.record(self._work(noise))
        except NotCapturableError as error:
            self._give_up(str(error))
            return None
        finally:
            for group in groups:
                group["capturable"] = False

    def _give_up(self, reason: str) -> None:
        if self.required:
            raise RunError(f"--cuda-graph on: the step cannot be captured, {reason}; give off")
        logger.warning("no CUDA graph, every kernel is launched on its own: %s", reason)
        self.given_up = True


def check_can_capture(config: RunConfig, accelerator: "Accelerator") -> None:
    """Refuse `--cuda-graph on` where no step can be captured."""
    reason = _obstacle(config, accelerator)
    if config.cuda_graph == "on" and reason is not None:
        raise ValueError(f"--cuda-graph on: {reason}; give auto or off")


def dispatch_of(config: RunConfig, accelerator: "Accelerator") -> DispatchName:
    """`--dispatch`; for `auto`, where steps are captured, the path that never waits for routing."""
    is_auto = config.dispatch == "auto"
    return "fused" if is_auto and _captures(config, accelerator) else config.dispatch


def make_update(update: Update, config: RunConfig) -> Update | GraphedUpdate:
    """`update`, or what replays it where `--cuda-graph` and the machine allow."""
    if not _captures(config, update.accelerator):
        return update
    capture = CudaCapture(update.accelerator.device)
    return GraphedUpdate(update, required=config.cuda_graph == "on", capture=capture)


def _captures(config: RunConfig, accelerator: "Accelerator") -> bool:
    return config.cuda_graph != "off" and _obstacle(config, accelerator) is None


def _obstacle(config: RunConfig, accelerator: "Accelerator") -> str | None:
    if accelerator.device.type != "cuda":
        return f"there are none on a {accelerator.device.type}"
    if accelerator.num_processes > 1:
        return "a graph holds the step of a single process"
    if config.model.frozen_layers:
        return "what the layers below --frozen-layers compute comes from the host"
    if config.model.moe_layers and config.dispatch in ("sequential", "megablocks"):
        return f"--dispatch {config.dispatch} waits for the routing of every layer"
    return None
