"""`python -m moe_emergence.generate`: continue a prompt, and see which expert reads which token."""

from dataclasses import dataclass

from moe_emergence.names import DispatchName
from moe_emergence.settings import check

PROG = "python -m moe_emergence.generate"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt with a trained mixture, a dense GPT-2 or an untrained upcycled one."""

    checkpoint: str
    """Model folder: RUN/best-model, RUN/final-model, RUN/checkpoints/step-…, or any GPT-2."""
    prompt: str
    """Text to continue."""
    tokenizer: str | None = None
    """Folder of the tokenizer; without it the one in the model folder."""
    max_new_tokens: int = 60
    """Tokens to add at most."""
    temperature: float = 0.8
    """Sampling temperature; 0 always takes the most likely token."""
    sample_top_k: int = 0
    """Sample from the k most likely tokens only; 0 from all."""
    sample_top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling, and of the router of an upcycled model."""
    upcycle_layers: tuple[int, ...] = ()
    """Turn these layers of a dense model into mixtures first (untrained)."""
    num_experts: int = 8
    """Experts of an upcycled layer."""
    experts_per_token: int = 1
    """Experts per token of an upcycled layer."""
    device: str = "cpu"
    """Where to run: cpu or cuda."""
    dispatch: DispatchName = "auto"
    """Path through the experts."""
    show_routing: bool = False
    """Show every token in the colour of its expert, for every mixture layer."""
    mute: tuple[str, ...] = ()
    """Experts never to choose, as LAYER:EXPERT; the next best take their tokens."""
    boost: tuple[str, ...] = ()
    """Experts to favour, as LAYER:EXPERT or LAYER:EXPERT=BIAS: BIAS (4 if not given) is added to
    their logits."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, "--max-new-tokens", self.max_new_tokens, "give at least 1")
        check(
            self.temperature == 0 or 0.01 <= self.temperature <= 100,
            "--temperature",
            self.temperature,
            "give 0 (always the most likely token) or a number from 0.01 to 100",
        )
        check(0 <= self.seed < 2**31, "--seed", self.seed, "give a number from 0 to 2^31 - 1")
        check(self.num_experts >= 1, "--num-experts", self.num_experts, "give at least 1")
        check(
            1 <= self.experts_per_token <= self.num_experts,
            "--experts-per-token",
            self.experts_per_token,
            f"give a number from 1 to --num-experts ({self.num_experts})",
        )
        check(self.sample_top_k >= 0, "--sample-top-k", self.sample_top_k, "give 0 (all) or more")
        check(
            0 < self.sample_top_p <= 1,
            "--sample-top-p",
            self.sample_top_p,
            "give a probability above 0, at most 1",
        )
        check(bool(self.prompt), "--prompt", repr(self.prompt), "give some text")
        check(
            self.device == "cpu" or self.device.startswith("cuda"),
            "--device",
            self.device,
            "give cpu or cuda",
        )


def main(argv: list[str]) -> int:
    """Generate as the flags say."""
    from moe_emergence.command import loading, parse

    config = parse(GenerateConfig, argv, PROG)

    with loading():
        from moe_emergence.generate.work import show

    return show(config)
