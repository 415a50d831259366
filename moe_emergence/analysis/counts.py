"""What is kept of a layer's routing while tokens stream by: counts, whatever their number.

Letters: T tokens, E experts, K experts per token, D domains, Y token types, G groups of blocks a
domain, N null routers, H model width.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_emergence.analysis.passages import Passages
from moe_emergence.analysis.routers import LayerRouting
from moe_emergence.analysis.token_types import NUM_TYPES
from moe_emergence.config import TokenClass

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

GROUPS = 256
"""Blocks of a domain are counted in at most so many groups; intervals resample and permutations
move whole groups. With no more blocks than that, a group is a block."""
NULL_ROUTERS = 99
"""A p-value of 0.01 is then the smallest there is."""
NULL_LOGITS = 2**24
"""Logits of null routers that are held at a time."""


@dataclass(frozen=True)
class Batch:
    """Where the T = B*L tokens of a forward pass come from."""

    token_ids: Ints
    """(B, L)"""
    domain: int
    """Place among the domains of the counts."""
    groups: Ints
    """(B,) group of each block within its domain, 0 to G - 1."""
    types: npt.NDArray[np.int8] | None
    """(B, L) token types, see `token_types`; none where the tokenizer does not tell."""


@dataclass(eq=False)
class LayerCounts:
    """Sums over all tokens of one layer of one model; batches can come in any order and size."""

    layer: int
    num_experts: int
    top_k: int
    null_weights_NEH: Tensor
    """(N, E, H) random routers that read what the model's router reads."""
    classes: Mapping[str, TokenClass]
    """The domains, in order, and how the tokens of each are told apart."""
    slots: Ints = field(init=False)
    """(D, K, E) assignments by slot."""
    grouped: Ints = field(init=False)
    """(D, G, E) assignments, all slots, by group of blocks."""
    types: Ints = field(init=False)
    """(D, Y, K, E) assignments by type of the token and slot."""
    types_grouped: npt.NDArray[np.int32] = field(init=False)
    """(D, G, Y, E) first experts by group and type."""
    null_grouped: Ints = field(init=False)
    """(N, D, E) assignments of the null routers."""
    null_types: Ints = field(init=False)
    """(N, D, Y, E) their first experts by type of the token."""
    together: Ints = field(init=False)
    """(E, E) tokens that have both experts; assignments on the diagonal."""
    tokens: int = 0
    entropy_sum: float = 0.0
    top_sum: float = 0.0
    neighbours: int = 0
    same: int = 0
    """Neighbouring tokens of a block with the same first expert."""
    pairs: tuple[Ints, Ints] = field(init=False)
    """Distinct keys token id * E + first expert, ascending, and how often each was seen."""
    probs_sum: Floats = field(init=False)

    def __post_init__(self) -> None:
        domains, experts = len(self.classes), self.num_experts
        self.slots = np.zeros((domains, self.top_k, experts), np.int64)
        self.grouped = np.zeros((domains, GROUPS, experts), np.int64)
        self.types = np.zeros((domains, NUM_TYPES, self.top_k, experts), np.int64)
        self.types_grouped = np.zeros((domains, GROUPS, NUM_TYPES, experts), np.int32)
        self.null_grouped = np.zeros((len(self.null_weights_NEH), domains, experts), np.int64)
        self.null_types = np.zeros(
            (len(self.null_weights_NEH), domains, NUM_TYPES, experts), np.int64
        )
        self.together = np.zeros((experts, experts), np.int64)
        self.pairs = (np.zeros(0, np.int64), np.zeros(0, np.int64))
        self.probs_sum = np.zeros(experts)

    def add(self, batch: Batch, routing: LayerRouting) -> None:
        """Count the tokens of one forward pass."""
        experts = routing.experts_TK.cpu().numpy()
        blocks, length = batch.token_ids.shape
        domain, e = batch.domain, self.num_experts
        slots = np.arange(self.top_k)
        self.slots[domain] += _bincount(slots * e + experts, self.top_k * e).reshape(-1, e)
        groups = np.repeat(batch.groups, length)
        self.grouped[domain] += _bincount(groups[:, None] * e + experts, GROUPS * e).reshape(-1, e)
        if batch.types is not None:
            self._add_types(domain, groups, batch.types.ravel().astype(np.int64), experts)
        member = torch.zeros(len(experts), e).scatter_(1, routing.experts_TK.cpu(), 1.0)
        self.together += (member.T @ member).round().long().numpy()
        first = experts[:, 0].reshape(blocks, length)
        self.same += int((first[:, 1:] == first[:, :-1]).sum())
        self.neighbours += first[:, 1:].size
        self._add_pairs(batch.token_ids.ravel() * e + experts[:, 0])
        probs = routing.probs_TE
        self.tokens += len(experts)
        self.entropy_sum += float(torch.special.entr(probs).sum())
        self.top_sum += float(probs.max(dim=1).values.sum())
        self.probs_sum += probs.double().sum(dim=0).cpu().numpy()
        self._add_nulls(batch, routing)

    def _add_nulls(self, batch: Batch, routing: LayerRouting) -> None:
        e, hidden_TH, pools = self.num_experts, routing.hidden_TH.float(), routing.pools
        at_a_time = max(1, NULL_LOGITS // (len(hidden_TH) * e))
        first = 0
        for weights_NEH in self.null_weights_NEH.split(at_a_time):
            n = len(weights_NEH)
            places = slice(first, first + n)
            first += n
            logits_TNE = (hidden_TH @ weights_NEH.flatten(0, 1).to(hidden_TH).T).unflatten(
                1, (n, e)
            )
            if pools is not None:
                ids = torch.as_tensor(batch.token_ids).to(hidden_TH.device)
                limited = [
                    pools.limit(routing.scale * logits_TE, ids, None)
                    for logits_TE in logits_TNE.unbind(1)
                ]
                logits_TNE = torch.stack(limited, dim=1)
            chosen_TNK = logits_TNE.topk(self.top_k, dim=2).indices.cpu().numpy()
            router_N = np.arange(n)
            cells = router_N[:, None] * e + chosen_TNK
            self.null_grouped[places, batch.domain] += _bincount(cells, n * e).reshape(n, e)
            if batch.types is not None:
                types_T1 = batch.types.ravel().astype(np.int64)[:, None]
                cells = (router_N * NUM_TYPES + types_T1) * e + chosen_TNK[:, :, 0]
                counts = _bincount(cells, n * NUM_TYPES * e).reshape(n, NUM_TYPES, e)
                self.null_types[places, batch.domain] += counts

    def _add_types(self, domain: int, groups: Ints, types: Ints, experts: Ints) -> None:
        e, k = self.num_experts, self.top_k
        cell = (types[:, None] * k + np.arange(k)) * e + experts
        self.types[domain] += _bincount(cell, NUM_TYPES * k * e).reshape(NUM_TYPES, k, e)
        cell = (groups * NUM_TYPES + types) * e + experts[:, 0]
        counts = _bincount(cell, GROUPS * NUM_TYPES * e)
        self.types_grouped[domain] += counts.reshape(GROUPS, NUM_TYPES, e).astype(np.int32)

    def _add_pairs(self, keys: Ints) -> None:
        new, counts = np.unique(keys, return_counts=True)
        known, seen = self.pairs
        merged, place = np.unique(np.concatenate([known, new]), return_inverse=True)
        sums = np.bincount(place, np.concatenate([seen, counts]), len(merged)).astype(np.int64)
        self.pairs = (merged, sums)

    def load(self) -> Floats:
        """(E,) share of the assignments."""
        counts = self.slots.sum(axis=(0, 1)).astype(np.float64)
        shares: Floats = counts / max(counts.sum(), 1)
        return shares


@dataclass(eq=False)
class RoutingCounts:
    """The counts of a model's layers, and of first experts in one layer and the next."""

    classes: Mapping[str, TokenClass]
    """The domains, in order, and how the tokens of each are told apart."""
    layers: list[LayerCounts] = field(default_factory=list)
    """By layer, ascending."""
    between: dict[tuple[int, int], Ints] = field(default_factory=dict)
    """(E, E') tokens by first expert in a layer and in the next mixture layer."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Per domain the mean next-token loss in nats of every block."""
    passages: Passages = field(default_factory=Passages)
    null_routers: int = NULL_ROUTERS
    """Random routers to count beside every layer's own."""

    def add(self, batch: Batch, routings: Sequence[LayerRouting], seed: int) -> None:
        """Count one forward pass; `seed` is that of the null routers."""
        if not self.layers:
            self.layers = [self._empty(routing, seed) for routing in routings]
        for counts, routing in zip(self.layers, routings, strict=True):
            counts.add(batch, routing)
        self.passages.add(batch, routings)
        for one, other in itertools.pairwise(routings):
            width = other.probs_TE.shape[1]
            cells = one.experts_TK[:, 0] * width + other.experts_TK[:, 0]
            table = _bincount(cells.cpu().numpy(), one.probs_TE.shape[1] * width)
            key = (one.layer, other.layer)
            self.between[key] = self.between.get(key, 0) + table.reshape(-1, width)

    def _empty(self, routing: LayerRouting, seed: int) -> LayerCounts:
        num_experts, top_k = routing.probs_TE.shape[1], routing.experts_TK.shape[1]
        weights = null_weights(
            num_experts, routing.hidden_TH.shape[1], self.null_routers, seed * 1000 + routing.layer
        )
        return LayerCounts(routing.layer, num_experts, top_k, weights, self.classes)


def null_weights(num_experts: int, hidden_size: int, draws: int, seed: int) -> Tensor:
    """(N, E, H) weights of `draws` random routers, N(0, 1): the scale moves no choice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(draws, num_experts, hidden_size, generator=generator)


def _bincount(cells: Ints, size: int) -> Ints:
    return np.bincount(cells.ravel(), minlength=size)
