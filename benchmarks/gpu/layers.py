"""The layer on a GPU: right, then timed against its peers, then taken apart.

Letters: T tokens, H model width, F expert width, E experts, K experts per token.
"""

import concurrent.futures
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch

from benchmarks.gate import Gate, evaluate
from benchmarks.gpu.program import Fields, OutOfTime, Setting
from benchmarks.layer import measure_layer, phase_work
from benchmarks.peers import ENTRIES
from benchmarks.results import Row
from benchmarks.roofline import measure_rates
from benchmarks.stopwatch import Work, graph_median, host_seconds
from benchmarks.workloads import Case, Shape, make_problem
from emergence_kernels.processes import warm_processes
from moe_emergence.cuda_graph import NotCapturableError

DISPATCHERS = ("fused", "grouped", "sequential")
CONTESTANTS = (*DISPATCHERS, "dense-floor", "hf-grouped_mm")

CHECKED = (
    Shape("one-row", 1, 64, 128, 4, 1, "integers of 1"),
    Shape("odd", 131, 75, 197, 6, 3, "nothing is a multiple of anything"),
    Shape("predecessor", 1024, 768, 3072, 8, 1, "the predecessor's micro-batch"),
    Shape("predecessor-k2", 1024, 768, 3072, 8, 2, "several rows a token"),
    Shape("fine", 1024, 256, 256, 64, 8, "many narrow experts"),
    Shape("fine-16k", 16384, 256, 256, 64, 8, "a sort over several blocks"),
    Shape("16k", 16384, 768, 3072, 8, 1, "a large batch"),
)


def _shape(tokens: int, top_k: int = 1) -> Shape:
    return Shape(f"{tokens}-k{top_k}", tokens, 768, 3072, 8, top_k, "GPT-2's layer")


TIMED = (
    *(_shape(tokens) for tokens in (1024, 16384, 4096, 512, 65536, 2048, 8192, 32768)),
    _shape(1024, 2),
    _shape(16384, 2),
    Shape("fine-1k", 1024, 256, 256, 64, 8, "many narrow experts"),
    Shape("fine-16k", 16384, 256, 256, 64, 8, "many narrow experts"),
)
TINY = (Shape("tiny", 48, 16, 32, 4, 2, "for the rehearsal"),)


def correctness(setting: Setting) -> Iterator[Fields]:
    """Output and every gradient against the sequential path in fp64, as a multiple of its error.

    Cases share the device but have a process each, since what takes long is compiling.
    """
    dtypes = ("fp32",) if setting.device == "cpu" else ("bf16", "fp32", "fp16")
    shapes = TINY if setting.tiny else CHECKED
    cases = [Case(shape, "zipf", dtype) for dtype in dtypes for shape in shapes]
    context = warm_processes("torch", __name__)
    with concurrent.futures.ProcessPoolExecutor(setting.workers, mp_context=context) as pool:
        futures = [pool.submit(_correct, case, setting.device) for case in cases]
        for future in concurrent.futures.as_completed(futures):
            yield from future.result()


def _correct(case: Case, device: str) -> list[Fields]:
    problem = make_problem(case, device)
    gate = Gate(problem)
    rows = []
    for entry in ENTRIES:
        if entry.name not in DISPATCHERS:
            continue
        row: Fields = {"shape": case.shape.name, "dtype": case.dtype, "path": entry.name}
        try:
            contestant = entry.prepare(problem)
            found = evaluate(contestant.run, contestant.leaves, problem.dy_TH)
            row |= asdict(gate.judge(contestant.canonical(found)))
        except Exception as error:  # noqa: BLE001 - a row of the table
            row |= {"verdict": "error", "note": f"{type(error).__name__}: {error}"[:400]}
        rows.append(row)
    return rows


def layers(setting: Setting) -> Iterator[Fields]:
    """Rows of the layer suite, forward and full; a process for each case, one at a time.

    What a case does to its process (a capture that failed, memory in pieces) ends with it.
    """
    dtype = "bf16" if setting.device == "cuda" else "fp32"
    cases = [Case(shape, "balanced", dtype) for shape in (TINY if setting.tiny else TIMED)]
    if not setting.tiny:
        cases += [Case(_shape(1024), "zipf", dtype), Case(_shape(16384), "zipf", dtype)]
        # early, since time may run out
        cases[2:2] = [Case(_shape(tokens), "balanced", "fp32") for tokens in (1024, 16384)]
        cases += [Case(_shape(16384), "balanced", dtype, "swiglu")]
    context = warm_processes("torch", __name__)
    for case in cases:
        if time.time() > setting.deadline - 8:
            raise OutOfTime
        try:
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                yield from pool.submit(_measured, case, setting).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            yield {"group": case.name, "verdict": "error", "note": str(error)}


def _measured(case: Case, setting: Setting) -> list[Fields]:
    entries = tuple(e for e in ENTRIES if e.name in CONTESTANTS)
    budget_s = 0.05 if setting.tiny else 0.8
    rows = measure_layer(
        case, setting.device, budget_s=budget_s, entries=entries, phases=("forward", "full")
    )
    return [*map(_lean, rows)]


def _lean(row: Row) -> Fields:
    return {k: v for k, v in asdict(row).items() if v is not None and k != "parameters"}


def taken_apart(setting: Setting) -> Iterator[Fields]:
    """Rates of the device; of every dispatcher the host's time, the graph's, and each kernel's."""
    if setting.device == "cuda":
        rates = measure_rates("cuda", "bf16")
        yield {"what": "rates", **asdict(rates)}
    dtype = "bf16" if setting.device == "cuda" else "fp32"
    for shape in TINY if setting.tiny else (_shape(1024), _shape(16384), TIMED[-1]):
        problem = make_problem(Case(shape, "balanced", dtype), setting.device)
        for entry in ENTRIES:
            if entry.name not in (*DISPATCHERS, "dense-floor"):
                continue
            contestant = entry.prepare(problem)
            for phase in ("forward", "full"):
                work = phase_work(contestant, problem.dy_TH, phase)
                for _ in range(3):
                    work()
                row: Fields = {"shape": shape.name, "path": entry.name, "phase": phase}
                if setting.device == "cuda":
                    row |= {"host_s": host_seconds(work), **_graph_seconds(work)}
                yield row
            if entry.name != "sequential":
                yield from _kernels(shape.name, entry.name, work, setting)


def _graph_seconds(work: Work) -> Fields:
    try:
        return {"graph_s": graph_median(work)}
    except NotCapturableError as error:
        return {"no_graph": str(error)}


def _kernels(shape: str, path: str, work: Work, setting: Setting) -> Iterator[Fields]:
    activity = torch.profiler.ProfilerActivity
    cuda = setting.device == "cuda"
    rounds = 10 if cuda else 1
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        for _ in range(rounds):
            work()
        if cuda:
            torch.cuda.synchronize()
    for event in profile.key_averages() if cuda else []:
        yield {
            "shape": shape,
            "path": path,
            "kernel": event.key[:80],
            "calls": event.count / rounds,
            "us": round(event.self_device_time_total / rounds, 1),
        }
