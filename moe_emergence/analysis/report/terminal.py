"""What an analysis found, for the terminal: the sentence, the experts, where the page is."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from moe_emergence.analysis.report.experts import ExpertCard, expert_cards
from moe_emergence.analysis.report.summary import RunFinding, summarise
from moe_emergence.analysis.report.verdict import type_sentence
from moe_emergence.analysis.tidy import read_tables
from moe_emergence.run_folder import read_json
from moe_emergence.terminal import Console

MOST_ROWS = 32
TOKENS = 3


def print_findings(folder: Path, page: Path) -> None:
    """Print to stdout what `folder`'s analysis found of every run, and where `page` is."""
    console = Console(markup=False, highlight=False, emoji=False)
    tables = read_tables(folder)
    for finding in summarise(read_json(folder / "analysis.json")["runs"], tables):
        cards = [
            (layer, card)
            for layer, own in expert_cards(tables, finding.name).items()
            for card in own
        ]
        if cards:
            console.print(expert_table(finding.name, cards))
        for line in sentences(finding):
            console.print(line, soft_wrap=True)
    console.print(f"report: {page}", soft_wrap=True)


def sentences(finding: RunFinding) -> list[str]:
    """The verdict and what it rests on, a line each."""
    lines = [f"{finding.name}: {finding.headline}"]
    if finding.types:
        lines.append(type_sentence(finding.types))
    if finding.loss:
        lines.append(f"lm_loss {finding.loss}.")
    return [*lines, *finding.modules]


def expert_table(name: str, cards: Sequence[tuple[int, ExpertCard]]) -> Table:
    """A row for every expert: load, domains, top tokens, main type of token.

    Of more than `MOST_ROWS`, those that are most of one domain.
    """
    shown = list(cards)
    if len(cards) > MOST_ROWS:
        by_domain = sorted(cards, key=lambda pair: -max((s for _, s in pair[1].domains), default=0))
        kept = {id(card) for _, card in by_domain[:MOST_ROWS]}
        shown = [pair for pair in cards if id(pair[1]) in kept]
    left = len(cards) - len(shown)
    table = Table(
        title=Text(f"Experts of {name}"),
        caption=f"{left} more are in the report" if left else None,
    )
    for column in ("layer", "expert", "load"):
        table.add_column(column, justify="right")
    for column in ("domains", "most its own tokens", "more than others of"):
        table.add_column(column, overflow="fold")
    last = None
    for layer, card in shown:
        if last not in (None, layer):
            table.add_section()
        last = layer
        table.add_row(str(layer), str(card.expert), f"{card.load:.0%}", *map(Text, _words(card)))
    return table


def _words(card: ExpertCard) -> tuple[str, str, str]:
    domains = sorted(card.domains, key=lambda pair: -pair[1])
    types = [f"{one.name} {one.share:.0%} (of all {one.overall:.0%})" for one in card.types[:1]]
    return (
        ", ".join(f"{name} {share:.0%}" for name, share in domains[:2]),
        " ".join(repr(token) for token in card.tokens[:TOKENS]),
        ", ".join(types),
    )
