"""Shell completion of `moe-emergence`: every verb and its flags, as tyro writes it."""

from typing import Annotated, Any, Union

import tyro

from moe_emergence.analysis.settings import AnalyzeConfig
from moe_emergence.command import MARKERS
from moe_emergence.config import RunConfig
from moe_emergence.generate import GenerateConfig
from moe_emergence.presets import get_preset
from moe_emergence.settings import check_known
from moe_emergence.suite.verbs import VERBS as SUITE_VERBS
from moe_emergence.verify import VerifyConfig
from moe_emergence.words import READERS

SHELLS = ("bash", "zsh", "fish")


def print_completion(shell: str, prog: str) -> None:
    """Print what `shell` reads to complete `prog`; `ValueError` for another shell."""
    check_known("completion", shell, SHELLS)
    suite = {name: options for name, (options, _) in SUITE_VERBS.items()}
    verbs = {
        "train": RunConfig,
        "verify": VerifyConfig,
        "suite": _one_of(suite),
        "analyze": AnalyzeConfig,
        "generate": GenerateConfig,
    }
    arguments = ["--tyro-write-completion", shell, "-"]
    tyro.cli(_one_of(verbs), args=arguments, prog=prog, config=MARKERS, registry=READERS)


def _one_of(commands: dict[str, Any]) -> Any:
    """A choice of subcommands by name."""
    defaults = {"train": get_preset("demo")}
    named = tuple(
        Annotated[kind, tyro.conf.subcommand(name, default=defaults[name])]
        if name in defaults
        else Annotated[kind, tyro.conf.subcommand(name)]
        for name, kind in commands.items()
    )
    return Union[named]  # noqa: UP007
