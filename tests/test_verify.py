"""The certificate: the definition passes, every wrong dispatcher fails, and it says so.

Letters: T tokens, H model width, F expert width, E experts, K experts per token.
"""

import importlib
import json
import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe_emergence import verify
from moe_emergence.certificate import (
    Case,
    available_dtypes,
    certify,
    get_arithmetic,
    grid,
    properties,
    random_cases,
)
from moe_emergence.cli import dispatch_verb
from moe_emergence.entry import run
from moe_emergence.moe import Experts, get_dispatcher
from moe_emergence.verify import work

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
DTYPES = available_dtypes(CPU)
NAMED = {(case.name, case.activation): case for case in grid(CPU)}
SMALL = tuple(
    NAMED[name, "gelu_tanh"]
    for name in ("top-1", "top-2", "empty experts", "T=130", "T=2048", "constant experts")
)


def judged(dispatcher, dtype: str, cases=SMALL, seed: int = 0):
    return certify({"ours": dispatcher}, cases, [], [get_arithmetic(dtype, CPU)], CPU, seed)


# wrong dispatchers ------------------------------------------------------------------------------


class _Tamper(torch.autograd.Function):
    """Identity whose gradient is changed."""

    @staticmethod
    def forward(ctx, tensor, change):
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient.clone()), None


@dataclass
class WithGradient:
    """The right path with the gradient of one input changed: "x", "weights" or a parameter."""

    of: str
    change: object

    def __call__(
        self, x_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor, experts: Experts
    ) -> Tensor:
        def tampered(name, tensor):
            return _Tamper.apply(tensor, self.change) if name == self.of else tensor

        other = _View(experts, {n: tampered(n, p) for n, p in experts.named_parameters()})
        weights_TK = tampered("weights", weights_TK)
        return get_dispatcher("sequential")(tampered("x", x_TH), chosen_TK, weights_TK, other)


class _View:
    """Experts with other tensors in place of the parameters."""

    def __init__(self, experts: Experts, tensors: dict[str, Tensor]) -> None:
        self.activation, self.num_experts = experts.activation, experts.num_experts
        self.w1, self.w2 = tensors["w1"], tensors["w2"]
        self.w1_bias, self.w2_bias = tensors.get("w1_bias"), tensors.get("w2_bias")

    unbind = Experts.unbind


def swapped_expert(x_TH, chosen_TK, weights_TK, experts):
    """One token goes to its neighbour expert."""
    chosen_TK = chosen_TK.clone()
    others = [e for e in range(experts.num_experts) if e not in chosen_TK[0].tolist()]
    chosen_TK[0, 0] = others[0]
    return get_dispatcher("sequential")(x_TH, chosen_TK, weights_TK, experts)


def dropped_tail(x_TH, chosen_TK, weights_TK, experts):
    y_TH = get_dispatcher("sequential")(x_TH, chosen_TK, weights_TK, experts)
    keep_T1 = torch.ones(len(y_TH), 1, dtype=y_TH.dtype)
    keep_T1[-1:] = 0
    return y_TH * keep_T1


def low_precision_combine(x_TH, chosen_TK, weights_TK, experts):
    """Weights and partial sums of a token rounded to the dtype of the rows."""
    y_TH = torch.zeros_like(x_TH)
    for e, (w1, b1, w2, b2) in enumerate(experts.unbind()):
        token_N, slot_N = torch.where(chosen_TK == e)
        pre_NF = x_TH[token_N] @ w1 + b1
        out_NH = torch.nn.functional.gelu(pre_NF, approximate="tanh") @ w2 + b2
        weight_N1 = weights_TK[token_N, slot_N].unsqueeze(-1).to(out_NH.dtype)
        y_TH = y_TH.index_add(0, token_N, out_NH * weight_N1)
    return y_TH


def ignores_weights(x_TH, chosen_TK, weights_TK, experts):
    ones_TK = torch.ones_like(weights_TK) + 0 * weights_TK
    return get_dispatcher("sequential")(x_TH, chosen_TK, ones_TK, experts)


class _LowSum(torch.autograd.Function):
    """Adds b to rows; its gradient is summed row by row in the dtype of the rows."""

    @staticmethod
    def forward(ctx, rows, b):
        return rows + b

    @staticmethod
    def backward(ctx, gradient):
        total = torch.zeros_like(gradient[:1].sum(0))
        for row in gradient:
            total = total + row
        return gradient, total


def low_precision_bias_sum(x_TH, chosen_TK, weights_TK, experts):
    y_TH = torch.zeros(x_TH.shape)
    for e, (w1, b1, w2, b2) in enumerate(experts.unbind()):
        token_N, slot_N = torch.where(chosen_TK == e)
        pre_NF = x_TH[token_N] @ w1 + b1
        out_NH = torch.nn.functional.gelu(pre_NF, approximate="tanh") @ w2
        weight_N1 = weights_TK[token_N, slot_N].unsqueeze(-1)
        y_TH = y_TH.index_add(0, token_N, _LowSum.apply(out_NH, b2).float() * weight_N1)
    return y_TH.to(x_TH.dtype)


def wrong_dtype(x_TH, chosen_TK, weights_TK, experts):
    return get_dispatcher("sequential")(x_TH, chosen_TK, weights_TK, experts).double()


def raising(x_TH, chosen_TK, weights_TK, experts):
    raise RuntimeError("illegal memory access\nand a long story")


def empty_nan(gradient: Tensor) -> Tensor:
    unused_E = (gradient == 0).flatten(1).all(dim=1)
    gradient[unused_E] = float("nan")
    return gradient


def empty_nonzero(gradient: Tensor) -> Tensor:
    unused_E = (gradient == 0).flatten(1).all(dim=1)
    gradient[unused_E] = 1e-7
    return gradient


def one_wrong_row(gradient: Tensor) -> Tensor:
    gradient[-1] *= 1.5
    return gradient


BROKEN = {
    "swapped expert of one token": (swapped_expert, "fp32", "y"),
    "swapped expert of one token in bf16": (swapped_expert, "bf16", "y"),
    "missing bias gradient": (
        WithGradient("w2_bias", lambda g: None),
        "fp32",
        "w2_bias: no gradient",
    ),
    "zero bias gradient": (WithGradient("w1_bias", torch.zeros_like), "fp32", "w1_bias"),
    "zero weight gradient": (WithGradient("w1", torch.zeros_like), "bf16", "w1"),
    "transposed signs": (WithGradient("w2", torch.neg), "fp16", "w2"),
    "dropped tail row": (dropped_tail, "fp32", "y"),
    "dropped tail row under autocast": (dropped_tail, "autocast-bf16", "y"),
    "permuted rows of dX": (WithGradient("x", lambda g: g.roll(1, 0)), "fp32", "x"),
    "one wrong row of dX in bf16": (WithGradient("x", one_wrong_row), "bf16", "x"),
    "1% too much": (WithGradient("w1", lambda g: g * 1.01), "fp32", "w1"),
    "1% too much in fp16": (WithGradient("w1", lambda g: g * 1.01), "fp16", "w1"),
    "a millionth too much": (WithGradient("w2", lambda g: g * (1 + 1e-6)), "fp64", "w2"),
    "no gradient to the router": (WithGradient("weights", torch.zeros_like), "fp32", "router"),
    "weights ignored": (ignores_weights, "fp32", "y"),
    "bf16 combine": (low_precision_combine, "bf16", "y"),
    "fp16 combine": (low_precision_combine, "fp16", "y"),
    "bf16 sum of a bias gradient": (low_precision_bias_sum, "bf16", "w2_bias"),
    "NaN for an empty expert": (WithGradient("w1", empty_nan), "fp32", "w1: not finite"),
    "not zero for an empty expert": (
        WithGradient("w1_bias", empty_nonzero),
        "fp32",
        "w1_bias: not zero",
    ),
    "wrong dtype": (wrong_dtype, "bf16", "y: torch.float64 instead of torch.bfloat16"),
    "an exception": (raising, "fp32", "RuntimeError: illegal memory access"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_dispatcher_fails_where_it_is_wrong(name) -> None:
    dispatcher, dtype, words = BROKEN[name]
    certificate = judged(dispatcher, dtype)
    assert not certificate.certified
    failures = [row.note for row in certificate.rows if row.status == "failed"]
    assert any(words in note for note in failures), failures


def test_rounding_products_to_tf32_fails_in_fp32() -> None:
    def rounded(tensor):
        return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)

    def tf32(x_TH, chosen_TK, weights_TK, experts):
        tensors = {n: rounded(p.detach()) + p - p.detach() for n, p in experts.named_parameters()}
        return get_dispatcher("sequential")(x_TH, chosen_TK, weights_TK, _View(experts, tensors))

    certificate = judged(tf32, "fp32")
    assert certificate.count("failed") == len(SMALL)


def test_a_path_that_depends_on_the_run_is_not_repeatable() -> None:
    calls = iter(range(1000))

    def wandering(x_TH, chosen_TK, weights_TK, experts):
        return get_dispatcher("sequential")(x_TH, chosen_TK, weights_TK, experts) * (
            1 + 1e-6 * next(calls)
        )

    rows = properties(CPU)[:1] + properties(CPU)[3:4]
    certificate = certify({"ours": wandering}, [], rows, [get_arithmetic("fp32", CPU)], CPU)
    assert certificate.count("failed") == 2


def test_a_path_that_keeps_everything_is_heavy_only_where_light_is_promised() -> None:
    memory = [row for row in properties(CPU) if row.name == "memory"]
    sequential = get_dispatcher("sequential")
    certificate = certify(
        {"fused": sequential, "other": sequential}, [], memory, [get_arithmetic("fp32", CPU)], CPU
    )
    assert [row.status for row in certificate.rows] == ["failed", "not promised"]
    assert "MB kept for backward" in certificate.rows[0].note


# right ones -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_definition_passes_everywhere(dtype) -> None:
    light = [case for case in grid(CPU, ["gelu_tanh"]) if case.name != "realistic"]
    certificate = judged(get_dispatcher("sequential"), dtype, light)
    assert certificate.certified
    assert certificate.count("passed") == len(light)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_cases_pass_whatever_the_seed(dtype, seed) -> None:
    certificate = judged(get_dispatcher("fused"), dtype, random_cases(8, seed), seed)
    assert certificate.certified, [r.note for r in certificate.rows if r.status == "failed"]


def test_the_same_seed_gives_the_same_certificate_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again = (judged(get_dispatcher("fused"), "bf16", seed=3) for _ in range(2))
    assert first == again
    assert first != judged(get_dispatcher("fused"), "bf16", seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert random_cases(5, 1) == random_cases(5, 1) != random_cases(5, 2)


def test_every_tensor_is_judged() -> None:
    certificate = judged(get_dispatcher("fused"), "fp32", [NAMED["top-2", "gelu_tanh"]])
    assert {verdict.tensor for verdict in certificate.rows[0].tensors} == {
        *("y", "x", "w1", "w1_bias", "w2", "w2_bias", "routing weights"),
        *("router by task", "router by balance", "router by z"),
    }


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("frozen experts", {"w1", "w1_bias", "w2", "w2_bias"}),
        ("frozen x", {"x"}),
        ("frozen router", {"routing weights", "router by task", "router by z"}),
        ("hash router", {"routing weights", "router by task", "router by z"}),
        ("K=E", {"router by balance"}),
    ],
)
def test_what_is_frozen_has_no_gradient(name, without) -> None:
    case = next(case for case in grid(CPU, ["gelu_tanh"]) if case.name == name)
    certificate = judged(get_dispatcher("fused"), "fp32", [case])
    assert certificate.certified
    assert not {verdict.tensor for verdict in certificate.rows[0].tensors} & without


def test_a_refusal_neither_passes_nor_fails() -> None:
    cases = [NAMED["top-1", "gelu_tanh"], NAMED["H=5 F=33", "gelu_tanh"]]
    certificate = judged(get_dispatcher("grouped"), "fp32", cases)
    assert [row.status for row in certificate.rows] == ["passed", "refused"]
    assert certificate.certified
    assert "widths" in certificate.rows[1].note
    assert not judged(get_dispatcher("grouped"), "fp64", cases).certified, "nothing was certified"


def test_a_broken_path_does_not_stop_the_others() -> None:
    paths = {"raising": raising, "fused": get_dispatcher("fused")}
    certificate = certify(paths, SMALL[:2], [], [get_arithmetic("fp32", CPU)], CPU)
    statuses = [(row.dispatch, row.status) for row in certificate.rows]
    assert statuses == [("raising", "failed"), ("fused", "passed")] * 2


def test_cases_have_names_of_their_own_and_reasons() -> None:
    assert len(NAMED) == len(grid(CPU))
    assert all(isinstance(case, Case) and case.reason for case in grid(CPU))
    one = grid(CPU, ["swiglu"])
    assert {case.activation for case in one} == {"swiglu"}
    assert {case.name for case in one} == {name for name, _ in NAMED} - {"constant experts"}


# the command ------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_every_figure(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    written = tmp_path / "certificate.json"
    flags = ["--dispatch", "fused", "grouped", "--dtype", "fp32", "--device", "cpu"]
    code = run(
        verify.main, [*flags, "--cases", "1", "--activation", "swiglu", "--json", str(written)]
    )
    out = capsys.readouterr().out
    assert code == 0, out
    assert out.splitlines()[-1].startswith("verdict: certified: fused, grouped on cpu (")
    assert "fused against sequential" in out
    assert "refused: grouped, fp32 " in out
    content = json.loads(written.read_text())
    assert content["verdict"] == "certified"
    assert content["machine"]["torch"] == torch.__version__
    assert content["counts"]["refused"] > 0
    figures = content["rows"][0]["tensors"][0]
    assert {"tensor", "rms", "worst", "sequential_rms", "rms_bound", "worst_bound"} < set(figures)


def test_what_was_found_before_an_interruption_is_kept(tmp_path, monkeypatch) -> None:
    module = importlib.import_module("moe_emergence.certificate.certify")
    compare, calls = module._compare_alone, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compare(*arguments)

    monkeypatch.setattr(module, "_compare_alone", interrupted)
    monkeypatch.setattr(work._Writer, "_EVERY", 0.0)
    written = tmp_path / "certificate.json"
    with pytest.raises(KeyboardInterrupt):
        verify.main(["--dtype", "fp64", "--device", "cpu", "--cases", "0", "--json", str(written)])
    content = json.loads(written.read_text())
    assert content["verdict"] == "unfinished"
    assert [row["name"] for row in content["rows"]] == [case.name for _, case, *_ in calls[:2]]
    assert content["counts"]["passed"] == 2
    assert os.listdir(tmp_path) == ["certificate.json"]


def test_several_processes_find_the_same_in_the_same_order() -> None:
    arithmetics, seen = [get_arithmetic("fp32", CPU)], []
    paths = {"fused": get_dispatcher("fused")}
    alone = certify(paths, SMALL[:4], [], arithmetics, CPU)
    together = certify(paths, SMALL[:4], [], arithmetics, CPU, on_rows=seen.extend, jobs=2)
    assert together == alone
    assert {row.name for row in seen} == {row.name for row in alone.rows}


def test_a_failure_is_exit_code_1_and_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr("moe_emergence.verify.work.get_dispatcher", lambda name: dropped_tail)
    flags = ["--dtype", "fp64", "--device", "cpu", "--cases", "0", "--activation", "swiglu"]
    assert run(dispatch_verb, ["verify", *flags]) == 1
    out = capsys.readouterr().out
    assert "failed: fused, fp64, top-1 (swiglu): y: " in out
    assert out.splitlines()[-1].startswith("verdict: NOT CERTIFIED: fused on cpu (")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dtype", "tf32", "--device", "cpu"], "--dtype tf32: this cpu device"),
        (["--dispatch", "quick"], "quick"),
        (["--cases", "-1"], "--cases -1: give"),
        (["--json", "nowhere/at/all.json"], "--json nowhere/at/all.json: give a file"),
    ],
)
def test_settings_that_cannot_be_used_are_exit_code_2(flags, words, capsys) -> None:
    assert run(verify.main, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_fused_is_certified_on_the_gpu(capsys) -> None:
    code = run(verify.main, ["--device", "cuda", "--cases", "5"])
    assert code == 0, capsys.readouterr().out
