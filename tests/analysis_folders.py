"""An analysis folder made up: several runs, many layers, any domains, hostile text."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from moe_emergence.analysis.tidy import write_tables
from moe_emergence.config import SHIPPED

HOSTILE = "<script>document.title='run'</script>"


def write_analysis(
    folder: Path,
    *,
    runs: int = 2,
    layers: int = 2,
    experts: int = 8,
    domains: Sequence[str] = SHIPPED,
) -> Path:
    """Tables, `explorer.json` and `analysis.json` of random routing; K = 2."""
    rng = np.random.default_rng(0)
    names = [f"run-{i} <b>&" for i in range(runs)]
    every = [
        (run, layer, domain, expert)
        for run in names
        for layer in range(layers)
        for domain in domains
        for expert in range(experts)
    ]
    shares = pd.DataFrame(every, columns=["run", "layer", "domain", "expert"])
    shares = shares.assign(slot=-1, tokens=10, fraction=1 / experts)
    pairs = pd.DataFrame(
        [
            (run, layer, kind, a, b, 1.0 if a == b else rng.uniform(-1, 1))
            for run in names
            for layer in range(layers)
            for kind in ("weights", "outputs")
            for a in range(experts)
            for b in range(experts)
        ],
        columns=["run", "layer", "kind", "expert", "other_expert", "cosine"],
    )
    bits = pd.DataFrame(
        [
            {
                "run": run, "layer": layer, "label": "domain", "bits": 0.4, "bits_low": 0.3,
                "bits_high": 0.5, "p_permutation": 0.005, "permuted_95": 0.01,
                "null_router_bits": 0.3 if layer else 0.1,
                "null_router_95": 0.45 if layer else 0.2, "p_router": 0.2 if layer else 0.01,
            }
            for run in names for layer in range(layers)
        ]
    )  # fmt: skip
    routing = bits[["run", "layer"]].assign(max_violation=0.5)
    words = pd.DataFrame(
        [
            (run, layer, expert, 0, 5, f"{HOSTILE} top of {expert}", 9, 0.75)
            for run in names for layer in range(layers) for expert in range(experts)
        ],
        columns=["run", "layer", "expert", "rank", "token_id", "token", "tokens", "share"],
    )  # fmt: skip
    passages = pd.DataFrame(
        [
            (run, layer, expert, 0, domains[0], 24, 9, f"{HOSTILE} read by {expert}", "0-8 12-20")
            for run in names for layer in range(layers) for expert in range(experts)
        ],
        columns=["run", "layer", "expert", "rank", "domain", "tokens", "own", "text", "spans"],
    )  # fmt: skip
    kinds = pd.DataFrame(
        [
            (run, layer, -1, domains[0], kind, expert, 9 if like else 1)
            for run in names for layer in range(layers) for expert in range(experts)
            for kind, like in (("space", expert == 0), ("name", expert != 0))
        ],
        columns=["run", "layer", "slot", "domain", "token_type", "expert", "tokens"],
    ).assign(fraction=0.1)  # fmt: skip
    lost = pd.DataFrame(
        [
            (run, layer, expert, domain, 4.5, 0.2 + 0.1 * (domain == domains[-1]), 9, "rerouted")
            for run in names for layer in range(layers) for expert in range(experts)
            for domain in (*domains, "all")
        ],
        columns=["run", "layer", "expert", "domain", "lm_loss", "increase", "tokens", "how"],
    )  # fmt: skip
    trajectory = shares.drop(columns=["slot", "tokens"])
    trajectory = pd.concat([trajectory.assign(step=step) for step in (0, 100)])
    training = pd.DataFrame(
        [
            (run, step, metric, 5 - step / 100)
            for run in names for step in (0, 50, 100)
            for metric in ("eval/lm_loss", f"eval/lm_loss_{domains[0]}", "eval/layer_1_churn")
        ],
        columns=["run", "step", "metric", "value"],
    )  # fmt: skip
    collapse = pd.DataFrame(
        [(run, s, layer, 0.3) for run in names for s in (0, 50) for layer in range(layers)],
        columns=["run", "step", "layer", "largest_share"],
    )
    tables = {
        "expert_domain": shares, "similarity": pairs, "information": bits, "routing": routing,
        "vocabulary": words, "training": training, "collapse": collapse, "passages": passages,
        "expert_token_type": kinds, "knockout": lost, "trajectory": trajectory,
    }  # fmt: skip
    write_tables(folder, tables)
    tokens = ["def", " x", HOSTILE, "\n", "</script>", "<!--", "\t&", "é", "", "long" * 30] * 3
    texts = [
        {
            "domain": domain, "title": f"{domain} 1", "tokens": tokens,
            "experts": rng.integers(0, experts, (layers, len(tokens), 2)).tolist(),
            "probabilities": [[[0.7, 0.2]] * len(tokens)] * layers,
        }
        for domain in domains
    ]  # fmt: skip
    explorer = [
        {"name": name, "num_experts": experts, "top_k": 2, "layers": list(range(layers)),
         "texts": texts}
        for name in names
    ]  # fmt: skip
    (folder / "explorer.json").write_text(json.dumps({"runs": explorer}))
    about = [
        {"name": name, "source": "x", "kind": "run", "model_type": "moe_gpt2", "step": 1,
         "layers": list(range(layers)), "num_experts": experts, "top_k": 2, "router": "learned",
         "lm_loss": 4.5, "tokens": 100, "eval_blocks": 32}
        for name in names
    ]  # fmt: skip
    (folder / "analysis.json").write_text(
        json.dumps(
            {"command": f"analyze {HOSTILE}", "created": "2026-01-01T00:00:00", "runs": about,
             "domains": list(domains), "tokens": 100, "data": "made up", "versions": {},
             "read": {"code": {"samples": [HOSTILE], "poor_blocks": 0.5, "warning": "tables"},
                      "prose": {"samples": ["Sir"], "poor_blocks": 0.0, "warning": None}}}
        )
    )  # fmt: skip
    return folder
