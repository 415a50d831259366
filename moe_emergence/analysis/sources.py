"""What `analyze` is given, as a model with its tokenizer: a run, a folder, a model on the hub."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from moe_emergence.analysis.loading import Placement, load_model
from moe_emergence.analysis.settings import AnalyzeConfig
from moe_emergence.config import DataConfig, RunConfig, TokenClass
from moe_emergence.config.data import token_classes
from moe_emergence.data import PreparedData, prepare_data
from moe_emergence.data.manifest import entry
from moe_emergence.run_folder import TRAINER_ROUTING, RunFolder, read_config, read_json
from moe_emergence.settings import check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FILE = "config.json"
LONGEST_BLOCK = 512


@dataclass(frozen=True)
class Source:
    """A model to analyse, and the run it comes from where there is one."""

    name: str
    place: str
    """Folder or hub id of the model."""
    kind: Literal["run", "model"]
    model: Any = field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    run: RunFolder | None = None
    config: RunConfig | None = field(default=None, repr=False)
    step: int | None = None
    metrics: Path | None = None
    """What was logged while it trained, see `training_tables`."""


def open_source(place: str, name: str, placement: Placement) -> Source:
    """Load what `place` names.

    A run folder gives its `final-model`, else its `best-model`, else its newest checkpoint; the
    output folder of a Trainer with `MoERoutingCallback` its own model, else its newest checkpoint.

    Raises:
        ValueError: naming SOURCE, when nothing can be loaded from it.
    """
    root = Path(place)
    run = RunFolder(root)
    if run.config.is_file() and (run.metrics.is_file() or run.checkpoints.is_dir()):
        folder, step = _model_of(run)
        config = read_config(run.config)
        model, tokenizer = load_model(str(folder), placement)
        return Source(name, str(folder), "run", model, tokenizer, run, config, step, run.metrics)
    if (root / TRAINER_ROUTING).is_file():
        folder, step = _model_of_trainer(root)
        model, tokenizer = load_model(str(folder), placement)
        metrics = root / TRAINER_ROUTING
        return Source(name, str(folder), "model", model, tokenizer, step=step, metrics=metrics)
    if root.exists() and not (root / MODEL_FILE).is_file():
        raise ValueError(
            f"SOURCE {place}: neither a run folder nor a model folder (no {MODEL_FILE} in it)"
        )
    model, tokenizer = load_model(place, placement)
    return Source(name, place, "model", model, tokenizer)


@dataclass(frozen=True)
class TextChoice:
    """Which text to analyse on; fields as the flags of the same names say."""

    data: str | None = None
    domains: tuple[str, ...] = ()
    domain_field: str | None = None
    text_field: str = "text"
    token_types: tuple[str, ...] = ()
    block_size: int | None = None
    cache_dir: str = ".cache"


def text_choice(config: AnalyzeConfig) -> TextChoice:
    """The text that the flags of `analyze` choose."""
    return TextChoice(**{f.name: getattr(config, f.name) for f in fields(TextChoice)})


@dataclass(frozen=True)
class Text:
    """Evaluation blocks (R, L) of each domain, how its tokens are told apart, what it all is."""

    blocks: dict[str, torch.Tensor]
    classes: dict[str, TokenClass]
    description: str


def read_text(source: Source, choice: TextChoice) -> Text:
    """The text to analyse on.

    Without `data`, or where that is its own, a run is analysed on its evaluation documents, a model
    on the embedded text; else on evaluation blocks of that source, as `--data` of `train` takes it.
    A model that comes without a run reads the text through its own tokenizer.

    Raises:
        ValueError: naming the flag, when the text cannot be read, is too small, or has no such
            domain.
    """
    own, longest = source.config, sees(source.model)
    check(
        not (choice.block_size and longest) or choice.block_size <= longest,
        "--block-size",
        choice.block_size,
        f"{source.name} sees {longest} tokens; give at most that",
    )
    if own is not None and (choice.data is None or same_text(choice.data, own.data.data)):
        size = choice.block_size or own.data.block_size
        classes = token_classes(own.data.token_types) | token_classes(choice.token_types)
        prepared = prepare_data(
            replace(
                own.data,
                cache_dir=choice.cache_dir,
                block_size=size,
                token_types=tuple(f"{domain}={name}" for domain, name in classes.items()),
            ),
            own.seed,
        )
        _check_same(source, prepared, blocks=size == own.data.block_size)
        return _chosen(prepared, choice, f"evaluation blocks of the run ({own.data.data})")
    most = min(LONGEST_BLOCK, longest or LONGEST_BLOCK)
    config = DataConfig(
        data=choice.data or "embedded",
        domains=choice.domains,
        domain_field=choice.domain_field,
        text_field=choice.text_field,
        token_types=choice.token_types,
        size_mb=own.data.size_mb if own else 2.0,
        block_size=choice.block_size or (own.data.block_size if own else most),
        tokenizer=source.place,
        cache_dir=choice.cache_dir,
    )
    return _chosen(prepare_data(config, seed=0), choice, f"evaluation blocks of {config.data}")


def _chosen(prepared: PreparedData, choice: TextChoice, description: str) -> Text:
    blocks = prepared.eval_blocks
    names = choice.domains or tuple(blocks)
    unknown = [name for name in names if name not in blocks]
    check(
        not unknown,
        "--domains",
        " ".join(unknown),
        f"the text has {', '.join(blocks)}; choose from these",
    )
    classes = prepared.token_classes
    return Text({name: blocks[name] for name in names}, {d: classes[d] for d in names}, description)


def same_text(one: str, other: str) -> bool:
    """Whether two values of --data are the same source."""
    return one == other or Path(one).resolve() == Path(other).resolve()


def _check_same(source: Source, prepared: PreparedData, *, blocks: bool) -> None:
    """The tokenizer, and with `blocks` the evaluation blocks, are those of the run."""
    assert source.run is not None
    places: list[tuple[str, ...]] = [("tokenizer", "sha256")]
    domains = prepared.manifest["domains"] if blocks else ()
    places += [("domains", domain, "eval", "sha256") for domain in domains]
    then = read_json(source.run.data_manifest)
    unlike = [".".join(p) for p in places if entry(then, p) != entry(prepared.manifest, p)]
    if unlike:
        raise ValueError(
            f"SOURCE {source.run.root}: its data cannot be made again ({unlike[0]} differs); "
            "name another text with --data"
        )


def sees(model: Any) -> int | None:
    """Tokens that the model can read at once, if its configuration says so."""
    names = ("n_positions", "max_position_embeddings")
    found = (getattr(model.config, name, None) for name in names)
    return next((int(one) for one in found if one), None)


def _model_of_trainer(root: Path) -> tuple[Path, int | None]:
    if (root / MODEL_FILE).is_file():
        return root, None
    names = (path.name.removeprefix("checkpoint-") for path in root.glob("checkpoint-*"))
    steps = [int(name) for name in names if name.isdigit()]
    if not steps:
        raise ValueError(
            f"SOURCE {root}: neither a model nor a checkpoint in it; save one with "
            "trainer.save_model()"
        )
    return root / f"checkpoint-{max(steps)}", max(steps)


def _model_of(run: RunFolder) -> tuple[Path, int | None]:
    steps = run.checkpoint_steps()
    for folder in (run.final_model, run.best_model):
        if (folder / MODEL_FILE).is_file():
            last = read_json(run.summary).get("final_step") if run.summary.is_file() else None
            return folder, last if folder == run.final_model else None
    if steps:
        return run.checkpoint(steps[-1]), steps[-1]
    raise ValueError(
        f"SOURCE {run.root}: the run has no model any more (suites keep none without --keep-models)"
    )
