"""The layer suite: forward, backward and both, of every contestant on the same numbers."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import Absent, Contestant, Entry
from benchmarks.footprint import peak_bytes, saved_bytes
from benchmarks.gate import Gate, Judgement, evaluate
from benchmarks.peers import ENTRIES
from benchmarks.results import Record, Row
from benchmarks.roofline import Cost, Rates, layer_cost, measure_rates
from benchmarks.stopwatch import Samples, Work, graph_median, interleave, synchronize
from benchmarks.workloads import Case, Problem, make_problem

logger = logging.getLogger(__name__)

PHASES = ("forward", "backward", "full")
REFERENCE = "sequential"


class DeviceLost(RuntimeError):
    """A contestant failed such that nothing runs on the device in this process any more."""

    def __init__(self, contestant: str) -> None:
        super().__init__(f"{contestant} left the device unusable")
        self.contestant = contestant


@dataclass(frozen=True)
class Admitted:
    """A contestant that passed the gate, or needs not, and what is known about it so far."""

    contestant: Contestant
    row: Row


def measure_layer(
    case: Case,
    device: str,
    *,
    budget_s: float,
    entries: Sequence[Entry] = ENTRIES,
    phases: Sequence[str] = PHASES,
    on_rows: Record | None = None,
) -> list[Row]:
    """Measure every entry on `case`: one row per phase and contestant.

    Args:
        budget_s: seconds of timing, shared by the phases; the checks before come on top.
        entries: who takes part; "sequential" must, as the reference.
        on_rows: called with the rows of each phase as soon as they are known.
    """
    problem = make_problem(case, device)
    admitted, absent = admit(case, problem, entries)
    costs, rates = layer_cost(case, problem), measure_rates(device, case.dtype)
    rows: list[Row] = []
    for phase in phases:
        timed = _measure_phase(
            case, problem, phase, admitted, costs[phase], rates, budget_s / len(phases)
        )
        found = {
            row.contestant: row for row in (*timed, *(replace(r, phase=phase) for r in absent))
        }
        of_phase = [found[entry.name] for entry in entries]
        rows += of_phase
        if on_rows:
            on_rows(of_phase)
    return rows


def admit(
    case: Case, problem: Problem, entries: Sequence[Entry]
) -> tuple[list[Admitted], list[Row]]:
    """Build and check every entry: those that may be timed, and the rows of the others."""
    shape = case.shape
    blank = Row(
        "layer",
        case.name,
        "",
        "",
        "",
        parameters={
            "shape": shape.name,
            "tokens": shape.tokens,
            "hidden": shape.hidden,
            "width": shape.width,
            "experts": shape.experts,
            "top_k": shape.top_k,
            "routing": case.routing,
            "dtype": case.dtype,
            "activation": case.activation,
        },
    )
    gate = Gate(problem)
    admitted, absent = [], []
    for entry in entries:
        row = replace(blank, contestant=entry.name)
        try:
            contestant = entry.prepare(problem)
            row = replace(row, **_verdict(gate, contestant, problem))
            if row.verdict != "failed":
                admitted.append(Admitted(contestant, replace(row, **_memory(contestant, problem))))
                continue
        except Absent as error:
            row = replace(row, verdict=error.verdict, note=str(error))
        # whatever a peer raises is a row of the table, not the end of the run
        except Exception as error:  # noqa: BLE001
            row = error_row(row, error, problem.x_TH.device.type)
        absent.append(row)
    return admitted, absent


def _verdict(gate: Gate, contestant: Contestant, problem: Problem) -> dict[str, Any]:
    if contestant.is_floor:
        return {"verdict": "floor", "note": "computes another function of the same active FLOPs"}
    found = evaluate(contestant.run, contestant.leaves, problem.dy_TH)
    judgement: Judgement = gate.judge(contestant.canonical(found))
    return {
        "verdict": judgement.verdict,
        "note": judgement.note,
        "error_ratio": judgement.worst_ratio,
    }


def _memory(contestant: Contestant, problem: Problem) -> dict[str, Any]:
    owned = [*problem.leaves.values(), *contestant.leaves.values(), problem.decision.topk_experts]
    memory: dict[str, Any] = {"saved_bytes": saved_bytes(contestant.run, owned)}
    if problem.x_TH.is_cuda:
        memory["peak_bytes"] = peak_bytes(phase_work(contestant, problem.dy_TH, "full"))
    return memory


def phase_work(contestant: Contestant, dy_TH: Tensor, phase: str) -> Work:
    """What is timed in `phase`; backward runs again and again over one kept graph."""
    leaves = list(contestant.leaves.values())
    if phase == "forward":
        return contestant.run
    if phase == "full":

        def full() -> object:
            y_TH = contestant.run()
            return torch.autograd.grad(y_TH, leaves, dy_TH.to(y_TH.dtype))

        return full
    y_TH = contestant.run()
    upstream_TH = dy_TH.to(y_TH.dtype)
    return lambda: torch.autograd.grad(y_TH, leaves, upstream_TH, retain_graph=True)


def _measure_phase(
    case: Case,
    problem: Problem,
    phase: str,
    admitted: Sequence[Admitted],
    cost: Cost,
    rates: Rates,
    budget_s: float,
) -> list[Row]:
    device = problem.x_TH.device.type
    works: dict[str, Work] = {}
    rows: dict[str, Row] = {}
    for one in admitted:
        row = replace(one.row, phase=phase, flops=cost.flops, bytes=cost.bytes)
        try:
            work = phase_work(one.contestant, problem.dy_TH, phase)
            work()
            synchronize(device)
        except Exception as error:  # noqa: BLE001 - as in `admit`
            rows[row.contestant] = error_row(row, error, device)
            continue
        works[row.contestant], rows[row.contestant] = work, row
    samples = interleave(works, device, budget_s)
    limit_s = cost.seconds(rates)
    passed = [name for name in samples if rows[name].verdict == "passed"]
    for name, timed in samples.items():
        rows[name] = replace(
            rows[name],
            **timing_fields(name, samples, passed, REFERENCE),
            roofline_fraction=limit_s / timed.median,
            tokens_per_s=case.shape.tokens / timed.median,
        )
        # autograd runs a backward on the stream of its forward, outside of a capture
        if device == "cuda" and phase != "backward":
            try:
                rows[name] = replace(rows[name], graph_s=graph_median(works[name]))
            except Exception as error:  # noqa: BLE001 - as in `admit`
                note = error_row(rows[name], error, device).note
                notes = (rows[name].note, f"no CUDA graph: {note}")
                rows[name] = replace(rows[name], note="; ".join(filter(None, notes)))
    return list(rows.values())


def timing_fields(
    name: str, samples: Mapping[str, Samples], passed: Collection[str], reference: str
) -> dict[str, Any]:
    """Fields of the `Row` of `name` that follow from its samples and those it is held against.

    Args:
        passed: names that may be ranked.
        reference: what `speedup` is over; it need not be there.
    """
    timed = samples[name]
    fields: dict[str, Any] = {
        "median_s": timed.median,
        "quartiles_s": timed.quartiles,
        "rounds": len(timed.seconds),
    }
    if reference in samples:
        fields["speedup"], fields["speedup_quartiles"] = timed.speedup_over(samples[reference])
    ranking = sorted(passed, key=lambda one: samples[one].median)
    if name in ranking[:-1]:
        fields["next_slower"] = following = ranking[ranking.index(name) + 1]
        fields["lead"], fields["lead_quartiles"] = timed.speedup_over(samples[following])
    return fields


def error_row(row: Row, error: Exception, device: str) -> Row:
    """`row` for a contestant that raised `error`.

    Raises:
        DeviceLost: when the device no longer answers, as after an illegal memory access.
    """
    logger.warning("%s on %s: %s", row.contestant, row.group, error)
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise DeviceLost(row.contestant) from lost
    note = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return replace(row, verdict="error", note=note[:200])
