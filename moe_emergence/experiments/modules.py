"""What a suite says of stable routing and of modules, as Markdown."""

import numpy as np
import pandas as pd

from moe_emergence.experiments.paired import paired_difference
from moe_emergence.experiments.tables import interval, markdown, number, share_of

MOST_STEPS = 8
"""Columns of the table of churn; `tables/churn.csv` has every evaluation."""


def churn_section(table: pd.DataFrame) -> str:
    """Churn per variant at evaluations from the first to the last, layers and seeds together."""
    every = sorted(table["step"].unique())
    places = np.linspace(0, len(every) - 1, min(len(every), MOST_STEPS)).round().astype(int)
    steps = [every[place] for place in places]
    rows = []
    for variant, runs in table.groupby("variant", sort=False):
        by_step = runs.groupby("step")["churn"].mean()
        rows.append([str(variant), *(_percent(by_step.get(step)) for step in steps)])
    text = (
        "Share of a fixed text's tokens whose first expert is another than at the evaluation "
        "before, mean over layers and seeds. Experts whose tokens change cannot specialise."
    )
    return text + "\n\n" + markdown(["variant", *(f"step {step}" for step in steps)], rows)


def _percent(share: float | None) -> str:
    return "" if share is None or pd.isna(share) else f"{share:.0%}"


def modules_section(table: pd.DataFrame) -> str:
    """How many modules pass per variant and domain, and what is lost without them."""
    rows = []
    for (variant, domain), runs in table.groupby(["variant", "domain"], sort=False):
        damage = paired_difference(runs["damage"].tolist())
        rows.append(
            [str(variant), str(domain), share_of(int(runs["passes"].sum()), len(runs)),
             number(runs["damage"].mean(), 4), interval(damage.low, damage.high, 4),
             number(runs["random_mean"].mean(), 4), number(runs["random_95"].mean(), 4),
             number(runs["off_target"].mean(), 4), number(runs["load"].mean(), 2),
             number(runs["random_load"].mean(), 2)]
        )  # fmt: skip
    header = ["variant", "domain", "pass", "lost without it", "95% interval", "random sets",
              "their 95%", "lost by others", "load", "random load"]  # fmt: skip
    text = (
        "The quarter of each layer's experts that a domain loses most without, named on one half "
        "of the evaluation blocks, is taken away on the other. It passes if the domain loses more "
        "than without 95% of 100 random sets of that size and about that load and twice their "
        "mean, its interval over the text is above 0, and the other domains lose at most a third "
        "of it. Nats per token; the intervals here are over seeds."
    )
    return text + "\n\n" + markdown(header, rows)
