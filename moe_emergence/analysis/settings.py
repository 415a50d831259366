"""The configuration of an analysis; the docstring under each field is its command-line help."""

from dataclasses import dataclass
from typing import Literal

import tyro

from moe_emergence.config.data import token_classes
from moe_emergence.names import SPREAD, WeightDtype
from moe_emergence.settings import check


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Routing of runs or models as tables, figures and report.html."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Run folders, model folders or ids of models on the hub; several are compared."""
    data: str | None = None
    """Text: "embedded", "hub", a folder or a file; without it a run's own evaluation blocks, else
    the embedded text."""
    domains: tuple[str, ...] = ()
    """Domains of the text, in this order; none takes all it has."""
    domain_field: str | None = None
    """Field that names the domain of every row, where --data holds them mixed."""
    text_field: str = "text"
    """Field that holds the text of a row."""
    token_types: tuple[str, ...] = ()
    """How the tokens of a domain are told apart, as domain=python, math, words (English) or none; a
    domain not named is guessed from its text."""
    text: str | None = None
    """Text file whose beginning the report's token explorer shows too, before the others."""
    out: str | None = None
    """Folder for the analysis; without it SOURCE/analysis, or runs/analysis for several."""
    diff: bool = False
    """Match the experts of two sources and say which tokens moved, instead of the analysis."""
    gallery: str | None = None
    """Markdown file to show the figures in."""
    device: str = "auto"
    """Where to run: auto (cuda where there is one), cpu, cuda, or spread (all GPUs, and the host's
    memory for what is left)."""
    dtype: WeightDtype = "auto"
    """What to load weights as: auto (as they were saved), fp32, bf16 or fp16."""
    max_tokens: int = 200_000
    """Tokens to route at most, shared by the domains; 0 for all."""
    block_size: int | None = None
    """Tokens per block; without it the run's, else what the model sees, at most 512."""
    batch_size: int = 8
    """Blocks in one forward pass."""
    permutations: int = 199
    """Permutations of each test."""
    knockout_tokens: int = 6_000
    """Tokens on which every expert is knocked out, one after the other; 0 leaves it out."""
    test: Literal["none", "modules"] = "none"
    """Test by ablation: modules names every domain's experts on the first half of the text, and
    takes them and random sets away on the second (some 150 passes over --knockout-tokens)."""
    keep_experts: tuple[str, ...] = ()
    """With --test modules: for each domain named, write a model folder kept-DOMAIN that has only
    the experts of --keep that the domain loses most without."""
    keep: int = 2
    """Experts per layer that --keep-experts keeps."""
    second_data: str | None = None
    """Another text to take the modules away on, named as for --data."""
    cache_dir: str = ".cache"
    """Folder for everything that is downloaded or trained once and reused."""
    seed: int = 0
    """Seed of permutations, bootstrap and null routers."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        check(bool(self.sources), "SOURCE", "of nothing", "name a run or model folder")
        check(
            not self.diff or len(self.sources) == 2,
            "--diff",
            " ".join(self.sources),
            f"it compares two sources, not {len(self.sources)}",
        )
        unread = {"--gallery": self.gallery, "--test modules": self.test != "none"}
        for flag, given in unread.items():
            check(not (self.diff and given), flag, "with --diff", "leave one of them out")
        check(self.max_tokens >= 0, "--max-tokens", self.max_tokens, "give 0 (all) or more")
        check(
            self.block_size is None or self.block_size >= 2,
            "--block-size",
            self.block_size,
            "give at least 2 tokens",
        )
        check(self.batch_size >= 1, "--batch-size", self.batch_size, "give at least 1")
        check(self.permutations >= 19, "--permutations", self.permutations, "give at least 19")
        check(
            self.knockout_tokens >= 0,
            "--knockout-tokens",
            self.knockout_tokens,
            "give 0 (none) or more",
        )
        check(
            self.test == "none" or self.knockout_tokens > 0,
            "--knockout-tokens",
            self.knockout_tokens,
            "the module test takes experts away on so many tokens; give more",
        )
        check(
            self.second_data is None or self.test == "modules",
            "--second-data",
            self.second_data,
            "only --test modules reads a second text; give that, or leave it out",
        )
        check(
            not self.keep_experts or self.test == "modules",
            "--keep-experts",
            list(self.keep_experts),
            "the module test names the experts; give --test modules too, or leave it out",
        )
        check(
            not self.keep_experts or len(self.sources) == 1,
            "--keep-experts",
            list(self.keep_experts),
            f"one SOURCE is cut at a time, not {len(self.sources)}",
        )
        token_classes(self.token_types)
        check(self.keep >= 1, "--keep", self.keep, "give at least 1")
        check(0 <= self.seed < 2**31, "--seed", self.seed, "give a number from 0 to 2^31 - 1")
        check(
            self.device in ("auto", "cpu", SPREAD) or self.device.startswith("cuda"),
            "--device",
            self.device,
            "give auto, cpu, cuda or spread",
        )
