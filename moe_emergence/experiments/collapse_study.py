"""Could a collapse have been foreseen? A causal score of the router's load, judged over runs.

The collapse is that of the trainer's detector. Its onset is the first check of the streak that
made it; a warning counts only if it is earlier than the onset, since from then on the share itself
says so.

Letters: S logged steps, N layers, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from moe_emergence.experiments.collect import Records
from moe_emergence.training.collapse import CollapseDetector

Floats = npt.NDArray[np.float64]

WINDOW = 5
"""Logged steps that the forecast fits its line to."""
HORIZON = 5
"""Collapse checks that the forecast looks ahead."""

SCORES = ("forecast", "share", "concentration")


@dataclass(frozen=True)
class Load:
    """Shares of the assignments in one run, by layer (S, E), at the logged steps (S,)."""

    steps: npt.NDArray[np.int64]
    fractions: Mapping[int, Floats]

    @property
    def largest_share(self) -> Floats:
        """(S,) of any expert of any layer."""
        return np.max([shares.max(axis=1) for shares in self.fractions.values()], axis=0)


@dataclass(frozen=True)
class Detected:
    """A collapse, with the first check of its streak."""

    step: int
    onset: int
    layer: int
    expert: int


def detect(load: Load, threshold: float, checks: int, every: int) -> Detected | None:
    """The first collapse that the trainer's detector would report on the logged shares.

    Args:
        load: logged shares; those of steps that are no multiple of `every` are not checked, unless
            none is.
        threshold, checks: of the detector.
        every: steps between checks.
    """
    places = np.flatnonzero(load.steps % every == 0)
    if not places.size:
        places = np.arange(load.steps.size)
    detector = CollapseDetector(threshold, checks)
    for turn, place in enumerate(places):
        shares = {layer: values[place].tolist() for layer, values in load.fractions.items()}
        found = detector.check(int(load.steps[place]), shares)
        if found is not None:
            onset = int(load.steps[places[turn - checks + 1]])
            return Detected(found.step, onset, found.layer, found.expert)
    return None


def forecast_score(load: Load, horizon: float) -> Floats:
    """(S,) the largest share to be expected `horizon` steps ahead, from the past alone.

    A line is fitted to each expert's last `WINDOW` shares and followed from the newest one; a
    share that falls is not followed. The first two steps have no line: there it is the share.
    """
    score = load.largest_share.copy()
    for now in range(2, load.steps.size):
        past = slice(max(0, now - WINDOW + 1), now + 1)
        for shares in load.fractions.values():
            slopes = np.polyfit(load.steps[past] - load.steps[now], shares[past], deg=1)[0]
            ahead = shares[now] + np.maximum(slopes, 0.0) * horizon
            score[now] = max(score[now], float(ahead.max()))
    return np.minimum(score, 1.0)


def concentration_score(load: Load) -> Floats:
    """(S,) one minus the load's entropy over log E, of the most uneven layer; 0 is uniform."""
    per_layer = [
        1 - stats.entropy(shares, axis=1) / np.log(max(2, shares.shape[1]))
        for shares in load.fractions.values()
    ]
    return np.max(per_layer, axis=0)


def scores(load: Load, horizon: float) -> dict[str, Floats]:
    """Every score of `SCORES` at every logged step; none looks past its own step."""
    return {
        "forecast": forecast_score(load, horizon),
        "share": load.largest_share,
        "concentration": concentration_score(load),
    }


def loads(records: Records) -> dict[tuple[str, int], Load]:
    """The logged shares of every mixture run that has any."""
    found = {}
    for key, run in records.fractions.groupby(["variant", "seed"], sort=False):
        unique = run.drop_duplicates(["step", "layer", "expert"], keep="last")
        table = unique.pivot(index="step", columns=["layer", "expert"], values="fraction").dropna()
        layers = table.columns.get_level_values("layer").unique()
        fractions = {int(layer): table[layer].sort_index(axis=1).to_numpy() for layer in layers}
        if len(table):
            found[key] = Load(table.index.to_numpy(dtype=np.int64), fractions)
    return found


def judge_runs(records: Records) -> pd.DataFrame:
    """One row per mixture run: collapse, onset, warning, lead time and scores.

    `judged` is False where the detector could never fire (its threshold is at least 1 / top-k).
    A warning is the first step at which the forecast exceeds the detector's threshold; steps from
    an onset on are not looked at. `score_...` is the highest such value of a score, nan where
    there was no step before the onset. Lead times are in steps.
    """
    rows = []
    for (variant, seed), load in loads(records).items():
        if (variant, seed) not in records.configs:
            continue  # listed among the broken runs
        monitor = records.configs[variant, seed]["monitor"]
        top_k = int(records.setting(variant, seed, "model.top_k"))
        threshold, every = monitor["collapse_threshold"], monitor["collapse_every"]
        found = detect(load, threshold, monitor["collapse_checks"], every)
        early = load.steps < found.onset if found else np.ones(load.steps.size, dtype=bool)
        by_name = scores(load, HORIZON * every)
        warned = load.steps[early & (by_name["forecast"] > threshold)]
        warning = int(warned[0]) if warned.size else None
        row: dict[str, Any] = {
            "variant": variant,
            "seed": seed,
            "judged": threshold < 1 / top_k,
            "largest_share": float(load.largest_share.max()),
            "collapsed": found is not None,
            "onset_step": found.onset if found else None,
            "collapse_step": found.step if found else None,
            "layer": found.layer if found else None,
            "expert": found.expert if found else None,
            "warning_step": warning,
            "lead_steps": found.step - warning if found and warning is not None else None,
            "lead_of_onset": found.onset - warning if found and warning is not None else None,
        }
        for name, values in by_name.items():
            row[f"score_{name}"] = float(values[early].max()) if early.any() else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class CollapseStudy:
    """The runs, how well each score tells them apart, and the alarms of the forecast."""

    runs: pd.DataFrame
    roc: pd.DataFrame
    """score, false_positive_rate, true_positive_rate, threshold."""
    ranking: pd.DataFrame
    """score, auc, p (Mann-Whitney: the score ranks collapsing runs no higher)."""
    collapsed: int
    healthy: int
    warned: int
    """Collapsed runs with a warning before the onset."""
    false_alarms: int
    """Healthy runs with a warning."""


def study_collapse(records: Records) -> CollapseStudy:
    """Judge the early warning over all mixture runs; no ROC without both kinds of runs."""
    runs = judge_runs(records)
    judged = runs[runs["judged"]] if len(runs) else runs
    ill = judged[judged["collapsed"]] if len(judged) else judged
    well = judged[~judged["collapsed"]] if len(judged) else judged
    curves: list[pd.DataFrame] = []
    ranking: list[dict[str, Any]] = []
    if len(ill) and len(well):
        for name in SCORES:
            # a collapse with nothing before it could not be foreseen: the lowest score there is
            values = judged[f"score_{name}"].fillna(-1.0).to_numpy()
            truth = judged["collapsed"].to_numpy(dtype=bool)
            false, true, thresholds = roc_curve(truth, values, drop_intermediate=False)
            curves.append(
                pd.DataFrame(
                    {
                        "score": name,
                        "false_positive_rate": false,
                        "true_positive_rate": true,
                        "threshold": thresholds,
                    }
                )
            )
            p = stats.mannwhitneyu(values[truth], values[~truth], alternative="greater").pvalue
            ranking.append({"score": name, "auc": roc_auc_score(truth, values), "p": float(p)})
    return CollapseStudy(
        runs,
        pd.concat(curves) if curves else pd.DataFrame(),
        pd.DataFrame(ranking),
        len(ill),
        len(well),
        int(ill["warning_step"].notna().sum()) if len(ill) else 0,
        int(well["warning_step"].notna().sum()) if len(well) else 0,
    )
