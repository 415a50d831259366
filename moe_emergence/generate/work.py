"""`python -m moe_emergence.generate`: continue a prompt, and see which expert reads which token."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_emergence.analysis.token_routing import print_routing
from moe_emergence.command import parse, run
from moe_emergence.models import MixtureModel, upcycle
from moe_emergence.models.loading import LanguageModel, load_trained_model
from moe_emergence.moe.dispatch import DispatchName, get_dispatcher
from moe_emergence.settings import check

PROG = "python -m moe_emergence.generate"

logger = logging.getLogger(__name__)


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
    top_k: int = 0
    """Sample from the k most likely tokens only; 0 from all."""
    top_p: float = 1.0
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
        check(self.top_k >= 0, "--top-k", self.top_k, "give 0 (all) or more")
        check(0 < self.top_p <= 1, "--top-p", self.top_p, "give a probability above 0, at most 1")
        check(bool(self.prompt), "--prompt", repr(self.prompt), "give some text")
        check(
            self.device == "cpu" or (self.device.startswith("cuda") and torch.cuda.is_available()),
            "--device",
            self.device,
            "give cpu, or cuda where there is one",
        )


def main(argv: list[str]) -> int:
    """Generate as the flags say."""
    config = parse(GenerateConfig, argv, PROG)
    get_dispatcher(config.dispatch)
    model, tokenizer = load(config)
    ids = generate(config, model, tokenizer)
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    console.print(tokenizer.decode(ids[0], skip_special_tokens=True), markup=False)
    if config.show_routing:
        assert isinstance(model, MixtureModel)
        print_routing(console, model, tokenizer, ids)
    return 0


def load(config: GenerateConfig) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; `ValueError` naming the flag when one of them cannot be used."""
    try:
        model = load_trained_model(Path(config.checkpoint))
    except ValueError as error:
        raise ValueError(
            f"--checkpoint {error}; give a model folder such as runs/demo/best-model"
        ) from error
    place = config.tokenizer or config.checkpoint
    try:
        if not Path(place).is_dir():
            raise FileNotFoundError("there is no such folder")
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--tokenizer {place}: no tokenizer could be loaded ({str(error).splitlines()[0]}); "
            f"give a folder with one"
        ) from error
    check(
        len(tokenizer) <= model.config.vocab_size,
        "--tokenizer",
        f"{place} with {len(tokenizer)} entries",
        f"give one that fits the model, which has {model.config.vocab_size}",
    )
    if config.upcycle_layers:
        if isinstance(model, MixtureModel):
            raise ValueError("--upcycle-layers: the model already is a mixture; leave the flag out")
        check(
            all(0 <= layer < model.config.num_hidden_layers for layer in config.upcycle_layers),
            "--upcycle-layers",
            list(config.upcycle_layers),
            f"the model has layers 0 to {model.config.num_hidden_layers - 1}",
        )
        model = upcycle(
            model,
            config.upcycle_layers,
            config.num_experts,
            config.experts_per_token,
            seed=config.seed,
        )
    if isinstance(model, MixtureModel):
        model.set_dispatch(config.dispatch)
    elif config.show_routing:
        raise ValueError("--show-routing: a dense model routes nothing; leave the flag out")
    torch.nn.Module.to(model, config.device)
    return model.eval(), tokenizer


def generate(
    config: GenerateConfig, model: LanguageModel, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Token ids (1, L) of the prompt and its continuation."""
    prompt = tokenizer(config.prompt, return_tensors="pt").to(config.device)
    sees: int = model.config.max_position_embeddings
    room = sees - prompt["input_ids"].shape[1]
    check(
        room >= 1,
        "--prompt",
        f"of {prompt['input_ids'].shape[1]} tokens",
        f"the model sees {sees}; give a shorter one",
    )
    if room < config.max_new_tokens:
        logger.warning(
            "the model sees %d tokens: adding %d", model.config.max_position_embeddings, room
        )
    torch.manual_seed(config.seed)
    sampling: dict[str, Any] = {}
    if config.temperature > 0:
        sampling = {
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
        }
    ids = cast(Any, model).generate(
        **prompt,
        max_new_tokens=min(config.max_new_tokens, room),
        do_sample=config.temperature > 0,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    return cast(torch.Tensor, ids)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
