"""Router noise as a pure function of (seed, step, layer, token, expert).

A counter-based generator has no state: a resumed run, a recomputed activation checkpoint and a
batch split over any number of micro-batches or processes all see the same noise.
"""

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class RouterNoise:
    """Which noise to add to the router logits of one forward pass."""

    std: float | Tensor
    """Standard deviation of the Gaussian noise on the logits; a tensor is an fp64 scalar."""
    seed: int
    step: int | Tensor
    """Optimizer step, counted from 0; a tensor is an int64 scalar."""
    first_token: int = 0
    """Place of the first token of this forward pass among all tokens of the step."""
    run: int = 0
    """Tokens of this forward pass that follow each other in the step; 0 for all of them."""
    stride: int = 0
    """Places from where one run begins to where the next begins."""
    layer: int = 0

    @property
    def is_on(self) -> bool:
        """Whether there is any; of a tensor it is not asked, which would wait for the device."""
        return isinstance(self.std, Tensor) or self.std > 0


def gaussian_noise(
    noise: RouterNoise, num_tokens: int, num_experts: int, device: torch.device
) -> Tensor:
    """Normal deviates (num_tokens, num_experts), fp32, with standard deviation `noise.std`.

    Every deviate is the Box-Muller transform of two 32-bit hashes of its counter.
    """
    places_T1 = _places(noise, num_tokens, device).unsqueeze(1)
    counter = (places_T1 * num_experts + torch.arange(num_experts, device=device)).flatten()
    mixed = _mixed(noise, counter)
    radius_bits, angle_bits = hash32(mixed ^ 0x85EBCA6B), hash32(mixed ^ 0xC2B2AE35)
    radius = torch.sqrt(-2.0 * torch.log((radius_bits.double() + 0.5) / 2**32))
    angle = 2.0 * math.pi * angle_bits.double() / 2**32
    deviates = radius * torch.cos(angle) * noise.std
    return deviates.float().view(num_tokens, num_experts)


def uniform_draws(noise: RouterNoise, num_tokens: int, device: torch.device) -> Tensor:
    """(num_tokens,) fp64 in [0, 1), independent of the deviates; `noise.std` does not matter."""
    bits = hash32(_mixed(noise, _places(noise, num_tokens, device)) ^ 0x27D4EB2F)
    return bits.double() / 2**32


def _places(noise: RouterNoise, num_tokens: int, device: torch.device) -> Tensor:
    """(num_tokens,) place of every token among those of the step."""
    run = noise.run or max(num_tokens, 1)
    starts = noise.first_token + torch.arange(-(-num_tokens // run), device=device) * noise.stride
    return (starts.unsqueeze(1) + torch.arange(run, device=device)).view(-1)[:num_tokens]


def _mixed(noise: RouterNoise, counter: Tensor) -> Tensor:
    """Of every counter a hash, keyed by seed, step and layer."""
    key: int | Tensor = 0x9E3779B9
    for part in (noise.seed, noise.step, noise.layer):
        key = hash32(key ^ (part & _MASK))
        if isinstance(part, int) and part >> 32:
            key = hash32(key ^ (part >> 32 & _MASK))
    low, high = counter & _MASK, counter >> 32
    return hash32(low ^ key) ^ high


@overload
def hash32(x: int) -> int: ...
@overload
def hash32(x: Tensor) -> Tensor: ...
def hash32(x: int | Tensor) -> int | Tensor:
    """A 32-bit integer hash (xor-shift-multiply) of a value, or of int64 elements, below 2^32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)
