"""From a suite's folder to `report.md`, `figures/` and `tables/`."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from moe_emergence.analysis.figure_file import save
from moe_emergence.analysis.routing_record import RoutingRecord
from moe_emergence.analysis.token_types import token_types
from moe_emergence.csv_cells import csv_of
from moe_emergence.data.tokenizer import folder_tokenizer
from moe_emergence.disk import clear_unfinished, read_text, remove_file, write_text
from moe_emergence.experiments import figures, sections
from moe_emergence.experiments.caveats import caveats
from moe_emergence.experiments.collapse_study import CollapseStudy, loads, study_collapse
from moe_emergence.experiments.collect import Records, collect, final_losses
from moe_emergence.experiments.comparisons import compare
from moe_emergence.experiments.description import BASE, MARGIN, SuiteFolder, read_suite
from moe_emergence.experiments.lengths import lengths, lengths_section
from moe_emergence.experiments.modules import churn_section, modules_section
from moe_emergence.experiments.specialisation import (
    Classes,
    Resampling,
    TypesOf,
    against_nulls,
    specialisation,
)
from moe_emergence.printable import inert

logger = logging.getLogger(__name__)

REPORT = "report.md"


@dataclass(frozen=True)
class Evidence:
    """All tables of a report."""

    records: Records
    margin: float
    comparisons: pd.DataFrame
    specialisation: pd.DataFrame
    against_nulls: pd.DataFrame
    unread: list[str]
    lengths: pd.DataFrame
    collapse: CollapseStudy


def build_report(
    folder: Path,
    margin: float = MARGIN,
    resampling: Resampling | None = None,
    only: Sequence[str] = (),
) -> Path:
    """Write the report of a suite from its run folders alone; complete or not.

    Args:
        folder: the suite's folder, with `suite.json`.
        margin: nats per token within which two losses count as equivalent.
        resampling: how much is drawn for nulls and intervals.
        only: variants to report, with the comparisons among them; all without.

    Returns:
        The path of `report.md`; `figures/*.png` and `tables/*.csv` stand beside it.

    Raises:
        ValueError: when `suite.json` is missing or unusable, or lacks a variant of `only`, or the
            margin is not positive.
    """
    suite = read_suite(folder)
    records = collect(suite.only(only) if only else suite)
    evidence = gather(records, margin, resampling or Resampling())
    write_tables(evidence, folder / "tables")
    shown = write_figures(evidence, folder / "figures")
    path = folder / REPORT
    clear_unfinished(folder, only=REPORT)
    write_text(path, inert(report_text(evidence, shown)))
    logger.info("wrote %s", path)
    return path


def gather(records: Records, margin: float, resampling: Resampling) -> Evidence:
    """Do all the statistics."""
    table, unread = specialisation(records, tokenizer_types(records.suite), resampling)
    compared = compare(records, margin)
    return Evidence(
        records,
        margin,
        compared,
        table,
        against_nulls(table),
        unread,
        lengths(records, compared, table),
        study_collapse(records),
    )


def tokenizer_types(suite: SuiteFolder) -> TypesOf:
    """Types of a routing's tokens, with the tokenizer that the runs of the seed left behind."""
    known: dict[tuple[str, bytes, str], npt.NDArray[np.int8]] = {}

    def types(routing: RoutingRecord, seed: int, classes: Classes) -> npt.NDArray[np.int8] | None:
        folder = _tokenizer_folder(suite, seed)
        if folder is None or set(classes.values()) <= {"none"}:
            return None
        key = read_text(folder), routing.token_ids.tobytes(), str(classes)
        if key not in known:
            tokenizer = folder_tokenizer(str(folder.parent))
            found = np.zeros(routing.token_ids.shape, np.int8)
            for domain, token_class in enumerate(classes.values()):
                here = routing.domains == domain
                if token_class != "none":
                    found[here] = token_types(routing.token_ids[here], token_class, tokenizer)
            known[key] = found
        return known[key]

    return types


def _tokenizer_folder(suite: SuiteFolder, seed: int) -> Path | None:
    """A `tokenizer.json` of the seed: that of its base, or of any variant's model folder."""
    for variant in (BASE, *(v.name for v in suite.variants)):
        run = suite.run(variant, seed)
        for model in (run.final_model, run.best_model):
            if (model / "tokenizer.json").exists():
                return model / "tokenizer.json"
    return None


def largest_shares(records: Records) -> pd.DataFrame:
    """variant, seed, step and largest_share: of any expert of any layer."""
    frames = [
        pd.DataFrame(
            {"variant": variant, "seed": seed, "step": load.steps,
             "largest_share": load.largest_share}
        )
        for (variant, seed), load in loads(records).items()
    ]  # fmt: skip
    return pd.concat(frames) if frames else pd.DataFrame(columns=["variant"])


def write_tables(evidence: Evidence, folder: Path) -> None:
    """Every table there is as CSV, the numbers behind every figure included; no older ones."""
    clear_unfinished(folder)
    records, collapse = evidence.records, evidence.collapse
    for name, table in {
        "runs": records.runs,
        "losses": records.losses,
        "final_losses": final_losses(records),
        "comparisons": evidence.comparisons,
        "specialisation": evidence.specialisation,
        "specialisation_against_nulls": evidence.against_nulls,
        "lengths": evidence.lengths,
        "router_entropy": records.entropies,
        "largest_share": largest_shares(records),
        "churn": records.churn,
        "modules": records.modules,
        "collapse_runs": collapse.runs,
        "collapse_roc": collapse.roc,
        "collapse_ranking": collapse.ranking,
    }.items():
        path = folder / f"{name}.csv"
        if table.empty:
            remove_file(path)
        else:
            write_text(path, csv_of(table, float_format="%.6g"))


def write_figures(evidence: Evidence, folder: Path) -> set[str]:
    """Write the figures there are numbers for, and delete older ones; their names."""
    clear_unfinished(folder)
    shown = set()
    for name, figure in _figures(evidence):
        save(figure, folder / f"{name}.png")
        shown.add(name)
    for path in folder.glob("*.png"):
        if path.stem not in shown:
            remove_file(path)
    return shown


def _figures(evidence: Evidence) -> Iterator[tuple[str, Figure]]:
    records = evidence.records
    variants = [variant.name for variant in records.suite.variants]
    if len(evidence.comparisons) and (evidence.comparisons["n"] > 0).any():
        yield "comparisons", figures.plot_comparisons(evidence.comparisons, evidence.margin)
    if len(records.losses):
        yield "losses", figures.plot_losses(records.losses, variants, records.suite.comparisons)
    if len(evidence.specialisation):
        yield "specialisation", figures.plot_specialisation(evidence.specialisation)
    if len(evidence.lengths):
        yield "lengths", figures.plot_lengths(evidence.lengths)
    largest = largest_shares(records)
    if len(largest):
        key = next(iter(loads(records)))
        threshold = records.configs[key]["monitor"]["collapse_threshold"]
        yield "loads", figures.plot_loads(largest, variants, threshold)
    if len(evidence.collapse.roc):
        yield "warning", figures.plot_warning(evidence.collapse)


def report_text(evidence: Evidence, shown: set[str]) -> str:
    """The report as Markdown."""
    records = evidence.records
    suite = records.suite

    def picture(name: str, caption: str) -> str:
        return f"\n\n![{caption}](figures/{name}.png)" if name in shown else ""

    limits = "\n".join(f"- {caveat}" for caveat in caveats(records))
    parts = [
        f"# {suite.name}",
        suite.question,
        f"```bash\n{suite.command}\n```",
        f"Seeds: {', '.join(map(str, suite.seeds))}. Numbers behind every figure and table are in "
        "`tables/`.",
        "## Variants\n\n" + sections.variants_section(records),
        "## Runs\n\n" + sections.runs_section(records),
        "## Loss\n\nEvaluation lm_loss in nats per token, auxiliary losses not included: mean ± "
        "standard deviation over seeds.\n\n"
        + sections.losses_section(records)
        + picture("losses", "Evaluation loss over steps"),
        "## Comparisons\n\nFinal lm_loss of the variant minus that of its control, paired by seed "
        "(negative is better). Only pairs of the same data and schedule are compared.\n\n"
        + sections.comparisons_section(evidence.comparisons, evidence.margin)
        + picture("comparisons", "Paired differences with 95% intervals"),
        "## Specialisation\n\nInformation that the expert chosen for a token carries about its "
        "domain, and about its type within the domain.\n\n"
        + sections.specialisation_section(
            evidence.specialisation, evidence.against_nulls, evidence.unread
        )
        + picture("specialisation", "Information per variant and layer"),
        "## Length of training\n\n"
        + lengths_section(evidence.lengths)
        + picture("lengths", "Differences and information over the length of training")
        if len(evidence.lengths)
        else "",
        "## Churn\n\n" + churn_section(records.churn) if len(records.churn) else "",
        "## Modules\n\n" + modules_section(records.modules) if len(records.modules) else "",
        "## Collapse\n\n"
        + sections.collapse_section(evidence.collapse)
        + picture("loads", "Largest expert's share over steps")
        + picture("warning", "ROC of the early warning, and its lead"),
        "## Caveats\n\n" + limits,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
