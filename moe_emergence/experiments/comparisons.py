"""Variants against their controls: only pairs that match, paired by seed, one family per domain."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pandas as pd

from moe_emergence.config.data import ALL
from moe_emergence.data.manifest import differences
from moe_emergence.experiments.collect import ENDED, Records, final_losses
from moe_emergence.experiments.description import MARGIN, Comparison
from moe_emergence.experiments.paired import holm, paired_difference, verdict

_NOT_COMPARED = frozenset(
    {"preset", "run_name", "output_dir", "resume", "stop_after", "device", "dispatch", "autotune",
     "cuda_graph", "debug", "optim.compare_dense", "optim.compare_null",
     "optim.pretrain_steps", "optim.pretrain_learning_rate", "data.cache_dir"}
)  # fmt: skip
"""Where a run is, and how it is executed; not what it computes."""

LENGTH = "optim.max_steps"
_SCHEDULE = ("seed", "optim.learning_rate", "optim.warmup_fraction")


def config_differences(
    variant: dict[str, Any], control: dict[str, Any], path: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """Dotted fields in which two configurations differ: (the variant's value, the control's).

    Left out are places, execution and monitoring, which do not change what is computed.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys((*variant, *control)):
        dotted = ".".join((*path, name))
        first, second = variant.get(name), control.get(name)
        if dotted in _NOT_COMPARED or dotted == "monitor":
            continue
        if isinstance(first, dict) and isinstance(second, dict):
            found |= config_differences(first, second, (*path, name))
        elif first != second:
            found[dotted] = first, second
    return found


def mismatch(records: Records, comparison: Comparison, seed: int) -> str:
    """Why the pair of a seed must not be compared; "" when it may be."""
    pair = comparison.variant, comparison.control
    statuses = {name: records.status(name, seed) for name in pair}
    lacking = [f"{name} is {status}" for name, status in statuses.items() if status not in ENDED]
    if lacking:
        return ", ".join(lacking)
    return "; ".join(_unlike(records, comparison, seed))


def _unlike(records: Records, comparison: Comparison, seed: int) -> Iterator[str]:
    variant, control = (comparison.variant, seed), (comparison.control, seed)
    runs = records.runs.set_index(["variant", "seed"])["final_step"]
    steps = int(runs[variant]), int(runs[control])
    if comparison.matched == "steps" and steps[0] != steps[1]:
        yield f"final steps {steps[0]} and {steps[1]}"
    manifests = records.manifests.get(variant), records.manifests.get(control)
    if None in manifests:
        yield "no data_manifest.json"
    elif other := next(differences(*manifests), None):
        yield f"unlike data ({'.'.join(other)})"
    precisions = {records.environments.get(key, {}).get("precision") for key in (variant, control)}
    if len(precisions) > 1:
        yield f"precisions {' and '.join(sorted(map(str, precisions)))}"
    configs = records.configs.get(variant), records.configs.get(control)
    if configs[0] is None or configs[1] is None:
        yield "no config.json"
        return
    changed = config_differences(configs[0], configs[1])
    if comparison.matched == "flops":
        changed.pop(LENGTH, None)
        for (name, _), done in zip((variant, control), steps, strict=True):
            planned = records.setting(name, seed, LENGTH)
            if done != planned:
                yield f"{name} ended at step {done} of {planned}"
    elif LENGTH in changed:
        yield f"schedules of {changed[LENGTH][0]} and {changed[LENGTH][1]} steps"
    yield from (f"unlike {name}" for name in _SCHEDULE if name in changed)
    rows = [c["optim"]["batch_size"] * c["optim"]["grad_accum_steps"] for c in configs if c]
    if rows[0] != rows[1]:
        yield f"{rows[0]} and {rows[1]} sequences a step"


def compare(records: Records, margin: float = MARGIN) -> pd.DataFrame:
    """Final lm_loss of every comparison and domain: variant minus control, nats per token.

    One row per comparison and domain, with the fields of `PairedDifference`, the p-values adjusted
    by Holm over all comparisons of the same domain, the verdict, the seeds that were paired and
    why others were not.
    """
    finals = final_losses(records).set_index(["variant", "seed", "domain"])["final_lm_loss"]
    rows = []
    for comparison in records.suite.comparisons:
        reasons = {seed: mismatch(records, comparison, seed) for seed in records.suite.seeds}
        seeds = [seed for seed, reason in reasons.items() if not reason]
        left_out = "; ".join(f"seed {seed}: {why}" for seed, why in reasons.items() if why)
        for domain in (ALL, *records.domains):
            found = [
                float(finals[comparison.variant, seed, domain])
                - float(finals[comparison.control, seed, domain])
                for seed in seeds
                if (comparison.variant, seed, domain) in finals.index
                and (comparison.control, seed, domain) in finals.index
            ]
            rows.append(
                {
                    "variant": comparison.variant,
                    "control": comparison.control,
                    "matched": comparison.matched,
                    "domain": domain,
                    **asdict(paired_difference(found, margin)),
                    "seeds": " ".join(map(str, seeds)),
                    "left_out": left_out,
                    "differences": " ".join(f"{value:.6f}" for value in found),
                }
            )
    return _judged(pd.DataFrame(rows))


def _judged(table: pd.DataFrame) -> pd.DataFrame:
    if table.empty:
        return table
    families = table.groupby("domain")
    for name in ("p", "p_equivalence"):
        table[f"{name}_holm"] = families[name].transform(holm)
    table["verdict"] = [
        verdict(row.mean, row.n, row.p_holm, row.p_equivalence_holm)
        for row in table.itertuples(index=False)
    ]
    return table
