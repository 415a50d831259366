"""`MoERoutingCallback`: how a mixture routes while any transformers or TRL `Trainer` trains it.

Letters: N mixture layers, B probe sequences, L tokens each.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_emergence.analysis.meter import LayerLoad, RoutingMeter
from moe_emergence.analysis.probe import RoutingProbe
from moe_emergence.run_folder import TRAINER_ROUTING, MetricsWriter
from moe_emergence.settings import check
from moe_emergence.training.collapse import CollapseDetector
from moe_emergence.training.metrics import router_metrics

logger = logging.getLogger(__name__)


class MoERoutingCallback(TrainerCallback):
    """Adds load, entropy, churn and dead experts of every mixture layer to the Trainer's logs.

    `trainer.add_callback(MoERoutingCallback(trainer))`. What the Trainer's trackers get, and what
    is in `routing.jsonl` in its output folder, is in docs/transformers.md. Counts stay on the
    device until the Trainer logs; they are of all micro-batches and processes since its last log.

    Args:
        trainer: of a mixture whose routers can be read.
        churn_every: steps between passes of the probe; 0 for none.
        probe: token ids (B, L) without padding for churn; without it the first training batch of
            each process, 8 sequences of 128 tokens at most.
        collapse_threshold: share of a layer's assignments above which one expert counts as
            collapsed; without it halfway between an even share and the largest possible, 1/K.
        collapse_checks: logs in a row above the threshold that make a collapse; it is warned of
            once.

    Raises:
        ValueError: when the model's routers cannot be read, and, as training begins, where one
            process trains on several GPUs.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        churn_every: int = 100,
        probe: Tensor | None = None,
        collapse_threshold: float | None = None,
        collapse_checks: int = 3,
    ) -> None:
        check(churn_every >= 0, "churn_every", churn_every, "give 0 (no churn) or more steps")
        check(collapse_checks >= 1, "collapse_checks", collapse_checks, "give at least 1")
        check(
            collapse_threshold is None or 0 < collapse_threshold < 1,
            "collapse_threshold",
            collapse_threshold,
            "give a share between 0 and 1",
        )
        check(
            probe is None or probe.ndim == 2,
            "probe",
            "" if probe is None else f"of shape {tuple(probe.shape)}",
            "give token ids (sequences, tokens)",
        )
        self.trainer = trainer
        self.churn_every = churn_every
        self.collapse_threshold, self.collapse_checks = collapse_threshold, collapse_checks
        self._text = probe
        self._meter, self._probe = RoutingMeter(self._model), RoutingProbe(probe)
        self._changes: tuple[list[int], Tensor] | None = None
        self._detectors: dict[int, CollapseDetector] = {}
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start counting, and the file, from the step that training goes on from."""
        check(
            args.n_gpu <= 1, "n_gpu", args.n_gpu, "start one process for each GPU, as by torchrun"
        )
        # the trackers' callbacks come first in the list, and would not see what is added to a log
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        self._remove_hooks()
        self._meter, self._probe = RoutingMeter(self._model), RoutingProbe(self._text)
        self._meter.start()
        if self.churn_every:
            self._probe.watch(self._model)
        self._changes, self._detectors, self._warned = None, {}, False
        if state.is_world_process_zero:
            self._writer(args).keep_up_to(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Route the probe every `churn_every` steps."""
        if self.churn_every and state.global_step % self.churn_every == 0:
            self._changes = self._probe.check(self._model)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Add what was counted to a log of training; logs of an evaluation stay as they are."""
        if logs is None or not {"loss", "train_loss"} & logs.keys():
            return
        loads = self._meter.take(self._total)
        if not loads:
            return
        shown = {name: value for load in loads for name, value in _shown(load).items()}
        if self._changes is not None:
            layers, changed_N2 = self._changes
            changed = zip(layers, self._total(changed_N2).tolist(), strict=True)
            shown |= {f"eval/layer_{n}_churn": some / max(all_, 1) for n, (some, all_) in changed}
            self._changes = None
        logs.update(shown)
        state.log_history[-1].update(shown)
        if state.is_world_process_zero:
            row: dict[str, Any] = {"step": state.global_step}
            for load in loads:
                counts = torch.tensor([load.counts])
                row |= router_metrics([load.layer], counts, torch.tensor([load.entropy]))
            self._writer(args).append([row | shown])
            self._check_collapse(state.global_step, loads)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take all hooks away."""
        self._remove_hooks()

    @property
    def _model(self) -> nn.Module:
        model = self.trainer.model
        assert isinstance(model, nn.Module)
        return model

    def _remove_hooks(self) -> None:
        self._meter.stop()
        self._probe.stop()

    def _total(self, sums: Tensor) -> Tensor:
        return self.trainer.accelerator.reduce(sums, reduction="sum")

    def _writer(self, args: TrainingArguments) -> MetricsWriter:
        return MetricsWriter(Path(str(args.output_dir)) / TRAINER_ROUTING)

    def _check_collapse(self, step: int, loads: list[LayerLoad]) -> None:
        for load in loads:
            highest = self.collapse_threshold or (1 / len(load.counts) + 1 / load.top_k) / 2
            fresh = CollapseDetector(highest, self.collapse_checks)
            detector = self._detectors.setdefault(load.layer, fresh)
            shares = [count / max(sum(load.counts), 1) for count in load.counts]
            collapse = detector.check(step, {load.layer: shares})
            if collapse is not None and not self._warned:
                self._warned = True
                logger.warning(
                    "routing collapse at step %d: expert %d of layer %d has had more than %.0f%% "
                    "of the layer's assignments in %d logs in a row, now %.0f%%: raise the "
                    "coefficient of the balance loss, or lower the learning rate of the routers",
                    step, collapse.expert, collapse.layer, 100 * highest, self.collapse_checks,
                    100 * collapse.fraction,
                )  # fmt: skip


def _shown(load: LayerLoad) -> dict[str, float]:
    """What trackers get of a layer: as many numbers whatever the number of experts."""
    assignments, experts = max(sum(load.counts), 1), len(load.counts)
    layer = f"router/layer_{load.layer}"
    return {
        f"{layer}_max_frac": max(load.counts) / assignments,
        f"{layer}_min_frac": min(load.counts) / assignments,
        f"{layer}_dead_experts": load.counts.count(0),
        f"{layer}_normalised_entropy": load.entropy / math.log(experts) if experts > 1 else 0.0,
    }
