"""Colours of experts: different ones, for other eyes and in terminals too."""

import io
import itertools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from rich.color import Color, ColorSystem
from rich.console import Console

from moe_emergence.analysis.palette import FOR_ANY_EYE, PALETTE, TERMINAL_16
from moe_emergence.analysis.token_routing import print_routing

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip
NOTICEABLE = 0.05
"""In OKLab, where 0.02 is just noticeable side by side."""

Floats = npt.NDArray[np.float64]


def linear(colours: tuple[str, ...]) -> Floats:
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: Floats) -> Any:
    """Ottosson 2020."""
    cones = np.array(
        [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]]
    )  # fmt: skip
    lab = np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]
    )  # fmt: skip
    return np.cbrt(np.clip(rgb, 0, 1) @ cones.T) @ lab.T


@pytest.mark.parametrize("vision", VISIONS)
def test_colours_can_be_told_apart(vision: str) -> None:
    count = len(PALETTE) if vision == "normal" else FOR_ANY_EYE
    seen = oklab(linear(PALETTE[:count]) @ VISIONS[vision].T)
    nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
    assert nearest > NOTICEABLE


def test_black_can_be_read_on_each() -> None:
    luminance = linear(PALETTE) @ [0.2126, 0.7152, 0.0722]
    assert ((luminance + 0.05) / 0.05 > 4.5).all()  # WCAG 2.1, 1.4.3


def test_terminals_show_them_as_different_colours() -> None:
    assert len(PALETTE) == 64
    for colours, system in ((PALETTE, ColorSystem.EIGHT_BIT), (TERMINAL_16, ColorSystem.STANDARD)):
        shown = {Color.parse(colour).downgrade(system).number for colour in colours}
        assert len(shown) == len(colours)


@pytest.mark.parametrize(("system", "experts"), [("truecolor", 12), ("256", 12), ("standard", 12)])
def test_tokens_of_two_experts_look_different(system: Any, experts: int) -> None:
    """As a terminal gets them: no two of twelve experts have one escape sequence."""
    chosen = torch.arange(experts)[:, None]
    model: Any = lambda **_: SimpleNamespace(  # noqa: E731
        router_decisions=[SimpleNamespace(topk_experts=chosen)]
    )
    model.config = SimpleNamespace(num_experts=experts)
    model.moe_layers = lambda: {3: None}
    tokenizer: Any = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    console = Console(file=io.StringIO(), color_system=system, force_terminal=True, width=400)
    print_routing(console, model, tokenizer, torch.arange(experts)[None])
    assert isinstance(console.file, io.StringIO)
    seen = re.findall(r"\x1b\[([\d;]+)m<\d+>", console.file.getvalue())
    assert len(set(seen)) == len(seen) == experts
    numbered = f"[{experts - 1}]" in re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())
    assert numbered == (system == "standard")
