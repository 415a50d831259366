"""The flags of a configuration, and what to say to one that it does not have."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from moe_emergence.settings import did_you_mean
from moe_emergence.words import NO, YES

ELSEWHERE = {
    "--bf16": "--precision",
    "--dataset-name": "--data",
    "--eval-steps": "--eval-every",
    "--fp16": "--precision",
    "--gradient-accumulation-steps": "--grad-accum-steps",
    "--logging-steps": "--log-every",
    "--lr": "--learning-rate",
    "--max-length": "--block-size",
    "--max-seq-length": "--block-size",
    "--model-name-or-path": "--base",
    "--num-experts-per-tok": "--top-k",
    "--num-local-experts": "--num-experts",
    "--num-train-epochs": "--max-steps",
    "--per-device-train-batch-size": "--batch-size",
    "--report-to": "--track",
    "--resume-from-checkpoint": "--resume",
    "--router-aux-loss-coef": "--lb-coef",
    "--save-steps": "--save-every",
    "--save-total-limit": "--keep-last-k",
    "--top-k": "--sample-top-k",
    "--top-p": "--sample-top-p",
    "--warmup-ratio": "--warmup-fraction",
    "--warmup-steps": "--warmup-fraction",
}
"""What transformers calls it."""


_SAID = tuple([word] for word in (YES, NO, "true", "false", "True", "False", "on", "off"))
"""What is said of a switch: yes or no, and what is refused in a message that says so."""


def flag(field: str) -> str:
    """The flag of the field of that name."""
    return "--" + field.replace("_", "-")


def flags_of(cls: type[Any]) -> dict[str, Any]:
    """Flags of a configuration and of those in it, and their types; positionals are no flags."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= flags_of(hint)
        elif not _is_positional(hint):
            found[flag(name)] = hint
    return found


def _is_positional(hint: Any) -> bool:
    marker = typing.get_args(tyro.conf.Positional[str])[1]
    return typing.get_origin(hint) is Annotated and marker in hint.__metadata__


def spelled_out(cls: type[Any], argv: Sequence[str]) -> list[str]:
    """`argv` with a value for every switch: --debug is --debug yes, --no-debug is --debug no.

    Raises:
        ValueError: for a flag that `cls` does not have.
    """
    hints = flags_of(cls)
    switches = {name for name, hint in hints.items() if hint is bool}
    negated = {name.replace("--", "--no-", 1): name for name in switches}
    words: list[str] = []
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if not word.startswith("--") or name in ("--", "--help"):
            words.append(word)
        elif name in negated and not equals:
            words += [negated[name], NO]
        elif name not in hints:
            meant = ELSEWHERE[name] if ELSEWHERE.get(name) in hints else name
            raise ValueError(f"{name}: there is no such flag{did_you_mean(meant, hints)}")
        else:
            words.append(name + equals + value)
            if name in switches and not equals and list(argv[place + 1 : place + 2]) not in _SAID:
                words.append(YES)
    return words
