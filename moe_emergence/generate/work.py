"""Continue a prompt with a model, and show which expert reads which token."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_emergence.analysis.steering import steered
from moe_emergence.analysis.token_routing import print_routing
from moe_emergence.begin import begin
from moe_emergence.dependencies import raised_in
from moe_emergence.device import find_device
from moe_emergence.generate import GenerateConfig
from moe_emergence.hub_access import reason
from moe_emergence.models import MixtureModel, upcycle
from moe_emergence.models.loading import LanguageModel, load_trained_model
from moe_emergence.moe.dispatch import get_dispatcher
from moe_emergence.settings import check
from moe_emergence.terminal import Console

logger = logging.getLogger(__name__)


def show(config: GenerateConfig) -> int:
    """Print the prompt and its continuation, and with `show_routing` how they were routed."""
    begin()
    find_device(config.device)
    get_dispatcher(config.dispatch)
    model, tokenizer = load(config)
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    with steered(model, config.mute, config.boost):
        ids = generate(config, model, tokenizer)
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
        tokenizer("a")
    except Exception as error:  # a damaged file fails in as many ways as there are fields in it
        raise ValueError(
            f"--tokenizer {place}: no tokenizer could be loaded ({reason(error)}); give a folder "
            "with one"
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
            "top_k": config.sample_top_k,
            "top_p": config.sample_top_p,
        }
    try:
        ids = cast(Any, model).generate(
            **prompt,
            max_new_tokens=min(config.max_new_tokens, room),
            do_sample=config.temperature > 0,
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    except (TypeError, ValueError, AttributeError) as error:
        if raised_in(error) is None:
            raise
        raise ValueError(
            f"--checkpoint {config.checkpoint}: its config.json or generation_config.json cannot "
            f"be used to generate ({reason(error)}); mend it, or save the model again"
        ) from error
    return cast(torch.Tensor, ids)
