"""The table behind the expert x domain figure: share of each domain's assignments per expert.

Letters: D domains, E experts.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_emergence.disk import read_text, whole_file

DomainFractions = Mapping[int, Mapping[str, Sequence[float]]]
"""Per mixture layer and domain E shares that sum to 1."""


def write_domain_fractions(
    path: Path, domains: Sequence[str], fractions_DE: Mapping[int, Sequence[Sequence[float]]]
) -> None:
    """Write layer, domain, expert and fraction of every cell as CSV."""
    with whole_file(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "domain", "expert", "fraction"])
        for layer, rows in fractions_DE.items():
            for domain, row in zip(domains, rows, strict=True):
                writer.writerows([layer, domain, e, f"{share:.6f}"] for e, share in enumerate(row))


def read_domain_fractions(path: Path) -> DomainFractions:
    """What `write_domain_fractions` wrote, rounded to six digits."""
    found: dict[int, dict[str, list[float]]] = {}
    for row in csv.DictReader(read_text(path).splitlines()):
        layer = found.setdefault(int(row["layer"]), {})
        layer.setdefault(row["domain"], []).append(float(row["fraction"]))
    return found
