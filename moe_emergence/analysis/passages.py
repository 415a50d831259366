"""The passages of a text that an expert reads most of.

Letters: B blocks, L tokens of a block, W tokens of a passage, P passages of a block, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from moe_emergence.analysis.explorer import pieces_of
from moe_emergence.analysis.routers import LayerRouting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moe_emergence.analysis.counts import Batch

WIDTH = 24
KEPT = 3


@dataclass(frozen=True, eq=False)
class Passage:
    """W tokens in a row, and which of them have the expert as their first."""

    score: float
    domain: int
    token_ids: npt.NDArray[np.int64]
    own: npt.NDArray[np.bool_]


@dataclass(eq=False)
class Passages:
    """The best passages of every layer and expert so far; a block gives an expert at most one."""

    best: dict[tuple[int, int], list[Passage]] = field(default_factory=dict)
    """By layer and expert, best first."""

    def add(self, batch: "Batch", routings: Sequence[LayerRouting]) -> None:
        """Look at the blocks of one forward pass, cut into passages."""
        blocks, length = batch.token_ids.shape
        width = min(WIDTH, length)
        cut = length // width * width
        ids_BPW = batch.token_ids[:, :cut].reshape(blocks, -1, width)
        for routing in routings:
            first_T1 = routing.experts_TK[:, :1].cpu()
            # the share of its tokens decides; of equals, how sure the router was
            weight_T1 = 1 + routing.probs_TE.cpu().gather(1, first_T1) / (2 * width)
            own_TE = torch.zeros(len(first_T1), routing.probs_TE.shape[1])
            own_TE.scatter_(1, first_T1, weight_T1)
            own_BPWE = own_TE.reshape(blocks, length, -1)[:, :cut].unflatten(1, (-1, width))
            score_BE, place_BE = own_BPWE.sum(dim=2).max(dim=1)
            for block, expert in (score_BE > self._worst(routing, score_BE)).nonzero().tolist():
                place = int(place_BE[block, expert])
                own = own_BPWE[block, place, :, expert].numpy() > 0
                score = float(score_BE[block, expert])
                passage = Passage(score, batch.domain, ids_BPW[block, place].copy(), own)
                self._keep((routing.layer, expert), passage)

    def _worst(self, routing: LayerRouting, score_BE: torch.Tensor) -> torch.Tensor:
        """(E,) what a passage has to be better than."""
        kept = [self.best.get((routing.layer, e), []) for e in range(score_BE.shape[1])]
        return torch.tensor([own[-1].score if len(own) == KEPT else 0.0 for own in kept])

    def _keep(self, key: tuple[int, int], passage: Passage) -> None:
        own = self.best.setdefault(key, [])
        if any(np.array_equal(one.token_ids, passage.token_ids) for one in own):
            return
        own.append(passage)
        own.sort(key=lambda one: -one.score)
        del own[KEPT:]


def passage_table(
    passages: Passages, domains: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
) -> pd.DataFrame:
    """layer, expert, rank, domain, tokens (W), own (those with the expert first), text, spans.

    `spans` are the characters of `text` that the expert's tokens make, as "first-end first-end".
    """
    rows: list[dict[str, Any]] = []
    pieces_in = pieces_of(tokenizer)
    for (layer, expert), found in sorted(passages.best.items()):
        for rank, passage in enumerate(found):
            pieces = pieces_in(passage.token_ids.tolist())
            rows.append(
                {
                    "layer": layer, "expert": expert, "rank": rank,
                    "domain": domains[passage.domain], "tokens": len(passage.own),
                    "own": int(passage.own.sum()), "text": "".join(pieces),
                    "spans": _spans(pieces, passage.own.tolist()),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _spans(pieces: Sequence[str], own: Sequence[bool]) -> str:
    """Tokens next to each other are one span."""
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    spans: list[list[int]] = []
    for start, end, mine in zip([0, *ends], ends, own, strict=False):
        if mine and spans and spans[-1][1] == start:
            spans[-1][1] = end
        elif mine:
            spans.append([start, end])
    return " ".join(f"{start}-{end}" for start, end in spans if end > start)
