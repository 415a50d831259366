"""Every product of the expert MLP under many configurations, and the layer under the best ones.

Letters: T tokens, H model width, F expert width, E experts, K experts per token.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.program import Fields, OutOfTime, Setting
from benchmarks.stopwatch import Work, device_seconds, interleave
from benchmarks.workloads import Case, Shape, make_problem
from emergence_kernels import expert_mlp, sort_by_expert
from emergence_kernels.gpu.compiling import CompileJob, compile_in_parallel
from emergence_kernels.gpu.defaults import Target, default_plan, target_of
from emergence_kernels.gpu.gemm_config import PRODUCTS, GemmConfig, GemmPlan, Product, rows_bucket
from emergence_kernels.gpu.launch import recorded_launches
from emergence_kernels.gpu.tuning import MLPShape, Run, agrees, product_runs
from moe_emergence.cuda_graph import CudaCapture

SHAPES = (
    Shape("1k", 1024, 768, 3072, 8, 1, "the predecessor's micro-batch"),
    Shape("16k", 16384, 768, 3072, 8, 1, "a large batch"),
    Shape("fine-16k", 16384, 256, 256, 64, 8, "many narrow experts"),
    Shape("4k", 4096, 768, 3072, 8, 1, "the batch of a training step"),
)
TINY = (Shape("tiny", 48, 32, 64, 4, 1, "for the rehearsal"),)


def variants(product: Product, rows: int) -> list[GemmConfig]:
    """Configurations worth a look for experts of `rows` rows."""
    tiles = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (64, 256, 8)]
    tiles += [(64, 256, 4), (128, 256, 8)]
    if rows >= 256 or product == "weight_grad":
        tiles += [(256, 128, 8)]
    found = [GemmConfig(128, 128, 64, 8, 3), GemmConfig(64, 128, 64, 4, 3)]
    for block_m, block_n, warps in tiles:
        base = GemmConfig(block_m, block_n, 64, warps, 3, tma=True)
        deep = dataclasses.replace(base, stages=4)
        found += [base, deep, dataclasses.replace(deep, persistent=True)]
        found += [dataclasses.replace(deep, stages=6)]
        if product == "weight_grad":
            found += [dataclasses.replace(base, block_k=128, stages=2)]
            found += [dataclasses.replace(base, block_k=128)]
    return [c for c in found if (c.block_m + c.block_n) * c.block_k * 2 * c.stages <= 228_000]


def sweep(setting: Setting) -> Iterator[Fields]:
    """One row per shape, product and configuration, then one per shape with the best of all."""
    device = torch.device(setting.device)
    for shape in TINY if setting.tiny else SHAPES:
        dtype = torch.bfloat16 if setting.device == "cuda" else torch.float32
        mlp = MLPShape(
            shape.tokens, shape.hidden, shape.width, shape.experts, shape.top_k, "gelu_tanh", dtype
        )
        runs, precision = product_runs(mlp, device)
        bucket = rows_bucket(shape.rows, shape.experts)
        target = target_of(device)
        default = default_plan(target, dtype, precision, bucket, gated=False)
        unmeasured = dataclasses.replace(target, name="an architecture that nobody measured")
        elsewhere = default_plan(unmeasured, dtype, precision, bucket, gated=False)
        todo: dict[Product, list[GemmConfig]] = {}
        for product in PRODUCTS:
            start: GemmConfig = getattr(default, product)
            others = [] if setting.tiny else variants(product, bucket)
            todo[product] = list(dict.fromkeys([start, *others]))
        resources = {}
        if setting.device == "cuda":
            started = time.time()
            resources = compile_all(runs, todo, target, setting)
            yield {
                "shape": shape.name,
                "kernels": len(resources),
                "compile_s": round(time.time() - started, 1),
            }
        best, cut_short = {}, False
        for product, configs in todo.items():
            expected = runs[product](configs[0])
            fastest = None
            for config in configs:
                if time.time() > setting.deadline - 5:
                    cut_short = True
                    break
                row = {"shape": shape.name, "product": product, "config": describe(config)}
                row |= resources.get((product, config), {})
                if not agrees(product, config, runs[product], expected):
                    yield row | {"seconds": None}
                    continue
                seconds = _seconds(runs[product], config, setting.device)
                flops = 2 * shape.rows * shape.hidden * shape.width
                yield row | {"seconds": seconds, "tflops": round(flops / seconds / 1e12, 1)}
                if fastest is None or seconds < fastest[1]:
                    fastest = config, seconds
            best[product] = fastest[0] if fastest else configs[0]
        plans = {"default": default, "elsewhere": elsewhere, "best": GemmPlan(**best)}
        yield from _whole(shape, plans, setting)
        if cut_short:
            raise OutOfTime


def describe(config: GemmConfig) -> str:
    """Short and readable."""
    flags = [n for n in ("persistent", "tma", "specialize") if getattr(config, n)]
    size = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return " ".join([size, f"w{config.warps}", f"s{config.stages}", *flags])


def _seconds(run: Run, config: GemmConfig, device: str) -> float:
    if device == "cuda":
        return device_seconds(lambda: run(config))
    return interleave({"it": lambda: run(config)}, device, budget_s=0.0)["it"].median


def compile_all(
    runs: dict[Product, Run],
    todo: dict[Product, list[GemmConfig]],
    target: Target,
    setting: Setting,
) -> dict[tuple[Product, GemmConfig], Fields]:
    """Fill Triton's cache from all cores; registers and spills, or the error, of every kernel."""
    jobs = {}
    for product, configs in todo.items():
        for config in configs:
            with recorded_launches() as recorded:
                runs[product](config)
            jobs[product, config] = CompileJob.of(recorded[0], target)
    found: dict[tuple[Product, GemmConfig], Fields] = {}
    outcomes = compile_in_parallel([*jobs.values()], setting.workers)
    for key, outcome in zip(jobs, outcomes, strict=True):
        if isinstance(outcome, str):
            found[key] = {"error": outcome}
            continue
        found[key] = {
            "registers": outcome.registers,
            "spilled": outcome.spilled_bytes,
            "shared": outcome.shared_bytes,
            "instruction": outcome.instruction,
        }
    return found


def _whole(shape: Shape, plans: dict[str, GemmPlan], setting: Setting) -> Iterator[Fields]:
    """The layer forward and backward under every plan, in turns."""
    dtype = "bf16" if setting.device == "cuda" else "fp32"
    problem = make_problem(Case(shape, "balanced", dtype), setting.device)
    experts, decision = problem.experts, problem.decision
    leaves = list(problem.leaves.values())

    def full(plan: GemmPlan) -> object:
        permutation = sort_by_expert(decision.topk_experts, experts.num_experts)
        y_TH = expert_mlp(
            problem.x_TH, decision.topk_weights, experts.w1, experts.w1_bias, experts.w2,
            experts.w2_bias, permutation, experts.activation, plan,
        )  # fmt: skip
        return torch.autograd.grad(y_TH, leaves, problem.dy_TH)

    works: dict[str, Work] = {n: functools.partial(full, plan) for n, plan in plans.items()}
    if setting.device == "cuda":  # eager, all plans take what their launches take
        capture = CudaCapture(torch.device("cuda"))
        for work in 3 * [*works.values()]:
            capture.rehearse(work)
        works = {name: capture.record(work) for name, work in works.items()}
    found = interleave(works, setting.device, budget_s=0.2)
    for name, samples in found.items():
        seconds = samples.median
        flops = 12 * shape.rows * shape.hidden * shape.width
        yield {
            "shape": shape.name,
            "plan": name,
            "as": "graph" if setting.device == "cuda" else "eager",
            "seconds": seconds,
            "tflops": round(flops / seconds / 1e12, 1),
            "configs": {p: describe(getattr(plans[name], p)) for p in PRODUCTS},
        }
    path = Path(setting.out) / "plans.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept[shape.name] = json.loads(plans["best"].encoded)
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
