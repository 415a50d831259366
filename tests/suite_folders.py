"""Suite folders written by hand, with answers that are known."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_emergence.config import SHIPPED, RunConfig
from moe_emergence.data.tokenizer import train_bpe
from moe_emergence.presets import demo
from moe_emergence.settings import to_dict

SEEDS = (0, 1, 2, 3, 4)
NUM_EXPERTS = 4
LAYERS = (2, 3)
STEPS = tuple(range(5, 101, 5))
TEXTS = (
    "def mean(values):\n    # the mean\n    return sum(values) / len(values)\n" * 4,
    "Tom has 12 apples and buys 3.5 more for $2. 12 + 3.5 = 15.5 apples, is it more?\n" * 4,
    "The people of America have never been afraid. They will not be, in 1941 or now.\n" * 4,
)


def uniform_shares(step: int, seed: int) -> Sequence[float]:
    """Shares of the experts that stay near uniform."""
    return np.random.default_rng([step, seed]).dirichlet([400] * NUM_EXPERTS).tolist()


def collapsing_shares(step: int, seed: int) -> Sequence[float]:
    """The first expert's share grows from a quarter to nine tenths, later for higher seeds."""
    first = 0.25 + 0.65 / (1 + np.exp(-(step - 50 - 4 * seed) / 8))
    return [float(first)] + [float((1 - first) / (NUM_EXPERTS - 1))] * (NUM_EXPERTS - 1)


def random_experts(domains: np.ndarray, length: int, seed: Any, top_k: int = 1) -> np.ndarray:
    """(R, L, K) experts that know nothing of the domain."""
    rng = np.random.default_rng(seed)
    scores = rng.random((len(domains), length, NUM_EXPERTS))
    return np.argsort(scores, axis=-1)[..., :top_k]


def specialists(domains: np.ndarray, length: int, seed: Any) -> np.ndarray:
    """(R, L, 1) the expert is the domain."""
    return np.broadcast_to(domains[:, None, None], (len(domains), length, 1))


@dataclass(frozen=True)
class VariantPlan:
    """What a variant's runs look like."""

    name: str
    compare_with: str | None = None
    matched: str = "steps"
    shift: float = 0.0
    model: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    shares: Any = uniform_shares
    experts: Any = random_experts
    top_k: int = 1


DENSE = VariantPlan("dense", model={"moe_layers": ()})
PLANS = (
    DENSE,
    VariantPlan("moe", "dense", shift=-0.05, experts=specialists),
    VariantPlan("no-lb", "moe", shift=-0.03, optim={"lb_coef": 0.0}, shares=collapsing_shares),
    VariantPlan("no-z", "moe", shift=-0.05, optim={"z_coef": 0.0}),
    VariantPlan("frozen", "moe", shift=0.02, model={"router": "frozen"}),
    VariantPlan("hash", "moe", shift=0.02, model={"router": "hash"}),
    VariantPlan("dense-flops", "moe", "flops", -0.06, {"moe_layers": ()}, {"max_steps": 120}),
)  # fmt: skip


def config_of(plan: VariantPlan, seed: int) -> RunConfig:
    """The configuration of one run."""
    start = demo()
    model = replace(start.model, moe_layers=LAYERS, num_experts=NUM_EXPERTS)
    model = replace(model, router="learned", router_init="random")
    model = replace(model, **plan.model)
    optim = replace(start.optim, max_steps=100, compare_dense=False, compare_null=False)
    optim = replace(optim, **plan.optim)
    monitor = replace(start.monitor, log_router_every=5, collapse_every=5)
    return replace(
        start, run_name=f"seed-{seed}", seed=seed, model=model, optim=optim, monitor=monitor
    )


def write_suite(
    folder: Path, plans: Sequence[VariantPlan] = PLANS, seeds: Sequence[int] = SEEDS
) -> Path:
    """Write a complete suite; returns its folder."""
    variants = [
        {
            "name": plan.name,
            "question": f"what does {plan.name} change?",
            "changes": {
                **{f"model.{k}": v for k, v in plan.model.items()},
                **{f"optim.{k}": v for k, v in plan.optim.items()},
            },
            "compare_with": plan.compare_with,
            "matched": plan.matched,
        }
        for plan in plans
    ]
    description = {
        "name": "synthetic",
        "question": "Do experts specialise?",
        "seeds": list(seeds),
        "variants": variants,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.json").write_text(json.dumps(description))
    tokenizer = train_bpe(TEXTS, 300)
    for seed in seeds:
        base = folder / "base" / f"seed-{seed}"
        write_run(base, DENSE, seed)
        tokenizer.save_pretrained(base / "final-model")
    for plan in plans:
        for seed in seeds:
            run = folder / plan.name / f"seed-{seed}"
            write_run(run, plan, seed)
            if config_of(plan, seed).model.moe_layers:
                write_routing(run, plan, seed, tokenizer)
    return folder


def write_run(run: Path, plan: VariantPlan, seed: int, status: str = "completed") -> None:
    """Write the files of one run; its loss is 3 + the seed's own offset + the plan's shift."""
    config = config_of(plan, seed)
    last = config.optim.max_steps
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    (run / "data_manifest.json").write_text(json.dumps(manifest(seed)))
    environment = {"device": "cpu", "precision": "fp32", "commit": "abc"}
    (run / "environment.json").write_text(json.dumps(environment))
    summary = {
        "status": status,
        "final_step": last,
        "best_eval_lm_loss": 3.0,
        "tokens_per_sec": 1000.0,
        "wall_seconds": 60.0,
    }
    (run / "run_summary.json").write_text(json.dumps(summary))
    rng = np.random.default_rng([seed, len(plan.name), sum(map(ord, plan.name))])
    offset = 0.2 * np.random.default_rng(seed).normal()
    rows = []
    for step in (0, last // 2, last):
        losses = {
            f"eval/lm_loss_{domain}": 3
            + 0.5 * place
            + offset
            + (plan.shift + 0.004 * rng.normal()) * step / last
            + 2 * (1 - step / last)
            for place, domain in enumerate(SHIPPED)
        }
        rows.append({"step": step, "eval/lm_loss": float(np.mean(list(losses.values()))), **losses})
    for step in STEPS if config.model.moe_layers else ():
        row = {"step": step, "train/lm_loss": 3.0}
        for layer in LAYERS:
            shares = plan.shares(step, seed) if layer == 2 else uniform_shares(step, seed)
            row |= {f"router/layer_{layer}_expert_{e}_frac": s for e, s in enumerate(shares)}
            row[f"router/layer_{layer}_entropy"] = 1.0
        rows.append(row)
    rows.sort(key=lambda row: row["step"])
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(seed: int) -> dict[str, Any]:
    """A data manifest with what is compared in it."""
    split = {"documents": 10, "tokens": 1000, "blocks": 8, "sha256": "x"}
    return {
        "block_size": 32,
        "seed": seed,
        "domains": {d: {"source": "s", "train": split, "eval": split} for d in SHIPPED},
    }


def write_routing(run: Path, plan: VariantPlan, seed: int, tokenizer: Any) -> None:
    """Write `routing.npz`: eight blocks of 32 tokens a domain."""
    blocks = [tokenizer(text)["input_ids"][:256] for text in TEXTS]
    token_ids = np.concatenate([np.resize(ids, (8, 32)) for ids in blocks]).astype(np.int32)
    domains = np.repeat(np.arange(3), 8).astype(np.int8)
    experts = np.stack(
        [plan.experts(domains, 32, [seed, n, *map(ord, plan.name)]) for n in range(len(LAYERS))]
    )
    np.savez(
        run / "routing.npz",
        token_ids=token_ids,
        domains=domains,
        layers=np.array(LAYERS, dtype=np.int16),
        experts=experts.astype(np.int16),
        probs_top=np.ones(experts.shape, dtype=np.float16),
    )
