"""The table behind the expert x domain figure: share of each domain's assignments per expert.

Letters: D domains, E experts.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_emergence.config import DOMAINS

DomainFractions = Mapping[int, Sequence[Sequence[float]]]
"""Per mixture layer D rows, in the order of `DOMAINS`, of E shares that sum to 1."""


def write_domain_fractions(path: Path, fractions: DomainFractions) -> None:
    """Write layer, domain, expert and fraction of every cell as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "domain", "expert", "fraction"])
        for layer, rows in fractions.items():
            for domain, row in zip(DOMAINS, rows, strict=True):
                writer.writerows([layer, domain, e, f"{share:.6f}"] for e, share in enumerate(row))


def read_domain_fractions(path: Path) -> dict[int, list[list[float]]]:
    """What `write_domain_fractions` wrote, rounded to six digits."""
    found: dict[int, list[list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            layer = found.setdefault(int(row["layer"]), [[] for _ in DOMAINS])
            layer[DOMAINS.index(row["domain"])].append(float(row["fraction"]))
    return found
