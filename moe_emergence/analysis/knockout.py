"""What a model loses without one of its experts: loss per domain, expert by expert.

Letters: E experts, R blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from moe_emergence.analysis.ablation import Ablation, Floats, how_removed
from moe_emergence.analysis.routers import find_routers
from moe_emergence.config.data import ALL
from moe_emergence.progress import progress_bar


def knockout_table(
    model: nn.Module, blocks: Mapping[str, Tensor], num_experts: int, *, batch_size: int = 8
) -> pd.DataFrame:
    """Loss per domain with each expert of each layer removed, one at a time.

    layer, expert, domain ("all" too), lm_loss, `increase` over the whole model on the same blocks,
    tokens, how: "rerouted" where the router can choose others (softmax routers of this library,
    E > K), else "zeroed": the expert adds nothing. Nats per token; weights are not touched.

    Args:
        model: any mixture language model whose routers can be read; its mode is restored.
        blocks: token ids (R, L) of each domain.
        num_experts: E.
        batch_size: blocks in one forward pass.
    """
    routers = find_routers(model)
    rows: list[dict[str, Any]] = []
    with progress_bar("knocking out experts", 1 + len(routers) * num_experts) as advance:
        ablation = Ablation(model, blocks, batch_size)
        whole = mean_losses(ablation.whole, blocks)
        advance(1)
        for router in routers:
            for expert in range(num_experts):
                losses = mean_losses(ablation.without({router: [expert]}), blocks)
                rows += [
                    {
                        "layer": router.layer, "expert": expert, "domain": domain,
                        "lm_loss": loss, "increase": loss - whole[domain][0],
                        "tokens": tokens, "how": how_removed(router),
                    }
                    for domain, (loss, tokens) in losses.items()
                ]  # fmt: skip
                advance(1)
    return pd.DataFrame(rows)


def mean_losses(
    each: Mapping[str, Sequence[float] | Floats], blocks: Mapping[str, Tensor]
) -> dict[str, tuple[float, int]]:
    """Loss in nats and tokens predicted, per domain and of "all", from every block's mean loss."""
    predicted = {domain: blocks[domain].shape[1] - 1 for domain in each}
    sums = {d: (float(np.sum(of)) * predicted[d], len(of) * predicted[d]) for d, of in each.items()}
    sums[ALL] = (sum(s for s, _ in sums.values()), sum(n for _, n in sums.values()))
    return {domain: (total / max(n, 1), n) for domain, (total, n) in sums.items()}
