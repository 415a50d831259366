"""How differences move with the length of training, where a recipe is run at several lengths."""

import re
from typing import Any

import pandas as pd

from moe_emergence.config.data import ALL
from moe_emergence.experiments.collect import Records
from moe_emergence.experiments.comparisons import LENGTH, config_differences
from moe_emergence.experiments.paired import paired_difference
from moe_emergence.experiments.specialisation import DOMAIN_LABEL
from moe_emergence.experiments.tables import interval, markdown, number

LOSS = "loss"
BITS = "bits"


def recipes(records: Records) -> dict[str, tuple[str, int]]:
    """Recipe and optimizer steps of every variant that has run.

    Variants are of one recipe when their configurations differ in the number of steps alone. Its
    name is that of the first, without a number at the end.
    """
    groups: list[list[str]] = []
    configs: dict[str, dict[int, Any]] = {}
    for (variant, seed), config in records.configs.items():
        configs.setdefault(variant, {})[seed] = config
    for variant in (v.name for v in records.suite.variants if v.name in configs):
        alike = (group for group in groups if _alike(configs[variant], configs[group[0]]))
        group = next(alike, None)
        if group is None:
            groups.append([variant])
        else:
            group.append(variant)
    found = {}
    for group in groups:
        name = re.sub(r"[-_]?\d+$", "", group[0]) if len(group) > 1 else group[0]
        for variant in group:
            config = next(iter(configs[variant].values()))
            found[variant] = name, int(config["optim"]["max_steps"])
    return found


def _alike(one: dict[int, Any], other: dict[int, Any]) -> bool:
    """Whether two variants, by seed, differ in length alone in the first seed that both have."""
    both = [seed for seed in one if seed in other]
    return bool(both) and not {*config_differences(one[both[0]], other[both[0]])} - {LENGTH}


def lengths(
    records: Records, comparisons: pd.DataFrame, specialisation: pd.DataFrame
) -> pd.DataFrame:
    """What was measured at two lengths or more, a row for each.

    Columns: measure ("loss": final lm_loss minus the control's, nats per token; "bits":
    I(expert; domain), mean over layers), of (recipes compared, or the recipe), steps, n (seeds),
    mean, and the ends low and high of the 95% interval over seeds, NaN for one seed.
    """
    known = recipes(records)
    rows = []
    for row in comparisons.itertuples(index=False):
        if row.domain == ALL and row.matched == "steps" and row.n and row.control in known:
            (variant, steps), (control, _) = known[row.variant], known[row.control]
            pair = f"{variant} − {control}"
            rows.append((LOSS, pair, steps, row.n, row.mean, row.low, row.high))
    if len(specialisation):
        domain = specialisation[specialisation["label"] == DOMAIN_LABEL]
        by_seed = domain.groupby(["variant", "seed"], sort=False)["bits"].mean()
        for variant, runs in by_seed.groupby("variant", sort=False):
            recipe, steps = known[str(variant)]
            found = paired_difference(runs.tolist())
            rows.append((BITS, recipe, steps, found.n, found.mean, found.low, found.high))
    table = pd.DataFrame(rows, columns=["measure", "of", "steps", "n", "mean", "low", "high"])
    several = table.groupby(["measure", "of"])["steps"].transform("nunique") > 1
    return table[several].sort_values(["measure", "of", "steps"]).reset_index(drop=True)


def lengths_section(table: pd.DataFrame) -> str:
    """A row for every recipe and pair of recipes, a column for every length."""
    steps = sorted(table["steps"].unique())
    rows = []
    for (measure, of), here in table.groupby(["measure", "of"], sort=False):
        digits, signed = (4, True) if measure == LOSS else (2, False)
        cells = {
            row.steps: number(row.mean, digits, signed=signed)
            + (f" ({interval(row.low, row.high, digits, signed=signed)})" if row.n > 1 else "")
            for row in here.itertuples(index=False)
        }
        rows.append([str(measure), str(of), *(cells.get(step, "") for step in steps)])
    text = (
        "Recipes that were run at several lengths, each with a schedule of its own. Loss: final "
        "lm_loss minus the control's at the same length, nats per token. Bits: I(expert; domain), "
        "mean over layers."
    )
    return text + "\n\n" + markdown(["measure", "of", *(f"{step:,} steps" for step in steps)], rows)
