"""Models and batches whose optimizer steps are measured.

Letters: A micro-batches, B sequences in one, L tokens in a sequence.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setup:
    """A model and a batch."""

    name: str
    layers: int
    hidden: int
    heads: int
    moe_layers: tuple[int, ...]
    vocabulary: int
    block: int
    batch: int
    accumulate: int
    experts: int = 8
    top_k: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.block * self.batch * self.accumulate

    def flops(self, *, is_moe: bool) -> float:
        """Multiplications and additions of a step's matrix products, forward and backward.

        Causal attention counts the half that is not masked.
        """
        attention = self.layers * (4 * self.hidden**2 + self.block * self.hidden)
        dense, moe = self.layers - len(self.moe_layers), len(self.moe_layers)
        mlp = 8 * self.hidden**2 * (dense + moe * (self.top_k if is_moe else 1))
        routers = moe * self.experts * self.hidden if is_moe else 0
        return 6.0 * self.tokens * (attention + mlp + routers + self.vocabulary * self.hidden)


SETUPS = {
    setup.name: setup
    for setup in (
        Setup("demo", 4, 256, 4, (2, 3), 4096, 128, 8, 1),
        Setup("gpt2-small", 12, 768, 12, (8, 9, 10, 11), 50257, 512, 2, 4),
        Setup("gpt2-small-micro-batch", 12, 768, 12, (8, 9, 10, 11), 50257, 512, 2, 1),
        Setup("gpt2-small-top2", 12, 768, 12, (8, 9, 10, 11), 50257, 512, 2, 4, top_k=2),
        Setup("gpt2-small-batch16", 12, 768, 12, (8, 9, 10, 11), 50257, 512, 16, 1),
        Setup("tiny", 2, 16, 2, (1,), 64, 8, 2, 2, experts=4),
    )
}
