"""Every expert in a few words: what it reads, which tokens, who is like it, what is lost without.

All of it is in the tables of an analysis; nothing is measured here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from moe_emergence.analysis.routing_tables import ALL_SLOTS
from moe_emergence.config.data import ALL

MOST_TOKENS = 8
MOST_TYPES = 3
LEAST_ABOVE = 0.05
"""A type is named where it has so much more of the expert's tokens than of all."""

Tables = Mapping[str, pd.DataFrame]
Row = dict[str, Any]


@dataclass(frozen=True)
class TypeShare:
    """A token type's share of an expert's tokens, and of all tokens."""

    name: str
    share: float
    overall: float


@dataclass(frozen=True)
class ExpertCard:
    """An expert of a layer; what no table says is empty or None."""

    expert: int
    load: float
    """Share of the layer's assignments."""
    domains: tuple[tuple[str, float], ...]
    """Of its tokens, were all domains of the same size: domain and share."""
    types: tuple[TypeShare, ...]
    """Those it has most more of than all experts together."""
    tokens: tuple[str, ...]
    """That it gets most more of than its load explains."""
    passages: tuple[Row, ...]
    """domain, own, tokens, text, spans; see `analysis.passages`."""
    nearest: Row | None
    """expert, cosine, kind."""
    damage: Row | None
    """all, domain (that loses most), increase: nats per token; how."""


def expert_cards(tables: Tables, run: str) -> dict[int, list[ExpertCard]]:
    """The experts of a run's layers, in order."""
    own = {name: table[table["run"] == run] for name, table in tables.items()}
    shares = _all_slots(own.get("expert_domain"))
    if shares is None:
        return {}
    found = {}
    for layer, part in shares.groupby("layer"):
        here = {name: t[t["layer"] == layer] for name, t in own.items() if "layer" in t}
        found[int(layer)] = _cards(here, part)
    return found


def card_data(cards: Mapping[int, Sequence[ExpertCard]]) -> dict[str, list[Row]]:
    """JSON-ready, by layer, rounded."""
    return {str(layer): [_rounded(asdict(card)) for card in own] for layer, own in cards.items()}


def _cards(here: Tables, shares: pd.DataFrame) -> list[ExpertCard]:
    fractions = shares.pivot_table("fraction", "expert", "domain", sort=False).fillna(0.0)
    tokens = shares.groupby("expert")["tokens"].sum()
    loads = tokens / max(int(tokens.sum()), 1)
    types, overall = _types(_all_slots(here.get("expert_token_type")))
    words = _by_expert(here.get("vocabulary"), "rank")
    passages = _by_expert(here.get("passages"), "rank")
    damage = _by_expert(here.get("knockout"))
    nearest = _nearest(here.get("similarity"))
    cards = []
    for expert in sorted(fractions.index):
        of_domains = fractions.loc[expert]
        total = float(of_domains.sum())
        cards.append(
            ExpertCard(
                int(expert),
                float(loads[expert]),
                tuple((str(d), float(s) / total) for d, s in of_domains.items()) if total else (),
                _most_above(types.get(int(expert), {}), overall),
                tuple(str(row["token"]) for row in words.get(int(expert), [])[:MOST_TOKENS]),
                tuple(_passage(row) for row in passages.get(int(expert), [])),
                nearest.get(int(expert)),
                _damage(damage.get(int(expert), [])),
            )
        )
    return cards


def _all_slots(table: pd.DataFrame | None) -> pd.DataFrame | None:
    return None if table is None else table[table["slot"] == ALL_SLOTS]


def _by_expert(table: pd.DataFrame | None, order: str | None = None) -> dict[int, list[Row]]:
    if table is None or table.empty:
        return {}
    found: dict[int, list[Row]] = {}
    for row in (table.sort_values(order) if order else table).to_dict("records"):
        found.setdefault(int(row["expert"]), []).append({str(key): row[key] for key in row})
    return found


def _types(table: pd.DataFrame | None) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
    """Share of each type, whatever its domain, of every expert's tokens and of all."""
    if table is None or table.empty:
        return {}, {}
    counts = table.pivot_table("tokens", "expert", "token_type", aggfunc="sum", fill_value=0)
    totals = counts.sum(axis=1)
    shares = counts.div(totals.where(totals > 0, 1), axis=0)
    everywhere = counts.sum() / max(int(totals.sum()), 1)
    return (
        {int(e): {str(k): float(v) for k, v in row.items()} for e, row in shares.iterrows()},
        {str(k): float(v) for k, v in everywhere.items()},
    )


def _most_above(own: Mapping[str, float], overall: Mapping[str, float]) -> tuple[TypeShare, ...]:
    found = [TypeShare(name, share, overall[name]) for name, share in own.items()]
    found = [one for one in found if one.share - one.overall >= LEAST_ABOVE]
    return tuple(sorted(found, key=lambda one: one.overall - one.share)[:MOST_TYPES])


def _nearest(table: pd.DataFrame | None) -> dict[int, Row]:
    """By what experts put out; what they weigh is nearly the same for all that start as copies."""
    if table is None or table.empty:
        return {}
    kind = next(one for one in ("outputs", "moved", "weights") if (table["kind"] == one).any())
    others = table[(table["kind"] == kind) & (table["expert"] != table["other_expert"])]
    best = others.loc[others.groupby("expert")["cosine"].idxmax().dropna()]
    return {
        int(row["expert"]): {
            "expert": int(row["other_expert"]), "cosine": row["cosine"], "kind": kind
        }
        for row in best.to_dict("records")
    }  # fmt: skip


def _damage(rows: Sequence[Row]) -> Row | None:
    by_domain = {str(row["domain"]): float(row["increase"]) for row in rows}
    whole = by_domain.pop(ALL, None)
    if whole is None or not by_domain:
        return None
    worst = max(by_domain, key=lambda domain: by_domain[domain])
    return {"all": whole, "domain": worst, "increase": by_domain[worst], "how": rows[0]["how"]}


def _passage(row: Row) -> Row:
    spans = [[int(end) for end in span.split("-")] for span in str(row["spans"]).split()]
    kept = {key: row[key] for key in ("domain", "own", "tokens", "text")}
    return {**kept, "spans": spans}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return round(float(value), 4) if isinstance(value, float) else value
