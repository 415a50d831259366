"""Which tokens an expert takes: vocabulary specialisation and top tokens (OLMoE, arXiv 2409.02060).

Letters: V token ids, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_emergence.analysis.counts import LayerCounts
from moe_emergence.analysis.routing_tables import token_id_table

LEAST_SEEN = 8
TOP_TOKENS = 20


def vocabulary_tables(
    layers: Sequence[LayerCounts], text_of: Callable[[int], str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Top tokens of every expert, and every expert's vocabulary specialisation.

    The first: layer, expert, rank, token_id, token (text), tokens, share (of that id's tokens in
    the layer that go to the expert first), by assignments above what the expert's load explains,
    among ids seen `LEAST_SEEN` times. The second: layer, expert, specialisation (mean over the
    expert's tokens of the share of their id that it takes; section 5.4, for k = 1), ids.
    """
    tops: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    for counts in layers:
        keys, _ = counts.pairs
        ids = np.unique(keys // counts.num_experts)
        table = token_id_table(counts)
        often = table.sum(axis=1) >= LEAST_SEEN
        ids, table = ids[often], table[often]
        share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        load = table.sum(axis=0)
        excess = table - table.sum(axis=1, keepdims=True) * load / max(load.sum(), 1)
        for e in range(counts.num_experts):
            own = float((share[:, e] * table[:, e]).sum() / load[e]) if load[e] else np.nan
            means.append(
                {
                    "layer": counts.layer, "expert": e, "specialisation": own,
                    "ids": int((table[:, e] > 0).sum()),
                }
            )  # fmt: skip
            best = np.argsort(-excess[:, e], kind="stable")[:TOP_TOKENS]
            tops += [
                {
                    "layer": counts.layer, "expert": e, "rank": rank, "token_id": int(ids[v]),
                    "token": text_of(int(ids[v])), "tokens": int(table[v, e]),
                    "share": float(share[v, e]),
                }
                for rank, v in enumerate(best)
                if table[v, e]
            ]  # fmt: skip
    return pd.DataFrame(tops), pd.DataFrame(means)
