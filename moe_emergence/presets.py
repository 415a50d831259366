"""Named starting points: functions that return a `RunConfig`, each ablation one change away.

`PRESETS` is the table behind `--preset`; every flag works on top of any of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from moe_emergence.config import DataConfig, ModelConfig, MonitorConfig, OptimConfig, RunConfig
from moe_emergence.settings import check_known


@dataclass(frozen=True)
class Preset:
    """A preset, the preset it starts from, and the fields in which the two differ."""

    make: Callable[[], RunConfig]
    base: str | None = None
    changes: tuple[str, ...] = ()


def demo() -> RunConfig:
    """A small GPT-2 pretrained on text that ships with Python, upcycled and trained on; minutes."""
    return RunConfig(
        preset="demo",
        run_name="demo",
        model=ModelConfig(
            base="scratch",
            n_layer=4,
            n_embd=256,
            n_head=4,
            moe_layers=(2, 3),
            num_experts=8,
            router="frozen",
            router_init="clusters",
        ),
        data=DataConfig(data="embedded", size_mb=2.0, block_size=128, tokenizer="train"),
        optim=OptimConfig(
            max_steps=200,
            batch_size=8,
            grad_accum_steps=1,
            learning_rate=1e-3,
            pretrain_steps=700,
            pretrain_learning_rate=2e-3,
            compare_dense=True,
            compare_null=True,
        ),
        monitor=MonitorConfig(
            eval_every=50,
            eval_blocks=32,
            save_every=100,
            keep_last_k=2,
            log_router_every=10,
            collapse_every=10,
        ),
    )


def moe_main() -> RunConfig:
    """The predecessor's main run: GPT-2, layers 8-11, 8 experts, top-1, balance and z losses."""
    return RunConfig(
        preset="moe-main", run_name="moe-main", optim=OptimConfig(balance_scope="micro")
    )


def shakedown() -> RunConfig:
    """`moe_main`, 100 steps on 1 MB a domain: does everything work?"""
    main = moe_main()
    return replace(
        main,
        preset="shakedown",
        run_name="shakedown",
        data=replace(main.data, size_mb=1.0),
        optim=replace(main.optim, max_steps=100),
        monitor=replace(main.monitor, eval_every=50, save_every=50),
    )


def dense() -> RunConfig:
    """The dense baseline: no mixture layers, 5,000 steps."""
    main = moe_main()
    return replace(
        main,
        preset="dense",
        run_name="dense",
        model=replace(main.model, moe_layers=()),
        optim=replace(main.optim, max_steps=5_000),
    )


def no_lb() -> RunConfig:
    """`moe_main` without the balance loss, 2,000 steps, stopped at a collapse."""
    main = moe_main()
    return replace(
        main,
        preset="no-lb",
        run_name="no-lb",
        optim=replace(main.optim, lb_coef=0.0, max_steps=2_000),
        monitor=replace(main.monitor, collapse_early_stop=True),
    )


def top2() -> RunConfig:
    """`moe_main` with two experts per token."""
    main = moe_main()
    return replace(main, preset="top2", run_name="top2", model=replace(main.model, top_k=2))


PRESETS: dict[str, Preset] = {
    "demo": Preset(demo),
    "shakedown": Preset(
        shakedown,
        "moe-main",
        ("data.size_mb", "optim.max_steps", "monitor.eval_every", "monitor.save_every"),
    ),
    "dense": Preset(dense, "moe-main", ("model.moe_layers", "optim.max_steps")),
    "moe-main": Preset(moe_main),
    "no-lb": Preset(
        no_lb, "moe-main", ("optim.lb_coef", "optim.max_steps", "monitor.collapse_early_stop")
    ),
    "top2": Preset(top2, "moe-main", ("model.top_k",)),
}


def get_preset(name: str) -> RunConfig:
    """The configuration of the preset called `name`; `ValueError` for an unknown one."""
    check_known("--preset", name, PRESETS)
    return PRESETS[name].make()
