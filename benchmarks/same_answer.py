"""Whether a token gets the same experts in any batch: `python -m benchmarks.same_answer`.

A sequence is read alone, then padded in a batch on either side, and decoded through a cache in
parts. Its choices are compared per token and layer (token-layers). After a choice has changed, what
depends on it is no longer the same question: later layers of that token and of those after it are
counted as changed or not, but their logits are not compared.

Letters: N mixture layers, L tokens of a sequence, E experts, K experts per token.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.command import start_logging
from moe_emergence.models import upcycle

logger = logging.getLogger(__name__)

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Read:
    """What the routers made of one sequence."""

    logits_NLE: Tensor
    experts_NLK: Tensor

    @property
    def margin_NL(self) -> Tensor:
        """How far the last chosen expert's logit is above that of the best that is not."""
        sorted_NLE = self.logits_NLE.sort(dim=2, descending=True).values
        top_k = self.experts_NLK.shape[2]
        return sorted_NLE[..., top_k - 1] - sorted_NLE[..., top_k]


@torch.no_grad()
def alone(model: Any, ids_L: Tensor) -> Read:
    """The whole sequence in one pass of its own."""
    return _read(model(ids_L[None]).router_decisions, 1)[0]


@torch.no_grad()
def padded(model: Any, sequences: Sequence[Tensor], side: str, pad: int = 0) -> list[Read]:
    """All sequences in one batch, each padded on the `side` left or right to the longest."""
    longest = max(len(ids_L) for ids_L in sequences)
    ids_BL = torch.full((len(sequences), longest), pad)
    mask_BL = torch.zeros_like(ids_BL)
    for row, ids_L in enumerate(sequences):
        place = slice(longest - len(ids_L), None) if side == "left" else slice(len(ids_L))
        ids_BL[row, place], mask_BL[row, place] = ids_L, 1
    positions_BL = (mask_BL.cumsum(dim=1) - 1).clamp(min=0)
    out = model(ids_BL, attention_mask=mask_BL, position_ids=positions_BL)
    rows = _read(out.router_decisions, len(sequences))
    kept = [mask_L.bool() for mask_L in mask_BL]
    return [
        Read(read.logits_NLE[:, mask_L], read.experts_NLK[:, mask_L])
        for read, mask_L in zip(rows, kept, strict=True)
    ]


@torch.no_grad()
def in_parts(model: Any, ids_L: Tensor, lengths: Sequence[int]) -> Read:
    """Decoded through a cache, `lengths` tokens at a time."""
    cache = DynamicCache(config=model.config)
    reads = []
    for part_L in ids_L.split(list(lengths)):
        out = model(part_L[None], cache=cache, use_cache=True)
        reads += _read(out.router_decisions, 1)
    return Read(
        torch.cat([read.logits_NLE for read in reads], dim=1),
        torch.cat([read.experts_NLK for read in reads], dim=1),
    )


def _read(decisions: Sequence[Any], rows: int) -> list[Read]:
    logits_NBLE = torch.stack([d.router_logits.unflatten(0, (rows, -1)) for d in decisions])
    experts_NBLK = torch.stack([d.topk_experts.unflatten(0, (rows, -1)) for d in decisions])
    pairs = zip(logits_NBLE.unbind(1), experts_NBLK.unbind(1), strict=True)
    return [Read(logits, experts) for logits, experts in pairs]


def changed(one: Read, other: Read) -> Tensor:
    """(N, L) whether the set of chosen experts differs."""
    return (one.experts_NLK.sort(dim=2).values != other.experts_NLK.sort(dim=2).values).any(dim=2)


def comparable(changed_NL: Tensor) -> Tensor:
    """(N, L) whether no choice that a token-layer depends on has changed: in a layer below it, of
    a token up to its own."""
    before_NL = changed_NL.int().cumsum(dim=1).cumsum(dim=0).roll(1, dims=0)
    before_NL[0] = 0
    return before_NL == 0


def distance(one: Read, other: Read) -> float:
    """Largest difference of router logits where they can be compared."""
    same_NL = comparable(changed(one, other))
    return float((one.logits_NLE.double() - other.logits_NLE).abs().amax(dim=2)[same_NL].max())


def models(width: int, positions: int) -> dict[str, Any]:
    """A GPT-2 and a Llama of 4 layers, each a mixture of 8 experts, 2 per token, with random
    weights; experts differ as much as their weights do."""
    torch.manual_seed(0)
    gpt2 = GPT2Config(
        vocab_size=1000, n_positions=positions, n_embd=width, n_layer=4, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions,
        pad_token_id=None,
    )  # fmt: skip
    dense = {"GPT-2": GPT2LMHeadModel(gpt2), "Llama": LlamaForCausalLM(llama)}
    return {
        name: upcycle(model.eval(), [0, 1, 2, 3], num_experts=8, top_k=2, noise=1.0)
        for name, model in dense.items()
    }


def measure(model: Any, rows: int, positions: int) -> list[tuple[str, int, int]]:
    """Per way to read the same sequences: its name, token-layers that changed, and all of them."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(positions // 4, positions + 1, (rows,), generator=generator).tolist()
    sequences = [torch.randint(1, 1000, (length,), generator=generator) for length in lengths]
    by_itself = [alone(model, ids_L) for ids_L in sequences]
    ways = {
        "in a batch, padded on the right": padded(model, sequences, "right"),
        "in a batch, padded on the left": padded(model, sequences, "left"),
        "prefill of half, then token by token": [
            in_parts(model, ids_L, [len(ids_L) // 2, *[1] * (len(ids_L) - len(ids_L) // 2)])
            for ids_L in sequences
        ],
    }
    found = []
    for name, reads in ways.items():
        each = [changed(one, other) for one, other in zip(by_itself, reads, strict=True)]
        found.append((name, sum(int(c.sum()) for c in each), sum(c.numel() for c in each)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_answer")
    parser.add_argument("--rows", type=int, default=32, help="sequences in the batch")
    parser.add_argument("--positions", type=int, default=256, help="tokens of the longest")
    parser.add_argument("--width", type=int, default=256, help="of the models")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    start_logging()
    for name, model in models(options.width, options.positions).items():
        for dtype in ("fp32", "bf16"):
            model = model.to(DTYPES[dtype])
            for way, count, of in measure(model, options.rows, options.positions):
                logger.info("%s, %s, %s: %d of %d changed", name, dtype, way, count, of)


if __name__ == "__main__":
    main()
