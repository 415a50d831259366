"""The sections of a report in Markdown: every sentence with a verdict is made from the numbers."""

from collections.abc import Sequence

import pandas as pd

from moe_emergence.config.data import ALL
from moe_emergence.experiments.collapse_study import HORIZON, WINDOW, CollapseStudy
from moe_emergence.experiments.collect import ENDED, Records, final_losses
from moe_emergence.experiments.comparisons import config_differences
from moe_emergence.experiments.description import BASE
from moe_emergence.experiments.paired import MIN_SEEDS, paired_difference
from moe_emergence.experiments.specialisation import DOMAIN_LABEL, TYPE_LABEL
from moe_emergence.experiments.tables import (
    interval,
    markdown,
    mean_and_spread,
    number,
    plain,
    probability,
    share_of,
)


def variants_section(records: Records) -> str:
    """What each variant changes with respect to its control, read from the runs' own settings."""
    controls = {c.variant: c for c in reversed(records.suite.comparisons)}
    rows = []
    for variant in records.suite.variants:
        comparison = controls.get(variant.name)
        control = comparison.control if comparison else ""
        rows.append(
            [variant.name, control or "–", _changes(records, variant.name, control),
             variant.question]
        )  # fmt: skip
    return markdown(["variant", "control", "differs from its control in", "question"], rows)


def _changes(records: Records, variant: str, control: str) -> str:
    for seed in records.suite.seeds:
        ours = records.configs.get((variant, seed))
        theirs = records.configs.get((control, seed))
        if ours and theirs:
            changed = config_differences(ours, theirs)
            found = [f"`{name}` {plain(a)} (not {plain(b)})" for name, (a, b) in changed.items()]
            return ", ".join(found) or "nothing"
    declared = next(v.changes for v in records.suite.variants if v.name == variant)
    listed = ", ".join(f"`{name}` {plain(value)}" for name, value in declared.items())
    return f"{listed or '–'} (as planned; no run of both yet)" if control else listed or "–"


def runs_section(records: Records) -> str:
    """How many runs there are, and one row for each that did not complete."""
    ended = records.runs["status"].isin(ENDED)
    text = f"{int(ended.sum())} of {len(records.runs)} runs ended for good."
    others = records.runs[records.runs["status"] != "completed"]
    if others.empty:
        return f"{text} All of them completed."
    rows = [
        [row.variant, str(row.seed), row.status, number(row.final_step, 0), row.problem or ""]
        for row in others.itertuples(index=False)
    ]
    table = markdown(["variant", "seed", "status", "final step", "problem"], rows)
    return f"{text} These did not complete:\n\n{table}"


def losses_section(records: Records) -> str:
    """Final and best lm_loss and speed, mean ± standard deviation over seeds."""
    finals = final_losses(records)
    rows = []
    for variant in [BASE, *(v.name for v in records.suite.variants)]:
        ours = finals[finals["variant"] == variant]
        if ours.empty:
            continue
        by_domain = dict(list(ours.groupby("domain")))
        steps = sorted(set(ours["final_step"]))
        shown = [
            mean_and_spread(by_domain[domain]["final_lm_loss"]) if domain in by_domain else "–"
            for domain in (ALL, *records.domains)
        ]
        best = mean_and_spread(by_domain[ALL]["best_lm_loss"]) if ALL in by_domain else "–"
        speed = records.runs.loc[records.runs["variant"] == variant, "tokens_per_sec"].mean()
        rows.append(
            [variant, str(ours["seed"].nunique()), ", ".join(map(str, steps)), *shown, best,
             number(speed, 0)]
        )  # fmt: skip
    header = ["variant", "seeds", "last step", ALL, *records.domains, "best, all", "tokens/s"]
    return markdown(header, rows) if rows else "No run has been evaluated yet."


def comparisons_section(table: pd.DataFrame, margin: float) -> str:
    """The paired differences, and a sentence for each comparison."""
    if table.empty:
        return "The suite names no comparisons."
    rows = [
        [f"{row.variant} − {row.control}", row.domain, str(row.n),
         number(row.mean, signed=True), interval(row.low, row.high), number(row.hedges_g, 2),
         probability(row.p_holm), probability(row.p_equivalence_holm), row.verdict]
        for row in table.itertuples(index=False)
    ]  # fmt: skip
    header = ["comparison", "domain", "n", "mean", "95% interval", "Hedges g", "p", "p (TOST)",
              "verdict"]  # fmt: skip
    sentences = [f"- {sentence}" for sentence in verdict_sentences(table, margin)]
    return "\n".join(sentences) + "\n\n" + markdown(header, rows)


def verdict_sentences(table: pd.DataFrame, margin: float) -> list[str]:
    """One sentence per comparison, on all evaluation tokens, and what was left out."""
    found = []
    for row in table[table["domain"] == ALL].itertuples(index=False):
        at = "equal training FLOPs" if row.matched == "flops" else "equal steps"
        left_out = f" Left out: {row.left_out}." if row.left_out else ""
        if not row.n:
            found.append(f"**{row.variant}** cannot be compared with {row.control}.{left_out}")
            continue
        values = f"{number(row.mean, signed=True)} nats per token"
        if row.n > 1:
            values += f", 95% interval {interval(row.low, row.high)}"
        values += f", {row.n} seed{'s' * (row.n > 1)}"
        judged = {
            "better": f"is better than {row.control}",
            "worse": f"is worse than {row.control}",
            "equivalent": f"is equivalent to {row.control} within ±{margin:g} nats",
            "undecided": f"is neither shown to differ from {row.control} nor to equal it within "
            f"±{margin:g} nats: undecided",
            "too few seeds": f"has fewer than {MIN_SEEDS} seeds in common with {row.control}: no "
            "verdict",
        }[row.verdict]
        found.append(f"**{row.variant}** {judged} at {at} ({values}).{left_out}")
    return found


def specialisation_section(
    table: pd.DataFrame, against: pd.DataFrame, problems: Sequence[str]
) -> str:
    """Information per variant and layer beside its permutation null, then against null models."""
    parts = []
    if table.empty:
        parts.append("No run has a readable `routing.npz`: nothing can be said.")
    else:
        rows = []
        shown = table[table["label"].isin([DOMAIN_LABEL, TYPE_LABEL])]
        for (variant, layer, label), runs in shown.groupby(
            ["variant", "layer", "label"], sort=False
        ):
            significant = int((runs["p_permutation"] < 0.05).sum())
            rows.append(
                [variant, str(layer), label, number(runs["bits"].mean(), 3),
                 _interval_over_seeds(runs["bits"]),
                 number(runs["permuted_mean"].mean(), 3),
                 number(100 * runs["share_of_label"].mean(), 1) + "%",
                 f"{significant} of {len(runs)}"]
            )  # fmt: skip
        header = ["variant", "layer", "label", "bits", "95% interval", "permuted labels",
                  "of the label's entropy", "seeds with p < 0.05"]  # fmt: skip
        parts.append(markdown(header, rows))
        parts.append(_against_text(against))
    parts.extend(f"- Not read: {problem}" for problem in problems)
    return "\n\n".join(parts)


def _interval_over_seeds(values: pd.Series) -> str:
    found = paired_difference(values.tolist())
    return interval(found.low, found.high, 3, signed=False)


def _against_text(against: pd.DataFrame) -> str:
    if against.empty:
        return (
            "The suite has no finished null model (frozen or hash router) of the same shape: none "
            "of the figures above is evidence of specialisation."
        )
    shown = against[against["label"].isin([DOMAIN_LABEL, TYPE_LABEL])]
    rows = [
        [row.variant, row.null, str(row.layer), row.label, str(row.n), number(row.bits, 3),
         number(row.bits_null, 3), number(row.mean, 3, signed=True),
         interval(row.low, row.high, 3), probability(row.p_holm), row.verdict]
        for row in shown.itertuples(index=False)
    ]  # fmt: skip
    header = ["variant", "null model", "layer", "label", "n", "bits", "null's bits", "difference",
              "95% interval", "p", "verdict"]  # fmt: skip
    counts = shown["verdict"].value_counts()
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"Against the null models, of {len(shown)} differences: {summary}.\n\n" + markdown(
        header, rows
    )


def collapse_section(study: CollapseStudy) -> str:
    """How often runs collapsed, and whether the warning would have helped."""
    if study.runs.empty:
        return "No run has logged its experts' shares: nothing can be said."
    parts = [_collapse_table(study)]
    if not study.collapsed:
        parts.append(
            f"No run collapsed, so there is nothing to foresee and no ROC. The warning was raised "
            f"in {share_of(study.false_alarms, study.healthy)} healthy runs: false alarms."
        )
        return "\n\n".join(parts)
    ill = study.runs[study.runs["judged"] & study.runs["collapsed"]]
    lead = ill["lead_steps"].dropna()
    text = (
        f"{study.collapsed} runs collapsed and {study.healthy} did not. The warning came before "
        f"the onset in {study.warned} of {study.collapsed} collapses"
    )
    if len(lead):
        own = (ill["collapse_step"] - ill["onset_step"]).median()
        text += (
            f", {number(lead.median(), 0)} steps before the detector (median; range "
            f"{number(lead.min(), 0)} to {number(lead.max(), 0)}; the share itself is above the "
            f"threshold {number(own, 0)} steps before)"
        )
    text += f". It was raised in {share_of(study.false_alarms, study.healthy)} healthy runs."
    parts.append(text)
    if study.ranking.empty:
        parts.append("Every judged run collapsed: without healthy runs there is no ROC.")
    else:
        ranked = [
            [row.score, number(row.auc, 3), probability(row.p)]
            for row in study.ranking.itertuples(index=False)
        ]
        parts.append(markdown(["score before the onset", "AUC", "p (Mann-Whitney)"], ranked))
    parts.append(
        f"The warning: a line through an expert's last {WINDOW} logged shares passes the "
        f"detector's threshold within {HORIZON} checks. Runs of the same variant are not "
        "independent evidence about other variants: a ROC over variants that differ in kind "
        "mostly says which variant it is."
    )
    return "\n\n".join(parts)


def _collapse_table(study: CollapseStudy) -> str:
    rows = []
    for variant, runs in study.runs.groupby("variant", sort=False):
        judged = runs[runs["judged"]]
        rows.append(
            [str(variant), share_of(int(judged["collapsed"].sum()), len(judged)),
             share_of(int(judged["warning_step"].notna().sum()), len(judged)),
             number(runs["largest_share"].mean(), 2),
             "" if len(judged) else "cannot collapse: the threshold is not below 1 / top-k"]
        )  # fmt: skip
    header = ["variant", "collapsed", "warned of", "largest share (mean of seeds)", "note"]
    return markdown(header, rows)
