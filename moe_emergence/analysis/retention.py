"""What is left of a model that keeps only a domain's best experts.

Letters: E experts, R blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from moe_emergence.analysis.ablation import Ablation
from moe_emergence.analysis.module_sets import ExpertSet, Naming, most_selective
from moe_emergence.analysis.routers import RouterInfo, find_routers
from moe_emergence.progress import progress_bar

RANDOM = 5


def best_experts(naming: Naming, domain: str, count: int) -> ExpertSet:
    """In every layer the `count` experts that the domain loses most without."""
    return most_selective(naming.increase[domain], count)


def retention_table(
    model: nn.Module,
    naming: Naming,
    blocks: Mapping[str, Tensor],
    top_k: int,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Loss per domain with half, a quarter and so on of each layer's experts, down to `top_k`.

    best_for (a domain; "random" for the mean of five random choices), kept, on, lm_loss, increase
    over the whole model. Nats per token. Tokens go to the best of the experts that are left; where
    the router cannot do that (`analysis.ablation.how_removed`), what is gone adds nothing.

    Args:
        model: any mixture language model whose routers can be read; its mode is restored.
        naming: from another text.
        blocks: token ids (R, L) of each domain.
        top_k: K.
        batch_size: blocks in one forward pass.
        seed: of the random choices.
    """
    routers = find_routers(model)
    experts = naming.load.shape[1]
    counts = [n for n in (experts // 2**i for i in range(1, experts.bit_length())) if n >= top_k]
    drawn = np.random.default_rng(seed).random((RANDOM, *naming.load.shape))
    chosen = [
        (name, count, sets)
        for count in counts
        for name, sets in (
            *((d, [best_experts(naming, d, count)]) for d in naming.domains),
            ("random", [most_selective(scores, count) for scores in drawn]),
        )
    ]
    rows: list[dict[str, Any]] = []
    with progress_bar("keeping experts", sum(len(sets) for *_, sets in chosen) + 1) as advance:
        ablation = Ablation(model, blocks, batch_size)
        whole = {domain: float(of.mean()) for domain, of in ablation.whole.items()}
        advance(1)
        for name, count, sets in chosen:
            losses: dict[str, list[float]] = {domain: [] for domain in whole}
            for one in sets:
                for domain, of in ablation.without(_others(routers, one, experts)).items():
                    losses[domain].append(float(of.mean()))
                advance(1)
            rows += [
                {
                    "best_for": name, "kept": count, "on": domain,
                    "lm_loss": float(np.mean(found)),
                    "increase": float(np.mean(found)) - whole[domain],
                }
                for domain, found in losses.items()
            ]  # fmt: skip
    return pd.DataFrame(rows)


def _others(
    routers: Sequence[RouterInfo], kept: ExpertSet, experts: int
) -> dict[RouterInfo, list[int]]:
    return {
        router: [e for e in range(experts) if e not in own]
        for router, own in zip(routers, kept, strict=True)
    }
