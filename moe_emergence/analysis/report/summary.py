"""What an analysis says, in words: the numbers with their intervals, and what they do not show."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from moe_emergence.analysis.documents import FEWEST
from moe_emergence.analysis.modules import can_pass
from moe_emergence.analysis.report.verdict import LayerFinding, headline
from moe_emergence.analysis.routing_tables import ALL_SLOTS


@dataclass(frozen=True)
class RunFinding:
    """The headline numbers of a run."""

    name: str
    about: Mapping[str, Any]
    headline: str
    """The verdict in a sentence that can be repeated."""
    layers: tuple[LayerFinding, ...]
    """What experts tell of the domain."""
    types: tuple[LayerFinding, ...]
    """What first experts tell of the token's type within its domain."""
    most: float | None
    """Entropy of a token's domain in bits, which experts can tell at most."""
    loss: str
    """What the model's loss is here, and why training logged another."""
    collapse: str
    modules: tuple[str, ...]
    """What the module test says, a sentence for each text and domain."""
    retention: tuple[str, ...]
    """What few experts keep of each domain."""
    regret: tuple[str, ...]
    """What the routers' choices are worth."""


def summarise(runs: list[dict[str, Any]], tables: Mapping[str, pd.DataFrame]) -> list[RunFinding]:
    """A finding per run of `analysis.json`, from the tables there are."""
    found = []
    for run in runs:
        own = partial(_of, tables, run=run)
        layers = _layers(own("information"), own("routing"), "domain")
        domains, most = _domains(own("expert_domain"))
        found.append(
            RunFinding(
                run["name"],
                run,
                headline(layers, domains, most),
                tuple(layers),
                tuple(_layers(own("information"), own("routing"), "token type")),
                most,
                _loss(run, own("training")),
                _collapse(own("collapse")),
                tuple(map(_module, own("modules").to_dict("records"))),
                tuple(_retention(own("retention"))),
                tuple(map(_regret, own("regret").to_dict("records"))),
            )
        )
    return found


def _domains(table: pd.DataFrame) -> tuple[list[str], float | None]:
    """The domains that were read, and the entropy of a token's in bits."""
    if table.empty:
        return [], None
    whole = table[(table["slot"] == ALL_SLOTS) & (table["layer"] == table["layer"].iloc[0])]
    tokens = whole.groupby("domain", sort=False)["tokens"].sum()
    tokens = tokens[tokens > 0]
    shares = tokens / tokens.sum()
    return list(map(str, tokens.index)), float(-(shares * np.log2(shares)).sum())


def _of(tables: Mapping[str, pd.DataFrame], name: str, *, run: Mapping[str, Any]) -> pd.DataFrame:
    table = tables.get(name)
    return pd.DataFrame() if table is None else table[table["run"] == run["name"]]


def _layers(information: pd.DataFrame, routing: pd.DataFrame, label: str) -> list[LayerFinding]:
    if information.empty:
        return []
    uneven = dict(zip(routing["layer"], routing["max_violation"], strict=True))
    return [
        LayerFinding(
            int(row["layer"]), row["bits"], row["bits_low"], row["bits_high"],
            row["p_permutation"], row["null_router_bits"], row["null_router_95"], row["p_router"],
            uneven[row["layer"]],
        )
        for row in information[information["label"] == label].to_dict("records")
    ]  # fmt: skip


def _loss(run: Mapping[str, Any], training: pd.DataFrame) -> str:
    if run.get("lm_loss") is None:
        return ""
    here = f"{run['lm_loss']:.4f} nats per token over {run['tokens']:,} tokens"
    logged = training[training["metric"] == "eval/lm_loss"] if len(training) else training
    if logged.empty:
        return here
    last = logged.loc[logged["step"].idxmax()]
    then = f"training logged {last['value']:.4f} at step {int(last['step'])}"
    blocks = run.get("eval_blocks")
    if blocks:
        return f"{here}; {then} over the first {blocks} blocks of each domain (--eval-blocks)"
    return f"{here}; {then} over all its evaluation blocks"


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
