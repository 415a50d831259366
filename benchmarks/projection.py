"""How long the full-size runs would take, from the measured speed of their steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import Row
from moe_emergence.presets import get_preset

FULL_SIZE = "gpt2-small"


@dataclass(frozen=True)
class Projection:
    """One preset at the speed of the row that takes its step; None where that is unmeasured."""

    preset: str
    steps: int
    contestant: str
    tokens_per_s: float | None
    minutes: float | None


def project(rows: Sequence[Row], dtype: str) -> list[Projection]:
    """The predecessor's four runs, without evaluation and checkpoints."""
    found = []
    for preset, suffix, contestant in (
        ("dense", "", "dense"),
        ("moe-main", "", "fused-micro"),
        ("no-lb", "", "fused-micro"),
        ("top2", "-top2", "fused-micro"),
    ):
        config = get_preset(preset)
        optim = config.optim
        tokens = optim.max_steps * optim.batch_size * optim.grad_accum_steps
        tokens *= config.data.block_size
        group = f"{FULL_SIZE}{suffix}/{dtype}"
        own = [r for r in rows if r.is_ranked and (r.group, r.contestant) == (group, contestant)]
        speed = own[0].tokens_per_s if own else None
        minutes = tokens / speed / 60 if speed else None
        found.append(Projection(preset, optim.max_steps, contestant, speed, minutes))
    return found


def projection_table(rows: Sequence[Row]) -> str | None:
    """Markdown of every dtype in which the full-size model was measured; None if it was in none."""
    own = [r for r in rows if r.suite == "training" and r.group.startswith(f"{FULL_SIZE}/")]
    dtypes = dict.fromkeys(r.group.partition("/")[2] for r in own)
    if not dtypes:
        return None
    lines = [
        "| run | steps | dtype | step as in | tokens/s | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in dtypes:
        for run in project(rows, dtype):
            numbers = "unmeasured | unmeasured"
            if run.minutes is not None:
                numbers = f"{run.tokens_per_s:,.0f} | {run.minutes:,.0f}"
            lines.append(
                f"| {run.preset} | {run.steps:,} | {dtype} | {run.contestant} | {numbers} |"
            )
    return "\n".join(lines)
