"""What `MoERoutingCallback` costs of a training step: `python -m benchmarks.routing_callback`.

Steps with and without its counting take turns; every tenth counted step also reads what was
counted, as a Trainer's log does. The ratio is the median over pairs of neighbouring steps; the
share is the time within the hooks over that of the step, which a busy machine moves less.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from benchmarks.command import start_logging
from moe_emergence.analysis.meter import RoutingMeter
from moe_emergence.models import upcycle

logger = logging.getLogger(__name__)

LOG_EVERY = 10


def models(tiny: bool) -> dict[str, Any]:
    """A Mixtral and a GPT-2 upcycled here, of 4 layers with 8 experts, 2 per token."""
    width = 32 if tiny else 256
    torch.manual_seed(0)
    mixtral = MixtralConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=8,
    )  # fmt: skip
    dense = GPT2Config(
        vocab_size=1000, n_positions=128, n_embd=width, n_layer=4, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    upcycled = upcycle(GPT2LMHeadModel(dense), layers=[0, 1, 2, 3], num_experts=8, top_k=2)
    return {"Mixtral": MixtralForCausalLM(mixtral), "upcycled GPT-2": upcycled}


def measure(model: nn.Module, pairs: int, rows: int) -> tuple[float, float, float]:
    """Median seconds of a step without counting, the ratio with it, and the hooks' share."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 1000, (rows, 128))
    meter = RoutingMeter(model.train())
    inside = _timed(meter, ("_begin", "_decided", "_end", "take"))

    def step() -> None:
        model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def counted(number: int) -> None:
        step()
        if number % LOG_EVERY == 0:
            meter.take()

    plain, ratios, shares = [], [], []
    for number in range(-3, pairs):
        times = {}
        for watched in (number % 2 == 0, number % 2 != 0):
            if watched:
                meter.start()
            inside.clear()
            begin = time.perf_counter()
            counted(number) if watched else step()
            times[watched] = time.perf_counter() - begin
            if watched:
                shares.append(sum(inside) / times[watched])
            meter.stop()
        plain.append(times[False])
        ratios.append(times[True] / times[False])
    warm = slice(3, None)
    return (
        statistics.median(plain[warm]),
        statistics.median(ratios[warm]),
        statistics.fmean(shares[warm]),
    )


def _timed(meter: RoutingMeter, names: Sequence[str]) -> list[float]:
    """Seconds of every call of these methods, from now on."""
    seconds: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                seconds.append(time.perf_counter() - begin)

        return inner

    for name in names:
        setattr(meter, name, timed(getattr(meter, name)))
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing_callback")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of steps for each model")
    parser.add_argument("--rows", type=int, default=8, help="sequences of 128 tokens in a step")
    parser.add_argument("--tiny", action="store_true", help="models of width 32 instead of 256")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    start_logging()
    torch.set_num_threads(1)
    for name, model in models(options.tiny).items():
        seconds, ratio, share = measure(model, options.pairs, options.rows)
        logger.info(
            "%s: step %.1f ms, with counting x %.4f, hooks %.2f%% of the step",
            name, 1000 * seconds, ratio, 100 * share,
        )  # fmt: skip


if __name__ == "__main__":
    main()
