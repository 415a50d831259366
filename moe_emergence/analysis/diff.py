"""`analyze A B --diff`: which tokens have another expert in B than in A, whatever their numbers.

Letters: T tokens, K experts per token.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from rich.table import Table
from torch import Tensor

from moe_emergence.analysis.documents import take
from moe_emergence.analysis.figure_file import save
from moe_emergence.analysis.figures.overlap import plot_overlap
from moe_emergence.analysis.loading import Placement
from moe_emergence.analysis.matching import Choices, Ints, Overlap, random_kept
from moe_emergence.analysis.routers import RouterReader
from moe_emergence.analysis.settings import AnalyzeConfig
from moe_emergence.analysis.sources import Source, open_source, read_text, sees, text_choice
from moe_emergence.analysis.streaming import is_byte_level
from moe_emergence.analysis.tidy import FIGURES, write_tables
from moe_emergence.analysis.token_types import TOKEN_TYPES, token_types
from moe_emergence.config import TokenClass
from moe_emergence.config.data import ALL
from moe_emergence.progress import progress_bar
from moe_emergence.terminal import Console

Cell = tuple[str, str]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Routed:
    """A model's choices on a text, and how many experts each layer has."""

    experts: dict[int, npt.NDArray[np.int16]]
    """By layer (T, K)."""
    num_experts: dict[int, int]


def diff(config: AnalyzeConfig, names: list[str], folder: Path) -> None:
    """Write `tables/moved`, `overlap` and `match`, draw `figures/overlap`, print a summary.

    Both models read the text of the first, one after the other.

    Raises:
        ValueError: naming what differs, for models that do not read the same tokens, or have no
            mixture layer in common.
    """
    placement = Placement(config.device, config.dtype)
    one = open_source(config.sources[0], names[0], placement)
    text = read_text(one, text_choice(config))
    blocks = take(text.blocks, config.max_tokens)
    cells, cells_T = token_cells(one, blocks, text.classes)
    first = route(one.model, blocks, config.batch_size)
    vocabulary = one.tokenizer.get_vocab()
    del one  # the second model has the room of the first
    other = open_source(config.sources[1], names[1], placement)
    check_same_tokens(names, vocabulary, other, blocks)
    second = route(other.model, blocks, config.batch_size)
    tables = compare(cells, cells_T, first, second, config.permutations, config.seed)
    if not tables:
        raise ValueError(
            f"--diff {' '.join(config.sources)}: mixtures are in layers {sorted(first.experts)} of "
            f"one and {sorted(second.experts)} of the other; give models that share some"
        )
    write_tables(folder, {n: t.assign(run=names[0], other_run=names[1]) for n, t in tables.items()})
    figure = plot_overlap(tables["overlap"], names[0], names[1])
    save(figure, *(folder / FIGURES / f"overlap.{suffix}" for suffix in ("png", "svg")))
    print_summary(
        Console(), tables["moved"], names, f"{len(cells_T):,} tokens of {text.description}"
    )


def check_same_tokens(
    names: list[str], vocabulary: Mapping[str, int], other: Source, blocks: Mapping[str, Tensor]
) -> None:
    """Refuse a second model that reads other tokens, or not as many."""
    theirs = other.tokenizer.get_vocab()
    if theirs != vocabulary:
        unlike = sorted({*theirs.items()} ^ {*vocabulary.items()}, key=lambda pair: pair[1])
        raise ValueError(
            f"--diff: the tokenizers of {names[0]} and {names[1]} differ ({len(vocabulary)} and "
            f"{len(theirs)} entries; {unlike[0][0]!r} is not the same in both); compare models "
            "that read the same tokens"
        )
    longest = max(part.shape[1] for part in blocks.values())
    seen = sees(other.model) or longest
    if longest > seen:
        raise ValueError(f"--block-size {longest}: {names[1]} sees {seen} tokens; give fewer")


def token_cells(
    source: Source, blocks: Mapping[str, Tensor], classes: Mapping[str, TokenClass]
) -> tuple[list[Cell], npt.NDArray[np.int16]]:
    """The cells (domain, token type), and the cell of each of the T tokens in the blocks' order.

    The type is "all" where the tokenizer does not tell, or the domain has no types.
    """
    cells: list[Cell] = []
    places: list[npt.NDArray[np.int16]] = []
    readable = is_byte_level(source.tokenizer)
    for domain, part in blocks.items():
        types = TOKEN_TYPES[classes[domain]] if readable else ()
        kinds = np.zeros(part.shape, np.int8)
        if types:
            ids = part.cpu().numpy().astype(np.int32)
            kinds = token_types(ids, classes[domain], source.tokenizer)
        places.append((kinds.ravel() + len(cells)).astype(np.int16))
        cells += [(domain, kind) for kind in types or (ALL,)]
    return cells, np.concatenate(places)


def route(model: Any, blocks: Mapping[str, Tensor], batch_size: int) -> Routed:
    """Every layer's experts for all tokens, in the blocks' order."""
    reader = RouterReader(model)
    parts: dict[int, list[Tensor]] = {layer: [] for layer in reader.layers}
    sizes: dict[int, int] = {}
    total = sum(len(part) for part in blocks.values())
    with reader.reading(), progress_bar("routing of the text", total) as advance:
        for part in blocks.values():
            for ids in part.split(batch_size):
                for routing in reader.read(ids):
                    parts[routing.layer].append(routing.experts_TK.cpu().short())
                    sizes[routing.layer] = routing.probs_TE.shape[1]
                advance(len(ids))
    experts = {layer: torch.cat(found).numpy() for layer, found in parts.items()}
    return Routed(experts, sizes)


def compare(
    cells: list[Cell],
    cells_T: npt.NDArray[np.int16],
    one: Routed,
    other: Routed,
    permutations: int,
    seed: int,
) -> dict[str, pd.DataFrame]:
    """The tables of the layers that both have; nothing where there is none.

    `moved`: layer, domain, token_type, tokens; then shares of a token's experts that the other
    model does not give it (of those of the model that gives fewer): moved_unmatched, experts by
    their own numbers; moved, matched; of random routers with the same loads, matched too,
    null_moved (mean), null_05 (5th percentile) and p (how often they move as little).
    `overlap`: layer, expert, other_expert, tokens, share (of the expert's), expected (by the
    loads), matched. `match`: layer, expert, other_expert (-1 for none).
    """
    layers = sorted(one.experts.keys() & other.experts.keys())
    tables: dict[str, list[dict[str, Any]]] = {"moved": [], "overlap": [], "match": []}
    with progress_bar("random routers", len(layers) * permutations) as advance:
        for layer in layers:
            shape = len(cells), one.num_experts[layer], other.num_experts[layer]
            choices = Choices(cells_T, one.experts[layer], other.experts[layer], shape)
            overlap = choices.overlap()
            match_E = overlap.match()
            null_kept = random_kept(choices, permutations, seed * 1000 + layer, advance)
            for row in moved_rows(cells, overlap, match_E, null_kept):
                tables["moved"].append({"layer": layer, **row})
            for row in overlap_rows(choices, overlap, match_E):
                tables["overlap"].append({"layer": layer, **row})
            for expert, matched in enumerate(match_E.tolist()):
                tables["match"].append({"layer": layer, "expert": expert, "other_expert": matched})
    return {name: pd.DataFrame(rows) for name, rows in tables.items() if layers}


def moved_rows(
    cells: list[Cell], overlap: Overlap, match_E: Ints, null_kept: Ints
) -> Iterator[dict[str, Any]]:
    """A row of all tokens, of each domain, and of each token type of it that occurs."""
    own_E = np.arange(len(match_E))
    own_E[own_E >= overlap.shared_CEF.shape[2]] = -1
    kept = np.stack([overlap.kept(own_E), overlap.kept(match_E), *null_kept])
    groups: dict[Cell, list[int]] = {(ALL, ALL): list(range(len(cells)))}
    for name in dict.fromkeys(domain for domain, _ in cells):
        groups[name, ALL] = [place for place, (domain, _) in enumerate(cells) if domain == name]
        groups |= {cell: [place] for place, cell in enumerate(cells) if cell[0] == name}
    for (domain, kind), places in groups.items():
        tokens = int(overlap.tokens_C[places].sum())
        if tokens:
            shares = 1 - kept[:, places].sum(axis=1) / (overlap.per_token * tokens)
            unmatched, moved, drawn = shares[0], shares[1], shares[2:]
            yield {
                "domain": domain, "token_type": kind, "tokens": tokens,
                "moved_unmatched": float(unmatched), "moved": float(moved),
                "null_moved": float(drawn.mean()), "null_05": float(np.quantile(drawn, 0.05)),
                "p": float((1 + (drawn <= moved).sum()) / (1 + len(drawn))),
            }  # fmt: skip


def overlap_rows(choices: Choices, overlap: Overlap, match_E: Ints) -> Iterator[dict[str, Any]]:
    """Every pair of experts of a layer."""
    _, experts, others = choices.shape
    shared_EF = overlap.shared_CEF.sum(axis=0)
    load_E = np.bincount(choices.one_TK.ravel(), minlength=experts)
    load_F = np.bincount(choices.other_TM.ravel(), minlength=others) / len(choices.cells_T)
    for (expert, other), tokens in np.ndenumerate(shared_EF):
        yield {
            "expert": expert, "other_expert": other, "tokens": int(tokens),
            "share": float(tokens / load_E[expert]) if load_E[expert] else 0.0,
            "expected": float(load_F[other]), "matched": bool(match_E[expert] == other),
        }  # fmt: skip


def print_summary(console: Console, moved: pd.DataFrame, names: list[str], read: str) -> None:
    """A line for every layer."""
    console.print(f"Experts of {names[0]} against those of {names[1]}, {read}", markup=False)
    table = Table("layer", "moved, own numbers", "moved, matched", "random routers", "p",
                  "moves most", "moves least")  # fmt: skip
    for layer, part in moved.groupby("layer"):
        whole = part[part["domain"] == ALL].iloc[0]
        domains = part[(part["token_type"] == ALL) & (part["domain"] != ALL)].sort_values("moved")
        ends = [f"{row['domain']} {row['moved']:.1%}" for _, row in domains.iterrows()]
        table.add_row(
            str(layer), f"{whole['moved_unmatched']:.1%}", f"{whole['moved']:.1%}",
            f"{whole['null_moved']:.1%}", f"{whole['p']:.3f}", ends[-1], ends[0],
        )  # fmt: skip
    console.print(table)
