"""What an analysis says, in words: the numbers with their intervals, and what they do not show."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from moe_emergence.analysis.documents import FEWEST
from moe_emergence.analysis.modules import can_pass

ALPHA = 0.05


@dataclass(frozen=True)
class LayerFinding:
    """Domain information of a layer, against its nulls."""

    layer: int
    bits: float
    low: float
    high: float
    p: float
    null_bits: float
    null_95: float
    p_router: float
    imbalance: float

    @property
    def verdict(self) -> str:
        """What the numbers show, and what they do not."""
        if self.p >= ALPHA:
            return "no evidence that experts and domains go together"
        if self.p_router < ALPHA:
            return "experts follow domains more than random routers do"
        return "no more than random routers: no evidence of learned specialisation"


@dataclass(frozen=True)
class RunFinding:
    """The headline numbers of a run."""

    name: str
    about: Mapping[str, Any]
    layers: tuple[LayerFinding, ...]
    collapse: str
    modules: tuple[str, ...]
    """What the module test says, a sentence for each text and domain, what few experts keep, and
    what the routers' choices are worth."""


def summarise(runs: list[dict[str, Any]], tables: Mapping[str, pd.DataFrame]) -> list[RunFinding]:
    """A finding per run of `analysis.json`, from the tables there are."""
    return [
        RunFinding(
            run["name"],
            run,
            tuple(_layers(_of(tables, "information", run), _of(tables, "routing", run))),
            _collapse(_of(tables, "collapse", run)),
            (
                *map(_module, _of(tables, "modules", run).to_dict("records")),
                *_retention(_of(tables, "retention", run)),
                *map(_regret, _of(tables, "regret", run).to_dict("records")),
            ),
        )
        for run in runs
    ]


def _of(tables: Mapping[str, pd.DataFrame], name: str, run: Mapping[str, Any]) -> pd.DataFrame:
    table = tables.get(name)
    return pd.DataFrame() if table is None else table[table["run"] == run["name"]]


def _layers(information: pd.DataFrame, routing: pd.DataFrame) -> list[LayerFinding]:
    if information.empty:
        return []
    uneven = dict(zip(routing["layer"], routing["max_violation"], strict=True))
    return [
        LayerFinding(
            int(row["layer"]), row["bits"], row["bits_low"], row["bits_high"],
            row["p_permutation"], row["null_router_bits"], row["null_router_95"], row["p_router"],
            uneven[row["layer"]],
        )
        for row in information[information["label"] == "domain"].to_dict("records")
    ]  # fmt: skip


def _collapse(table: pd.DataFrame) -> str:
    if table.empty:
        return "no record of training"
    worst = table.loc[table["largest_share"].idxmax()]
    return (
        f"largest share of any expert over training {worst['largest_share']:.0%} "
        f"(layer {int(worst['layer'])}, step {int(worst['step'])})"
    )


def _module(row: Mapping[str, Any]) -> str:
    verdict = "a module" if row["passes"] else "no module"
    if not can_pass(int(row["sets"])):
        verdict = f"not decided ({int(row['sets'])} other sets are too few)"
    blocks, documents = int(row["blocks"]), int(row["documents"])
    drawn = f"{documents} documents"
    if documents < FEWEST:
        drawn = f"{blocks} blocks, which are of {documents} document{'s' * (documents > 1)}"
    return (
        f"{row['domain']}, {row['corpus']}: {verdict}. Without experts {row['experts']} it loses "
        f"{row['damage']:.3f} nats per token ({row['damage_low']:.3f} to {row['damage_high']:.3f} "
        f"over {drawn}; {int(row['sets'])} random sets {row['random_mean']:.3f}, 95% below "
        f"{row['random_95']:.3f}), the other domains {row['off_target']:.3f}"
    )


def _regret(row: Mapping[str, Any]) -> str:
    return (
        f"layer {int(row['layer'])}, {row['domain']}: the router's choice is "
        f"{row['gain']:+.4f} nats better than a draw ({row['gain_low']:+.4f} to "
        f"{row['gain_high']:+.4f}), the best expert would be {row['random_regret']:+.4f}; it "
        f"chooses that one {row['best']:.0%} of the time, by chance {1 / row['options']:.0%}"
    )


def _retention(table: pd.DataFrame) -> list[str]:
    if table.empty:
        return []
    found = []
    cells = table.set_index(["best_for", "kept", "on"])["increase"]
    for domain in dict.fromkeys(table["on"]):
        parts = [
            f"{kept} cost it {cells[domain, kept, domain]:+.3f} "
            f"(random ones {cells['random', kept, domain]:+.3f})"
            for kept in dict.fromkeys(table["kept"])
        ]
        found.append(f"{domain}, with its best experts of each layer alone: {', '.join(parts)}")
    return found
