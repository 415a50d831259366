"""One sentence of what experts tell of a token, against what a random router's would."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

ALPHA = 0.05
FEW = 4
"""Layers whose numbers are all in the sentence; of more, the range."""

Verdict = Literal["more than random", "no more than random", "nothing"]

_WORDS: dict[Verdict, str] = {
    "more than random": "experts follow domains more than random routers do",
    "no more than random": "no more than random routers: no evidence of learned specialisation",
    "nothing": "no evidence that experts and domains go together",
}


@dataclass(frozen=True)
class LayerFinding:
    """What the experts of a layer tell of a label, in bits, against its nulls."""

    layer: int
    bits: float
    low: float
    high: float
    p: float
    """Of permuted labels."""
    null_bits: float
    null_95: float
    p_router: float
    """Share of random routers that tell as much, adjusted over the layers."""
    imbalance: float

    @property
    def kind(self) -> Verdict:
        """Evidence is spoken of only where both p-values are below `ALPHA`."""
        if self.p >= ALPHA:
            return "nothing"
        return "more than random" if self.p_router < ALPHA else "no more than random"

    @property
    def verdict(self) -> str:
        """What the numbers show, and what they do not."""
        return _WORDS[self.kind]


def headline(layers: Sequence[LayerFinding], domains: Sequence[str], most: float | None) -> str:
    """The verdict on all layers in a sentence.

    Args:
        layers: what their experts tell of the domain.
        domains: that were read.
        most: entropy of a token's domain in bits; None where it is not known.
    """
    if len(domains) == 1:
        return f"All text is {domains[0]}: of one domain there is nothing for experts to tell."
    if not layers:
        return "Nothing was counted: there is nothing to say."
    of = "" if most is None else f"of {most:.2f} "
    clauses: list[str] = []
    ordered = sorted(layers, key=lambda layer: list(_WORDS).index(layer.kind))
    for kind, group in groupby(ordered, key=lambda layer: layer.kind):
        part = list(group)
        subject = "those" if clauses else "The experts"
        clauses.append(f"{subject} of {_places(part)} {_clause(kind, part, of)}")
    return "; ".join(clauses) + "."


def _clause(kind: Verdict, part: Sequence[LayerFinding], of: str) -> str:
    bits = _numbers([layer.bits for layer in part])
    null = _numbers([layer.null_bits for layer in part])
    if kind == "nothing":
        shuffled = _numbers([layer.p for layer in part])
        return f"tell no more of a token's domain than of shuffled domains (p {shuffled})"
    p = _numbers([layer.p_router for layer in part])
    if kind == "more than random":
        return f"tell {bits} {of}bits of a token's domain; a random router's tell {null} (p {p})"
    return (
        f"know the domain no better than a random router's would: {bits} {of}bits, a random "
        f"router's {null} (p {p})"
    )


def type_sentence(layers: Sequence[LayerFinding]) -> str:
    """What first experts tell of a token's type, in a sentence; "" where types are unknown."""
    if not layers:
        return ""
    bits, null, p = (
        _numbers([getattr(layer, name) for layer in layers])
        for name in ("bits", "null_bits", "p_router")
    )
    more = sum(layer.kind == "more than random" for layer in layers)
    known = "more than random routers' in no layer"
    if more:
        known = f"more than random routers' in {more} of {len(layers)}"
    return (
        "What kind of token it is (number, operator, function word, ...), of that they tell "
        f"{bits} bits, a random router's {null} (p {p}): {known}."
    )


def _places(part: Sequence[LayerFinding]) -> str:
    if len(part) == 1:
        return f"layer {part[0].layer}"
    if len(part) <= FEW:
        return f"layers {_joined([str(layer.layer) for layer in part])}"
    return f"{len(part)} layers"


def _numbers(values: Sequence[float], form: Callable[[float], str] = "{:.2f}".format) -> str:
    """All of a few, the range of more; one where all read the same."""
    texts = [form(value) for value in values]
    if len(set(texts)) == 1:
        return texts[0]
    return _joined(texts) if len(texts) <= FEW else f"{form(min(values))} to {form(max(values))}"


def _joined(texts: Sequence[str]) -> str:
    return " and ".join([*([", ".join(texts[:-1])] if texts[:-1] else []), texts[-1]])
