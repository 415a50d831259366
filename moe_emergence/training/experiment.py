"""From a configuration to finished runs: base, mixture and comparisons, each a run folder.

A base made from scratch is pretrained in RUN/dense-base; the run itself is in RUN; with
`compare_dense` the same base, trained on densely, is in RUN/dense, and with `compare_null` the
mixture with a random router is in RUN/null. Each can be resumed; what is complete is not done
again.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from moe_emergence.config import RunConfig, check_layers_exist
from moe_emergence.data import PreparedData, check_same_data, prepare_data
from moe_emergence.data.samples import text_to_cluster
from moe_emergence.errors import RunError
from moe_emergence.hub_access import reason
from moe_emergence.models import (
    MixtureModel,
    start_routers_at_clusters,
    start_routers_at_domains,
    upcycle,
)
from moe_emergence.models.loading import (
    LanguageModel,
    load_dense_model,
    load_trained_model,
    new_dense_model,
)
from moe_emergence.moe import get_dispatcher
from moe_emergence.run_folder import STAGES, RunFolder, read_json, write_json
from moe_emergence.settings import check, from_dict, to_dict
from moe_emergence.training.checkpoint import Checkpoint, recover_folders
from moe_emergence.training.environment import describe_environment, make_accelerator
from moe_emergence.training.graph import check_can_capture, dispatch_of
from moe_emergence.training.memory import keep_freed_memory
from moe_emergence.training.resume import check_same_data_as, check_same_run, find_checkpoint
from moe_emergence.training.sharding import check_can_shard
from moe_emergence.training.tracking import check_tracker
from moe_emergence.training.trainer import RunSummary, Trainer, tokens_per_step
from moe_emergence.training.tuning import check_can_tune, measured

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One run of an experiment."""

    role: str
    """base, moe, dense or null."""
    config: RunConfig
    run: RunFolder
    make_model: Callable[[PreparedData], LanguageModel]
    """The model at step 0."""


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
    checkpoint = find_checkpoint(config.resume, run)
    _check_resumable(config, run, checkpoint)
    accelerator = make_accelerator(config)
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


def stages(config: RunConfig, run: RunFolder) -> list[Stage]:
    """The runs an experiment consists of, in order."""
    alone = replace(config.optim, compare_dense=False, compare_null=False)
    optim = replace(alone, pretrain_steps=0)
    dense = replace(
        config, stop_after=None, ep_size=1, model=replace(config.model, moe_layers=()), optim=optim
    )
    is_moe = bool(config.model.moe_layers)
    base_run = RunFolder(run.root / "dense-base")
    pretrained = config.model.base == "scratch" and is_moe
    start = _new_model(config)
    found = []
    if pretrained:
        pretraining = replace(
            optim,
            max_steps=config.optim.pretrain_steps,
            learning_rate=config.optim.pretrain_learning_rate,
        )
        # another order of the data than the runs that go on from here
        name = f"{config.run_name} base"
        base = replace(
            dense,
            run_name=name,
            seed=(config.seed + 1) % 2**31,
            model=replace(dense.model, frozen_layers=0),
            optim=pretraining,
        )
        found.append(Stage("base", base, base_run, start))
        start = _loaded_model(config, str(base_run.final_model))
    elif config.model.base != "scratch":
        start = _loaded_model(config, config.model.base)
    role = "moe" if is_moe else "dense"
    found.append(Stage(role, config, run, _upcycled(config, start) if is_moe else start))
    if config.optim.compare_dense and is_moe:
        compared = replace(dense, run_name=f"{config.run_name} dense")
        found.append(Stage("dense", compared, RunFolder(run.root / "dense"), start))
    random = replace(config.model, router="frozen", router_init="random")
    if config.optim.compare_null and is_moe and random != config.model:
        null = replace(config, run_name=f"{config.run_name} null", stop_after=None, model=random)
        null = replace(null, optim=alone)
        found.append(Stage("null", null, RunFolder(run.root / "null"), _upcycled(null, start)))
    return found


def _new_model(config: RunConfig) -> Callable[[PreparedData], LanguageModel]:
    return lambda data: new_dense_model(
        config.model, data.tokenizer, config.data.block_size, config.seed
    )


def _loaded_model(config: RunConfig, base: str) -> Callable[[PreparedData], LanguageModel]:
    model = replace(config.model, base=base)
    return lambda data: load_dense_model(
        model, data.tokenizer, config.data.block_size, config.data.cache_dir
    )


def _upcycled(
    config: RunConfig, start: Callable[[PreparedData], LanguageModel]
) -> Callable[[PreparedData], LanguageModel]:
    model, optim = config.model, config.optim

    def make(data: PreparedData) -> LanguageModel:
        mixture = upcycle(
            start(data),
            model.moe_layers,
            model.num_experts,
            model.top_k,
            noise=model.upcycle_noise,
            seed=config.seed,
            router=model.router,
            top1_weight=model.top1_weight,
            use_expert_bias=model.expert_bias_rate > 0,
            expert_bias_rate=model.expert_bias_rate,
            pool_size=model.pool_size,
            document_end=data.tokenizer.eos_token_id,
            lb_coef=optim.lb_coef,
            z_coef=optim.z_coef,
            variance_coef=optim.variance_coef,
        )
        text = text_to_cluster(data.train_blocks, config.seed)
        if model.router_init == "clusters":
            start_routers_at_clusters(mixture, chain(*text.values()), seed=config.seed)
        elif model.router_init == "domains":
            start_routers_at_domains(mixture, text, seed=config.seed)
        return mixture

    return make


def _check_resumable(config: RunConfig, run: RunFolder, checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        check_same_run(from_dict(RunConfig, checkpoint.config), config)
    elif run.config.exists():
        check_same_run(from_dict(RunConfig, read_json(run.config)), config)
    done = checkpoint.step if checkpoint else 0
    check(
        config.stop_after is None or config.stop_after > done,
        "--stop-after",
        config.stop_after,
        f"the run to resume is already at step {done}; give a later one",
    )


def _start_folder(
    run: RunFolder, config: RunConfig, data: PreparedData, accelerator: Accelerator
) -> None:
    if accelerator.is_main_process:
        recover_folders(run)
        if not run.config.exists():
            write_json(run.config, to_dict(config))
        write_json(run.environment, describe_environment(accelerator))
        write_json(run.data_manifest, data.manifest)
    accelerator.wait_for_everyone()


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
        check_same_run(from_dict(RunConfig, checkpoint.config), config, (then, now))
    finished = _finished(run)
    if finished is not None:
        logger.info("%s is %s: nothing to do", run.root, finished.status)
        return finished, 0
    model = stage.make_model(data) if checkpoint is None else load_trained_model(checkpoint.path)
    _start_folder(run, config, data, accelerator)
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
        summary = RunSummary(**values)
    except TypeError as error:
        raise ValueError(f"{run.summary}: not the summary of a run ({error}); delete it") from error
    return summary if summary.status in ("completed", "collapsed") else None


def _is_needed(stage: Stage, checkpoint: Checkpoint | None, config: RunConfig) -> bool:
    """A run that goes on from a checkpoint needs its base for the comparisons only."""
    compares = config.optim.compare_dense or config.optim.compare_null
    return stage.role != "base" or checkpoint is None or compares


def _prepare(config: RunConfig, accelerator: Accelerator) -> PreparedData:
    try:
        with accelerator.main_process_first():
            data = prepare_data(config.data, config.seed)
    except OSError as error:
        raise RunError(
            f"--cache-dir {config.data.cache_dir}: cannot be used ({reason(error)}); give a folder "
            f"that can be written, on a disk with some space"
        ) from error
    # a hub revision may move, and machines may hold different files under one path
    for manifest in gather_object([data.manifest]):
        check_same_data(manifest, data.manifest)
    return data
