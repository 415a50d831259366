"""The training loop: steps, metrics, evaluation, checkpoints, collapse, interruption.

Letters: N mixture layers, E experts.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from moe_emergence.config import RunConfig
from moe_emergence.data import PreparedData
from moe_emergence.data.loader import StepBatch, make_step_loader
from moe_emergence.domain_fractions import write_domain_fractions
from moe_emergence.errors import RunError
from moe_emergence.interrupt import StopRequest, finishing
from moe_emergence.models.loading import LanguageModel
from moe_emergence.models.lower_layers import freeze_lower_layers
from moe_emergence.moe import RouterNoise
from moe_emergence.run_folder import RunFolder, write_json
from moe_emergence.settings import to_dict
from moe_emergence.training.checkpoint import Checkpoint, save_checkpoint, save_model_folder
from moe_emergence.training.churn import ChurnProbe
from moe_emergence.training.collapse import CollapseDetector
from moe_emergence.training.evaluation import evaluate
from moe_emergence.training.frozen_states import FrozenStates
from moe_emergence.training.graph import make_update
from moe_emergence.training.metrics import StepRecord
from moe_emergence.training.not_finite import where_not_finite
from moe_emergence.training.objective import NextTokenLoss
from moe_emergence.training.operators import use_fast_operators
from moe_emergence.training.processes import largest, on_main
from moe_emergence.training.recorder import Recorder
from moe_emergence.training.schedules import Rates, build_optimizer, learning_rate, noise_std
from moe_emergence.training.sharded_states import load_whole_state, whole_state, whole_weights
from moe_emergence.training.sharding import ShardedLoss, shard
from moe_emergence.training.step import StepStatistics
from moe_emergence.training.update import Update

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """How a run ended: `run_summary.json`."""

    status: str
    """completed, collapsed, interrupted or failed."""
    final_step: int
    best_eval_lm_loss: float | None
    tokens_per_sec: float
    wall_seconds: float


def tokens_per_step(config: RunConfig, num_processes: int) -> int:
    """Tokens of one optimizer step over all processes."""
    rows = config.optim.batch_size * config.optim.grad_accum_steps * num_processes
    return rows * config.data.block_size


class Trainer:
    """Trains one model in one run folder.

    Args:
        config: of the run; `config.model.moe_layers` are those of `model`.
        model: GPT-2, dense or with mixture layers; already holding the checkpoint's weights.
        data: blocks, tokenizer and manifest.
        run: the run folder.
        accelerator: device, precision and processes.
        checkpoint: to continue from.
        stage: which of an experiment's runs it is, for the progress bar.
    """

    def __init__(
        self,
        config: RunConfig,
        model: LanguageModel,
        data: PreparedData,
        run: RunFolder,
        accelerator: Accelerator,
        checkpoint: Checkpoint | None = None,
        stage: str = "",
    ) -> None:
        self.config, self.data, self.run, self.accelerator = config, data, run, accelerator
        self.unwrapped, self.stage = model, stage
        self.tokens_per_step = tokens_per_step(config, accelerator.num_processes)
        self.detector = CollapseDetector(
            config.monitor.collapse_threshold, config.monitor.collapse_checks
        )
        self.churn = ChurnProbe(data.eval_blocks, config.model.moe_layers)
        self.step, self.best = 0, math.inf
        self.train_seconds = self.wall_seconds = 0.0
        first = config.model.frozen_layers
        freeze_lower_layers(model, first)
        sharded = config.fsdp_size > 1
        if sharded:
            shard(model, config, accelerator)
        optimizer = build_optimizer(model, config.optim)
        self.loader = make_step_loader(
            data.train_blocks,
            seed=config.seed,
            batch_size=config.optim.batch_size,
            grad_accum_steps=config.optim.grad_accum_steps,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        use_fast_operators(model, accelerator.device, accelerator.mixed_precision)
        lower = None
        if first:
            cache_dir = Path(config.data.cache_dir)
            lower = FrozenStates(model, first, cache_dir, accelerator.mixed_precision)
        objective = ShardedLoss(model) if sharded else NextTokenLoss(model, first, lower)
        self.model, self.optimizer = accelerator.prepare(objective, optimizer)
        rate = config.model.expert_bias_rate
        update = Update(accelerator, self.model, self.optimizer, config.optim, rate)
        self.update = make_update(update, config)
        self._gradients = update.gradients
        self.stopped_by = 0
        """After `train`: the signal that asked to stop, even if the run was complete by then."""
        self.resumed = checkpoint is not None
        if checkpoint is not None:
            self._restore(checkpoint)
        self._started = time.perf_counter()

    def train(self) -> RunSummary:
        """Train to the last step, or until stopped, and write the summary.

        Raises:
            RunError: for a loss that is not finite or a disk that cannot be written; the summary
                then says "failed", and earlier checkpoints are untouched.
        """
        self.recorder = Recorder(
            self.config,
            self.run,
            domains=list(self.data.train_blocks),
            is_main=self.accelerator.is_main_process,
            stage=self.stage,
            tokens_per_step=self.tokens_per_step,
            first_step=self.step if self.resumed else -1,
            train_seconds=self.train_seconds,
            where=self._where_in_step,
        )
        try:
            with StopRequest() as stop, self.recorder:
                status = self._loop(stop)
                if status != "interrupted":
                    self._save_model(self.run.final_model)
                self.stopped_by = self._agreed(stop.number)
        except KeyboardInterrupt:
            self._write_summary("interrupted")
            raise
        except Exception:
            try:
                self._write_summary("failed")
            except RunError as another:  # of the two, the first says what happened
                logger.warning("%s", another)
            raise
        summary = self._write_summary(status)
        self.accelerator.wait_for_everyone()
        return summary

    def _loop(self, stop: StopRequest) -> str:
        monitor, max_steps = self.config.monitor, self.config.optim.max_steps
        # a run from its beginning, or one that branches off another run's checkpoint
        if self._agreed(not self.resumed or not self.run.best_model.is_dir()):
            self.best = math.inf
            self._evaluate()
        batches = iter(self.loader)
        self.model.train()
        status = "completed"
        self.recorder.start_clock()
        while self.step < max_steps and status == "completed":
            sums = self._train_step(next(batches))
            self.step += 1
            is_last = self.step == max_steps
            stopping = self._agreed(stop.number) > 0 or self.step == self.config.stop_after
            if stopping and not is_last:
                status = "interrupted"
            checking = self.step % monitor.collapse_every == 0 and self.config.model.moe_layers
            evaluating = self.step % monitor.eval_every == 0 or is_last
            saving = self.step % monitor.save_every == 0 or is_last or status == "interrupted"
            if self.step % monitor.log_every == 0 or checking or evaluating or saving:
                self.recorder.flush()
            if checking and self._collapsed(sums) and monitor.collapse_early_stop:
                status, evaluating, saving = "collapsed", True, True
            if evaluating:
                self._evaluate()
            if saving:
                self._save_checkpoint()
            if evaluating or saving:
                self.recorder.start_clock()
        return status

    def _train_step(self, batch: StepBatch) -> StepStatistics:
        optim = self.config.optim
        batch, noise = self._inputs(self.step, batch)
        sums, grad_norm = self.update(batch, noise, Rates.at(self.step, optim))
        std = None if noise is None else noise_std(self.step, optim)
        rate = learning_rate(self.step, optim)
        self.recorder.step(StepRecord(self.step + 1, sums, grad_norm, rate, std))
        return sums

    def _inputs(self, step: int, batch: StepBatch) -> tuple[StepBatch, RouterNoise | None]:
        """What the step's result depends on beside the weights; the generator is set for it."""
        config, device = self.config, self.accelerator.device
        # dropout is a function of (seed, step, process): nothing to save, nothing to drift
        torch.manual_seed(hash((config.seed, step, self.accelerator.process_index)))
        noise = None
        if config.model.moe_layers:
            noise = RouterNoise(noise_std(step, config.optim), config.seed, step)
        return StepBatch(batch.input_ids.to(device), batch.domains.to(device)), noise

    def _where_in_step(self, step: int) -> str:
        """Where the first value of a step (from 1) is that is not finite, by taking it again."""
        batch, noise = self._inputs(step - 1, self.loader.dataset[step - 1])
        self.model.train()
        return where_not_finite(
            self.accelerator, self.unwrapped, lambda: self._gradients(batch, noise)
        )

    def _collapsed(self, sums: StepStatistics) -> bool:
        fractions_NE = sums.expert_counts_NE / sums.expert_counts_NE.sum(dim=1, keepdim=True)
        layers = self.config.model.moe_layers
        by_layer = dict(zip(layers, fractions_NE.tolist(), strict=True))
        collapse = self.detector.check(self.step, by_layer)
        if collapse is not None:
            logger.warning(
                "collapse at step %d: expert %d of layer %d takes %.1f%% of the assignments",
                collapse.step,
                collapse.expert,
                collapse.layer,
                100 * collapse.fraction,
            )
        return collapse is not None

    def _evaluate(self) -> None:
        evaluating = partial(
            evaluate,
            self.accelerator,
            self.model,
            self.data.eval_blocks,
            batch_size=self.config.optim.batch_size,
            max_blocks=self.config.monitor.eval_blocks,
            moe_layers=self.config.model.moe_layers,
            num_experts=self.config.model.num_experts,
            together=self.config.fsdp_size > 1,
        )
        evaluation = evaluating()
        if not math.isfinite(evaluation.lm_loss):
            where = where_not_finite(self.accelerator, self.unwrapped, evaluating)
            raise self.recorder.failure(f"eval/lm_loss is not finite at step {self.step}: {where}")
        churn = self.churn.check(
            self.model, self.accelerator.device, self.step, self.config.optim.max_steps
        )
        self.recorder.evaluated(self.step, evaluation.metrics() | churn)
        if evaluation.domain_fractions and self.accelerator.is_main_process:
            domains = list(evaluation.domain_lm_loss)
            write_domain_fractions(self.run.expert_domain, domains, evaluation.domain_fractions)
        if evaluation.lm_loss < self.best:
            self.best = evaluation.lm_loss
            self._save_model(self.run.best_model)

    def _on_main(self, action: Callable[[], object]) -> None:
        # a folder that is being written is finished, whatever signal comes
        on_main(self.accelerator, finishing()(action))

    def _save_model(self, folder: Path) -> None:
        model, tokenizer = self.unwrapped, self.data.tokenizer
        weights = whole_weights(model)  # of which every process may have a part
        self._on_main(lambda: save_model_folder(folder, model, tokenizer, weights))

    def _save_checkpoint(self) -> None:
        weights = whole_weights(self.unwrapped)
        state = {
            "optimizer": whole_state(self.optimizer),
            "loader": self.loader.state_dict(),
            "churn": self.churn.state_dict(),
        }
        progress = {
            "best_eval_lm_loss": self.best,
            "collapse_streaks": self.detector.state_dict(),
            "train_seconds": self.recorder.train_seconds,
            "wall_seconds": self.wall_seconds + time.perf_counter() - self._started,
            "tokens_per_step": self.tokens_per_step,
        }
        self._on_main(
            lambda: save_checkpoint(
                self.run,
                self.step,
                self.unwrapped,
                self.data.tokenizer,
                weights,
                trainer_state=state,
                progress=progress,
                config=to_dict(self.config),
                data_manifest=self.data.manifest,
                keep_last_k=self.config.monitor.keep_last_k,
            )
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.step = checkpoint.step
        load_whole_state(self.optimizer, checkpoint.trainer_state["optimizer"])
        self.loader.load_state_dict(checkpoint.trainer_state["loader"])
        self.churn.load_state_dict(checkpoint.trainer_state["churn"])
        self.best = checkpoint.progress["best_eval_lm_loss"]
        self.detector.load_state_dict(checkpoint.progress["collapse_streaks"])
        self.train_seconds = checkpoint.progress["train_seconds"]
        self.wall_seconds = checkpoint.progress["wall_seconds"]

    def _agreed(self, number: int) -> int:
        return largest(self.accelerator, number)

    def _write_summary(self, status: str) -> RunSummary:
        summary = RunSummary(
            status,
            self.step,
            self.best if math.isfinite(self.best) else None,
            self.step * self.tokens_per_step / max(self.recorder.train_seconds, 1e-9),
            self.wall_seconds + time.perf_counter() - self._started,
        )
        if self.accelerator.is_main_process:
            write_json(self.run.summary, vars(summary))
        return summary
