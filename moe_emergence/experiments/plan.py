"""From a suite to its runs: one configuration for every variant and seed, dense bases first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_emergence.config import RunConfig
from moe_emergence.experiments.description import BASE
from moe_emergence.experiments.flops import steps_for, training_flops
from moe_emergence.experiments.suite_file import Suite
from moe_emergence.experiments.variants import read_base, read_variants
from moe_emergence.run_folder import RunFolder
from moe_emergence.settings import to_dict

_BASE_SEEDS = 1_000_000
"""Added to the seed of a base, so that its order of the data is that of no variant."""


@dataclass(frozen=True)
class PlannedRun:
    """A run of a suite, and the base that must be complete before it."""

    variant: str
    seed: int
    config: RunConfig
    needs_base: bool
    test_modules: bool = False

    @property
    def name(self) -> str:
        """For tables and logs."""
        return f"{self.variant}/seed-{self.seed}"

    @property
    def run(self) -> RunFolder:
        """Its folder."""
        return RunFolder(Path(self.config.output_dir) / self.config.run_name)


def plan_runs(
    suite: Suite, root: Path, overrides: Mapping[str, Any] | None = None
) -> list[PlannedRun]:
    """The runs in the order in which they are to be done: seed by seed, its base first.

    Args:
        suite: the table.
        root: the suite's folder; runs are in ROOT/VARIANT/seed-S.
        overrides: dotted fields on top of everything, for example the device.

    Raises:
        ValueError: for a field that does not exist or a configuration that makes no sense.
    """
    configs = variant_configs(suite, overrides or {})
    base = read_base(suite, overrides or {})
    runs = []
    for seed in suite.seeds:
        if base is not None:
            placed = _one_split(_placed(base, root, BASE, seed), seed)
            runs.append(PlannedRun(BASE, seed, placed, False))
        for name, config in configs.items():
            placed = _placed(config, root, name, seed)
            if base is not None:
                model = replace(placed.model, base=str(runs_base(root, seed).final_model))
                optim = replace(placed.optim, pretrain_steps=0)
                placed = _one_split(replace(placed, model=model, optim=optim), seed)
            tested = name in suite.test_modules
            runs.append(PlannedRun(name, seed, placed, base is not None, tested))
    return runs


def runs_base(root: Path, seed: int) -> RunFolder:
    """Folder of the dense base of a seed."""
    return RunFolder(root / BASE / f"seed-{seed}")


def variant_configs(suite: Suite, overrides: Mapping[str, Any]) -> dict[str, RunConfig]:
    """`read_variants`, with as many steps as the FLOPs of another variant pay for where it says."""
    return read_variants(suite, overrides, lambda other, own: steps_for(training_flops(other), own))


def _placed(config: RunConfig, root: Path, variant: str, seed: int) -> RunConfig:
    return replace(
        config,
        output_dir=str(root / variant),
        run_name=f"seed-{seed}",
        resume="auto",
        seed=seed + _BASE_SEEDS if variant == BASE else seed,
    )


def _one_split(config: RunConfig, seed: int) -> RunConfig:
    """With the split of the variants' seed, unless there is one for all: the base has another
    seed, and would be trained on what they are evaluated on."""
    if config.data.split_seed is not None:
        return config
    return replace(config, data=replace(config.data, split_seed=seed))


def describe(
    suite: Suite, command: Sequence[str], overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`suite.json`, which the report starts from: changes as they are, every step number known."""
    configs = variant_configs(suite, overrides or {})
    variants = []
    for variant in suite.variants:
        changes = dict(variant.changes)
        if variant.flops_of is not None:
            changes["optim.max_steps"] = configs[variant.name].optim.max_steps
        variants.append(
            {
                "name": variant.name,
                "question": variant.question,
                "like": variant.like or variant.preset or suite.preset,
                "changes": changes,
            }
        )
    return {
        "name": suite.name,
        "question": suite.question,
        "preset": suite.preset,
        "seeds": list(suite.seeds),
        "changes": dict(suite.changes),
        "base": None if suite.base is None else dict(suite.base),
        "variants": variants,
        "comparisons": [to_dict(pair) for pair in suite.comparisons],
        "command": " ".join(command),
    }
