"""Typical passages, against windows counted one by one."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_emergence.analysis.counts import Batch
from moe_emergence.analysis.passages import KEPT, WIDTH, Passages, passage_table
from moe_emergence.analysis.report.experts import expert_cards
from moe_emergence.analysis.routers import LayerRouting


def routed(blocks: int, length: int, experts: int, seed: int) -> tuple[Any, Any]:
    """Token ids (B, L), and the probabilities (B*L, E) of a layer."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(blocks * length).reshape(blocks, length)
    return ids, torch.from_numpy(rng.dirichlet(np.full(experts, 0.3), blocks * length)).float()


def routing(probs_TE: torch.Tensor) -> LayerRouting:
    return LayerRouting(5, probs_TE, probs_TE.argsort(dim=1, descending=True)[:, :2], probs_TE)


@settings(max_examples=40)
@given(
    st.integers(1, 7), st.integers(1, 80), st.integers(2, 5), st.integers(1, 4), st.integers(0, 999)
)
def test_they_are_the_windows_with_most_tokens_of_the_expert(
    blocks: int, length: int, experts: int, batch: int, seed: int
) -> None:
    ids, probs = routed(blocks, length, experts, seed)
    found = Passages()
    for start in range(0, blocks, batch):
        stop = min(blocks, start + batch)
        part = Batch(ids[start:stop], 1, np.arange(start, stop), None)
        found.add(part, [routing(probs[start * length : stop * length])])
    first = probs.argmax(dim=1).reshape(blocks, length).numpy()
    width = min(WIDTH, length)
    for expert in range(experts):
        best = [
            max(
                (first[b, at : at + width] == expert).sum()
                for at in range(0, length - width + 1, width)
            )
            for b in range(blocks)
        ]
        wanted = sorted((n for n in best if n), reverse=True)[:KEPT]
        kept = found.best.get((5, expert), [])
        assert [int(one.own.sum()) for one in kept] == wanted
        for one in kept:
            assert len(one.token_ids) == width
            row, at = np.argwhere(ids == one.token_ids[0]).tolist()[0]
            assert (ids[row, at : at + width] == one.token_ids).all() or length > width


def test_marks_are_the_experts_tokens() -> None:
    words = ["zero", "one ", "two", "\n", "é"]
    tokenizer: Any = SimpleNamespace(
        get_vocab=lambda: {"▁": 0}, decode=lambda ids: words[ids[0]],
        convert_ids_to_tokens=lambda ids: ["▁" for _ in ids],
    )  # fmt: skip
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.7, 0.3], [0.2, 0.8]])
    found = Passages()
    found.add(Batch(np.arange(5)[None], 0, np.zeros(1, int), None), [routing(probs)])
    table = passage_table(found, ["odd"], tokenizer).set_index("expert")
    assert table.loc[0, "text"] == "zeroone two\né"
    assert table.loc[0, "spans"] == "0-8 11-12"
    assert table.loc[1, "spans"] == "8-11 12-13"
    assert table.loc[1, "own"] == 2
    assert set(table["domain"]) == {"odd"}
    assert expert_cards({"passages": table.reset_index().assign(run="one")}, "one") == {}
