"""From a configuration to finished runs: base, mixture and comparisons, each a run folder.

A base made from scratch is pretrained in RUN/dense-base; the run itself is in RUN; with
`compare_dense` the same base, trained on densely, is in RUN/dense, and with `compare_null` the
mixture with a random router is in RUN/null. Each can be resumed; what is complete is not done
again.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from moe_emergence.config import RunConfig, check_layers_exist
from moe_emergence.data import PreparedData, check_same_data, prepare_data
from moe_emergence.errors import RunError
from moe_emergence.hub_access import reason
from moe_emergence.models import (
    MixtureModel,
)
from moe_emergence.models.loading import (
    load_trained_model,
)
from moe_emergence.moe import get_dispatcher
from moe_emergence.run_folder import STAGES, RunFolder, read_config, read_json, write_json
from moe_emergence.run_lock import locked
from moe_emergence.settings import check, from_dict, to_dict
from moe_emergence.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    delete_old_checkpoints,
    recover_folders,
)
from moe_emergence.training.environment import describe_environment, make_accelerator
from moe_emergence.training.graph import check_can_capture, dispatch_of
from moe_emergence.training.memory import keep_freed_memory
from moe_emergence.training.processes import PATIENCE_FOR_DATA, check_alike, lost, on_main
from moe_emergence.training.resume import check_same_data_as, check_same_run, find_checkpoint
from moe_emergence.training.sharding import check_can_shard
from moe_emergence.training.stages import Stage, stages
from moe_emergence.training.tracking import check_tracker
from moe_emergence.training.trainer import RunSummary, Trainer, tokens_per_step
from moe_emergence.training.tuning import check_can_tune, measured

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExperimentResult:
    """What came of an experiment; the numbers are in the run folders."""

    status: str
    """Of the last stage that ran: completed, collapsed or interrupted."""
    stages: tuple[Stage, ...]
    """Those that have begun, in order; the run itself is the one in the experiment's folder."""
    stopped_by_signal: int
    """The number of the signal that stopped it, 0 if none did."""
    is_main_process: bool


def run_experiment(config: RunConfig) -> ExperimentResult:
    """Do what the configuration says, resuming what `config.resume` allows.

    Raises:
        ValueError: for settings, data, models or checkpoints that cannot be used.
        RunError: for a failure while running.
    """
    get_dispatcher(config.dispatch)
    check_tracker(config.monitor.track)
    run = RunFolder(Path(config.output_dir) / config.run_name)
    accelerator = make_accelerator(config)
    try:
        with ExitStack() as stack:
            lock = locked(run.root, f"--run-name {config.run_name}")
            on_main(accelerator, lambda: stack.enter_context(lock))
            return _run_stages(config, run, accelerator)
    except Exception as error:
        if not lost(error):
            raise
        raise RunError(
            f"another of the {accelerator.num_processes} processes ended or does not answer "
            f"({str(error).splitlines()[0]}); what was saved stays: go on with --resume auto"
        ) from error


def _run_stages(config: RunConfig, run: RunFolder, accelerator: Accelerator) -> ExperimentResult:
    checkpoint = find_checkpoint(config.resume, run)
    _check_resumable(config, run, checkpoint)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    check_can_tune(config, accelerator)
    check_can_capture(config, accelerator)
    check_can_shard(config, accelerator)
    if accelerator.is_main_process:
        logger.info("%s: preparing the text of --data %s", config.run_name, config.data.data)
    data = _prepare(config, accelerator)
    check_same_data_as(run, checkpoint, data.manifest)
    begun: list[Stage] = []
    planned = [s for s in stages(config, run) if _is_needed(s, checkpoint, config)]
    status, stopped = "completed", 0
    for number, stage in enumerate(planned, start=1):
        begun.append(stage)
        place = f"{number} of {len(planned)}" if len(planned) > 1 else ""
        if place and accelerator.is_main_process:
            steps = stage.config.optim.max_steps
            logger.info("stage %s: %s, %d steps", place, STAGES[stage.role], steps)
        found = checkpoint if stage.run == run else find_checkpoint("auto", stage.run)
        try:
            summary, stopped = _run_stage(stage, place, data, accelerator, found)
        except KeyboardInterrupt:
            _write_first_summary(run, accelerator, "interrupted")
            raise
        status = summary.status
        if stopped and status == "completed" and stage is not planned[-1]:
            status = "interrupted"
        if status != "completed":
            _write_first_summary(run, accelerator, status)
            break
    stopped = stopped if status == "interrupted" else 0
    return ExperimentResult(status, tuple(begun), stopped, accelerator.is_main_process)


def _check_resumable(config: RunConfig, run: RunFolder, checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        check_same_run(read_config(checkpoint.path / MANIFEST, checkpoint.config), config)
    elif run.config.exists():
        check_same_run(read_config(run.config), config)
    done = checkpoint.step if checkpoint else 0
    check(
        config.stop_after is None or config.stop_after > done,
        "--stop-after",
        config.stop_after,
        f"the run to resume is already at step {done}; give a later one",
    )


def _start_folder(
    run: RunFolder,
    config: RunConfig,
    data: PreparedData,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
) -> None:
    def start() -> None:
        if checkpoint is not None and checkpoint.path.parent == run.checkpoints:
            delete_old_checkpoints(run, checkpoint.step, config.monitor.keep_last_k)
        if not run.config.exists():
            write_json(run.config, to_dict(config))
        write_json(run.environment, describe_environment(accelerator))
        write_json(run.data_manifest, data.manifest)

    on_main(accelerator, start)


def _run_stage(
    stage: Stage,
    place: str,
    data: PreparedData,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
) -> tuple[RunSummary, int]:
    """How the stage ended, and the signal that asked to stop while it ran, if any did."""
    run, config = stage.run, stage.config
    if checkpoint is not None:
        now = tokens_per_step(config, accelerator.num_processes)
        then = checkpoint.progress["tokens_per_step"]
        saved = read_config(checkpoint.path / MANIFEST, checkpoint.config)
        check_same_run(saved, config, (then, now))
    if accelerator.is_main_process:
        recover_folders(run)
    finished = _finished(run)
    step = None if checkpoint is None else checkpoint.step
    check_alike(accelerator, f"--output-dir {config.output_dir}", (step, finished))
    if finished is not None:
        logger.info("%s is %s: nothing to do", run.root, finished.status)
        return finished, 0
    model = stage.make_model(data) if checkpoint is None else load_trained_model(checkpoint.path)
    _start_folder(run, config, data, accelerator, checkpoint)
    if isinstance(model, MixtureModel):
        dispatch = dispatch_of(config, accelerator)
        model.set_dispatch(dispatch, measured(config, model, accelerator))
    check_layers_exist(config.model, model.config.num_hidden_layers)
    trainer = Trainer(config, model, data, run, accelerator, checkpoint, place)
    summary = trainer.train()
    accelerator.free_memory()
    return summary, trainer.stopped_by


def _write_first_summary(run: RunFolder, accelerator: Accelerator, status: str) -> None:
    """How an experiment ended before its own run began."""
    if accelerator.is_main_process and run.root.is_dir() and not run.summary.exists():
        write_json(run.summary, vars(RunSummary(status, 0, None, 0.0, 0.0)))


def _finished(run: RunFolder) -> RunSummary | None:
    """The summary of a run that has ended for good."""
    if not run.summary.exists():
        return None
    values = read_json(run.summary)
    try:
        summary = from_dict(RunSummary, values)
    except ValueError as error:
        raise ValueError(f"{run.summary}: not the summary of a run ({error}); delete it") from error
    return summary if summary.status in ("completed", "collapsed") else None


def _is_needed(stage: Stage, checkpoint: Checkpoint | None, config: RunConfig) -> bool:
    """A run that goes on from a checkpoint needs its base for the comparisons only."""
    compares = config.optim.compare_dense or config.optim.compare_null
    return stage.role != "base" or checkpoint is None or compares


def _prepare(config: RunConfig, accelerator: Accelerator) -> PreparedData:
    found: list[PreparedData] = []

    def prepare() -> None:
        found.append(prepare_data(config.data, config.seed))

    try:
        on_main(accelerator, prepare, PATIENCE_FOR_DATA)
        if not found:
            prepare()
    except OSError as error:
        raise RunError(
            f"--cache-dir {config.data.cache_dir}: cannot be used ({reason(error)}); give a folder "
            f"that can be written, on a disk with some space"
        ) from error
    [data] = found
    # a hub revision may move, and machines may hold different files under one path
    for manifest in gather_object([data.manifest]):
        check_same_data(manifest, data.manifest)
    return data
