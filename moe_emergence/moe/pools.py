"""Document pools: the tokens of a document choose among few experts (arXiv 2605.06663).

There the whole document decides which; here it is what has been read of it, so that no token's
expert depends on later ones. Letters: B sequences, L tokens each, T = B*L, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_emergence.moe.noise import RouterNoise, uniform_draws

_OUTSIDE = 1e4
"""Taken off the logits outside the pool: no probability is left of them, and their order stays for
those who remove experts."""


@dataclass(frozen=True)
class DocumentPools:
    """How large the pools are, and where documents end."""

    size: int
    """Experts in a pool."""
    ends: tuple[int, ...] = ()
    """Token ids; a document begins after one, and with every sequence."""

    def limit(self, logits_TE: Tensor, token_ids: Tensor, noise: RouterNoise | None) -> Tensor:
        """(T, E) logits with those outside every token's pool far below the others.

        A token's pool are the experts with the highest sums of probabilities over the tokens of its
        document up to itself. With `noise`, that is in training, the size of every document's pool
        is drawn from `size` to E, so that pools of any of these sizes serve. The choice has no
        gradient.

        Args:
            logits_TE: of all tokens in order.
            token_ids: (..., L), T in all; the rows are sequences.
            noise: whose seed, step, layer and places draw the sizes.
        """
        ids_BL = token_ids.reshape(-1, token_ids.shape[-1])
        experts = logits_TE.shape[1]
        probs_BLE = logits_TE.detach().double().softmax(dim=1).view(*ids_BL.shape, experts)
        begins_BL = self._begins(ids_BL)
        sums_BLE = _sums_since(probs_BLE, begins_BL)
        rank_BLE = sums_BLE.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        size_BL: Tensor | int = self.size
        if noise is not None:
            drawn_T = uniform_draws(noise, ids_BL.numel(), ids_BL.device)
            sizes_T = self.size + (drawn_T * (experts - self.size + 1)).long()
            size_BL = sizes_T.view(ids_BL.shape).gather(1, begins_BL).unsqueeze(2)
        return logits_TE - _OUTSIDE * (rank_BLE >= size_BL).view_as(logits_TE)

    def _begins(self, ids_BL: Tensor) -> Tensor:
        """(B, L) int64: where in its row every token's document begins."""
        ends_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        for end in self.ends:
            ends_BL = ends_BL | (ids_BL == end)
        places_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        first_BL = places_L * ends_BL.roll(1, dims=1)
        return first_BL.cummax(dim=1).values


def _sums_since(x_BLE: Tensor, begins_BL: Tensor) -> Tensor:
    """(B, L, E) sums of x over the places from `begins_BL` to each place.

    By doubling (Hillis and Steele 1986), not as a difference of cumulative sums: the rounding of
    what stands before a document would stay in that, and could change its pools.
    """
    places_L = torch.arange(begins_BL.shape[1], device=begins_BL.device)
    offset_BL1 = (places_L - begins_BL).unsqueeze(2)
    reach = 1
    while reach < begins_BL.shape[1]:
        earlier_BLE = x_BLE.roll(reach, dims=1)
        x_BLE = torch.where(offset_BL1 >= reach, x_BLE + earlier_BLE, x_BLE)
        reach *= 2
    return x_BLE


def check_pool_size(size: int, top_k: int, num_experts: int, router: str, bias: bool) -> None:
    """Refuse a pool that is no choice, and routers that make none or look beyond it."""
    if not top_k <= size <= num_experts:
        raise ValueError(
            f"pool_size {size}: give a number from top_k ({top_k}) to num_experts ({num_experts})"
        )
    if router == "hash":
        raise ValueError(f"pool_size {size}: a hash router has no probabilities; give 0")
    if bias:
        raise ValueError(
            f"pool_size {size}: the balancing bias would choose experts outside the pool; give 0, "
            "or no expert bias"
        )
