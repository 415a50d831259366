"""From a configuration to finished runs: base, mixture and dense comparison, each a run folder.

A base made from scratch is pretrained in RUN/dense-base; the run itself is in RUN; with
`compare_dense` the same base, trained on densely, is in RUN/dense. Each can be resumed; what is
complete is not done again.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from transformers import GPT2LMHeadModel

from moe_emergence.config import RunConfig, check, check_layers_exist, to_dict
from moe_emergence.data import PreparedData, prepare_data
from moe_emergence.models import MoEGPT2LMHeadModel, upcycle
from moe_emergence.models.loading import (
    LanguageModel,
    load_dense_model,
    load_trained_model,
    new_dense_model,
)
from moe_emergence.moe import get_dispatcher
from moe_emergence.run_folder import RunFolder, read_json, write_json
from moe_emergence.training.checkpoint import Checkpoint
from moe_emergence.training.environment import describe_environment, make_accelerator
from moe_emergence.training.evaluation import Evaluation
from moe_emergence.training.resume import check_same_data_as, check_same_run, find_checkpoint
from moe_emergence.training.tracking import check_tracker
from moe_emergence.training.trainer import RunSummary, Trainer, tokens_per_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One run of an experiment."""

    role: str
    """base, moe or dense."""
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
    evaluation: Evaluation | None
    """The run's last evaluation, if it was made in this process."""
    stopped_by_signal: bool
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
    with accelerator.main_process_first():
        data = prepare_data(config.data, config.seed)
    check_same_data_as(run, checkpoint, data.manifest)
    begun: list[Stage] = []
    evaluation = None
    status = "completed"
    for stage in stages(config, run):
        begun.append(stage)
        is_run = stage.run == run
        found = checkpoint if is_run else find_checkpoint("auto", stage.run)
        summary, evaluated = _run_stage(stage, data, accelerator, found)
        evaluation = evaluated if is_run else evaluation
        status = summary.status
        if status != "completed":
            if not run.summary.exists() and accelerator.is_main_process:
                write_json(run.summary, vars(replace(summary, final_step=0)))
            break
    last = begun[-1].config
    stopped = status == "interrupted" and summary.final_step != last.stop_after
    return ExperimentResult(status, tuple(begun), evaluation, stopped, accelerator.is_main_process)


def stages(config: RunConfig, run: RunFolder) -> list[Stage]:
    """The runs an experiment consists of, in order."""
    optim = replace(config.optim, compare_dense=False, pretrain_steps=0)
    dense = replace(
        config, stop_after=None, model=replace(config.model, moe_layers=()), optim=optim
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
        base = replace(dense, run_name=name, seed=config.seed + 1, optim=pretraining)
        found.append(Stage("base", base, base_run, start))
        start = _loaded_model(config, str(base_run.final_model))
    elif config.model.base != "scratch":
        start = _loaded_model(config, config.model.base)
    role = "moe" if is_moe else "dense"
    found.append(Stage(role, config, run, _upcycled(config, start) if is_moe else start))
    if config.optim.compare_dense and is_moe:
        compared = replace(dense, run_name=f"{config.run_name} dense")
        found.append(Stage("dense", compared, RunFolder(run.root / "dense"), start))
    return found


def _new_model(config: RunConfig) -> Callable[[PreparedData], GPT2LMHeadModel]:
    return lambda data: new_dense_model(
        config.model, data.tokenizer, config.data.block_size, config.seed
    )


def _loaded_model(config: RunConfig, base: str) -> Callable[[PreparedData], GPT2LMHeadModel]:
    model = replace(config.model, base=base)
    return lambda data: load_dense_model(
        model, data.tokenizer, config.data.block_size, config.data.cache_dir
    )


def _upcycled(
    config: RunConfig, start: Callable[[PreparedData], GPT2LMHeadModel]
) -> Callable[[PreparedData], MoEGPT2LMHeadModel]:
    model, optim = config.model, config.optim
    return lambda data: upcycle(
        start(data),
        model.moe_layers,
        model.num_experts,
        model.top_k,
        noise=model.upcycle_noise,
        seed=config.seed,
        router=model.router,
        use_expert_bias=model.expert_bias_rate > 0,
        lb_coef=optim.lb_coef,
        z_coef=optim.z_coef,
    )


def _check_resumable(config: RunConfig, run: RunFolder, checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        check_same_run(checkpoint.config, config)
    elif run.config.exists():
        check_same_run(read_json(run.config), config)
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
        write_json(run.config, to_dict(config))
        write_json(run.environment, describe_environment(accelerator))
        write_json(run.data_manifest, data.manifest)
    accelerator.wait_for_everyone()


def _run_stage(
    stage: Stage, data: PreparedData, accelerator: Accelerator, checkpoint: Checkpoint | None
) -> tuple[RunSummary, Evaluation | None]:
    run, config = stage.run, stage.config
    if checkpoint is not None:
        now = tokens_per_step(config, accelerator.num_processes)
        then = checkpoint.progress["tokens_per_step"]
        check_same_run(checkpoint.config, config, (then, now))
    finished = _finished(run)
    if finished is not None:
        logger.info("%s is %s: nothing to do", run.root, finished.status)
        return finished, None
    model = stage.make_model(data) if checkpoint is None else load_trained_model(checkpoint.path)
    _start_folder(run, config, data, accelerator)
    if isinstance(model, MoEGPT2LMHeadModel):
        model.set_dispatch(config.dispatch)
    check_layers_exist(config.model.moe_layers, model.config.n_layer)
    trainer = Trainer(config, model, data, run, accelerator, checkpoint)
    summary = trainer.train()
    accelerator.free_memory()
    return summary, trainer.last_evaluation


def _finished(run: RunFolder) -> RunSummary | None:
    """The summary of a run that has ended for good."""
    if not run.summary.exists():
        return None
    summary = RunSummary(**read_json(run.summary))
    return summary if summary.status in ("completed", "collapsed") else None
