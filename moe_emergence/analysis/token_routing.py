"""A text with every token in the colour of its expert, for the terminal."""

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from moe_emergence.models import MixtureModel

# Okabe and Ito's palette, told apart with any common colour vision
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


@torch.no_grad()
def print_routing(
    console: Console,
    model: MixtureModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids_1L: torch.Tensor,
) -> None:
    """Print the tokens of `input_ids_1L` (1, L) once per mixture layer, coloured by first expert.

    Where the console shows no colours, and for experts that share one, the expert's number stands
    behind its tokens.
    """
    decisions = model(input_ids=input_ids_1L, use_cache=False).router_decisions
    tokens = [str(tokenizer.decode([token])) for token in input_ids_1L[0].tolist()]
    num_experts = model.config.num_experts
    numbered = console.color_system not in ("256", "truecolor") or num_experts > len(_COLOURS)
    for layer, decision in zip(sorted(model.moe_layers()), decisions, strict=True):
        experts = decision.topk_experts[:, 0].tolist()
        text = Text(f"\nlayer {layer}  ", style="bold")
        for expert in range(num_experts):
            text.append(f" {expert} ", style=_style(expert))
            text.append(f"{experts.count(expert) / len(experts):4.0%}  ", style="not bold")
        text.append("\n")
        for token, expert in zip(tokens, experts, strict=True):
            text.append(token, style=f"not bold {_style(expert)}")
            if numbered:
                text.append(f"[{expert}]", style="not bold dim")
        console.print(text)


def _style(expert: int) -> str:
    return f"black on {_COLOURS[expert % len(_COLOURS)]}"
