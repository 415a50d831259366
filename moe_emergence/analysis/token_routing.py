"""A text with every token in the colour of its expert, for the terminal."""

import torch
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from moe_emergence.analysis.palette import FOR_ANY_EYE, PALETTE, TERMINAL_16
from moe_emergence.models import MixtureModel
from moe_emergence.terminal import Console


@torch.no_grad()
def print_routing(
    console: Console,
    model: MixtureModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids_1L: torch.Tensor,
) -> None:
    """Print the tokens of `input_ids_1L` (1, L) once per mixture layer, coloured by first expert.

    Where the console shows fewer than 256 colours, and with more experts than any eye can tell
    apart by colour, the expert's number stands behind its tokens.
    """
    decisions = model(input_ids=input_ids_1L, use_cache=False).router_decisions
    tokens = [str(tokenizer.decode([token])) for token in input_ids_1L[0].tolist()]
    num_experts = model.config.num_experts
    many = console.color_system in ("256", "truecolor")
    colours = PALETTE if many else TERMINAL_16
    styles = [f"black on {colours[expert % len(colours)]}" for expert in range(num_experts)]
    numbered = not many or num_experts > FOR_ANY_EYE
    for layer, decision in zip(sorted(model.moe_layers()), decisions, strict=True):
        experts = decision.topk_experts[:, 0].tolist()
        text = Text(f"\nlayer {layer}  ", style="bold")
        for expert, style in enumerate(styles):
            text.append(f" {expert} ", style=style)
            text.append(f"{experts.count(expert) / len(experts):4.0%}  ", style="not bold")
        text.append("\n")
        for token, expert in zip(tokens, experts, strict=True):
            text.append(token, style=f"not bold {styles[expert]}")
            if numbered:
                text.append(f"[{expert}]", style="not bold dim")
        console.print(text)
