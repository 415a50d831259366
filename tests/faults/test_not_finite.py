"""A run that ends in NaN or infinity says in which tensor that began."""

import os
import re
import sys
from contextlib import redirect_stderr
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from cpu_graph import RecordedOnCpu
from hypothesis import given, settings
from hypothesis import strategies as st
from process_groups import in_processes
from small_models import make_model
from torch import Tensor, nn

from moe_emergence import train
from moe_emergence.config import OptimConfig
from moe_emergence.data.loader import StepBatch
from moe_emergence.errors import exit_code
from moe_emergence.moe import RouterNoise
from moe_emergence.training.graph import GraphedUpdate
from moe_emergence.training.not_finite import where_not_finite
from moe_emergence.training.objective import NextTokenLoss
from moe_emergence.training.schedules import Rates, build_optimizer
from moe_emergence.training.update import Update

OPTIM = OptimConfig(max_steps=9, learning_rate=1e-2)
BAD = 5
"""The step that is spoiled, counted from 0; three come before a graph is captured."""


def batches() -> list[StepBatch]:
    """Token 63 is in one of them alone."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for step in range(9):
        ids = torch.randint(0, 63, (1, 2, 10), generator=generator)
        ids[0, 0, 4] = 63 if step == BAD else ids[0, 0, 4]
        found.append(StepBatch(ids, torch.ones(1, 2, 1, dtype=torch.float64)))
    return found


class Spoils(nn.Module):
    """In front of a language model: tells its modules whether token 63 is in the batch.

    As a number on the device, since a graph is replayed without asking Python.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.factor = torch.ones(())
        model.register_forward_pre_hook(self._look, with_kwargs=True)
        model.base_model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.factor = torch.where((ids == 63).any(), torch.inf, 1.0)


def parts(model: Any) -> list[str]:
    """Modules that return one tensor, all of which the output depends on."""
    found: list[str] = []
    hooks = [
        module.register_forward_hook(
            lambda _m, _i, out, name=name: found.append(name) if isinstance(out, Tensor) else None
        )
        for name, module in model.named_modules()
        if not list(module.children()) and name
    ]
    model(torch.arange(6)[None])
    for hook in hooks:
        hook.remove()
    return [name for name in found if name != "lm_head"]  # which training does not call


def steps(model: Any, graphed: bool) -> tuple[Update, dict[str, Tensor], list[Any]]:
    """Takes all steps; the weights before the spoiled one."""
    accelerator = Accelerator(cpu=True)
    model.train()
    loss, optimizer = accelerator.prepare(NextTokenLoss(model), build_optimizer(model, OPTIM))
    update = Update(accelerator, loss, optimizer, OPTIM)
    take: Any = update
    if graphed:
        take = GraphedUpdate(update, required=True, capture=RecordedOnCpu())
    outcomes = []
    for step, batch in enumerate(batches()):
        if step == BAD:
            kept = deepcopy(model.state_dict())
        outcomes.append(take(batch, RouterNoise(0.1, 0, step), Rates(1e-2, 1e-2)))
    return update, kept, outcomes


def said_of(model: Any, update: Update) -> str:
    noise = RouterNoise(0.1, 0, BAD)
    return where_not_finite(
        update.accelerator, model, lambda: update.gradients(batches()[BAD], noise)
    )


@settings(max_examples=12)
@given(st.data(), st.booleans())
def test_the_first_output_is_named_and_the_weights_before_it_are_kept(
    data: st.DataObject, graphed: bool
) -> None:
    model: Any = make_model(dispatch="fused")
    name = data.draw(st.sampled_from(parts(model)))
    spoils = Spoils(model)
    model.get_submodule(name).register_forward_hook(lambda _m, _i, out: out * spoils.factor)
    update, kept, outcomes = steps(model, graphed)
    finite = [bool(outcome.grad_norm.isfinite()) for outcome in outcomes]
    assert finite[:BAD] == [True] * BAD
    assert not finite[BAD]
    for key, value in model.state_dict().items():
        assert torch.equal(value, kept[key]), key
    said = said_of(model, update)
    assert re.fullmatch(rf"first, the output of {re.escape(name)} is not finite in .* rows", said)


@pytest.mark.parametrize("graphed", [False, True])
def test_a_gradient_that_overflows_is_named(graphed: bool) -> None:
    model: Any = make_model(dispatch="fused")
    spoils = Spoils(model)

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
            ctx.save_for_backward(factor)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            return dy * ctx.saved_tensors[0], None

    model.transformer.h[2].mlp.register_forward_hook(
        lambda _m, _i, out: Overflow.apply(out, spoils.factor)
    )
    update, kept, _ = steps(model, graphed)
    assert torch.equal(model.transformer.wte.weight, kept["transformer.wte.weight"])
    said = said_of(model, update)
    assert re.match(
        r"outputs of modules are finite, the gradient of transformer\.h\.2\.mlp\.c_proj\.bias is "
        r"not finite in 24 of 24 values",
        said,
    ), said


def test_a_weight_is_named() -> None:
    model: Any = make_model()
    update, _, _ = steps(model, False)
    with torch.no_grad():
        model.transformer.h[3].mlp.experts.w2[2, 1, :3] = torch.nan
    assert said_of(model, update).startswith(
        "the weight transformer.h.3.mlp.experts.w2 is not finite in 3 of "
    )


def test_without_anything_to_name_it_says_so() -> None:
    model: Any = make_model()
    batch = batches()[0]
    accelerator = Accelerator(cpu=True)
    said = where_not_finite(accelerator, model, lambda: model(batch.input_ids[0]))
    assert said == "outputs of modules and gradients are finite when the step is taken again"


EXPLODES = [
    *("--learning-rate", "1e30", "--warmup-fraction", "0", "--max-grad-norm", "1e30"),
    *("--log-every", "3", "--eval-every", "6", "--save-every", "6"),
]


def test_the_command_says_it_in_its_line(
    tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(train.main, [*tiny_flags, *EXPLODES]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(
        r"error: train/\S+ is (nan|inf) at step \d+: (first, the output|the weight) (of )?"
        r"transformer\.\S+ is not finite in [\d,]+ of [\d,]+ (rows|values); start again", line
    ), line  # fmt: skip


def train_and_write(flags: list[str], folder: Path) -> None:
    """One of several processes; what it says is in a file of its own."""
    written = (folder / os.environ["RANK"]).open("w")
    with redirect_stderr(written):
        code = exit_code(train.main, flags)
    written.close()
    sys.exit(code)


@pytest.mark.slow
def test_sharded_processes_agree_on_it(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, *EXPLODES, "--fsdp-size", "2", "--ep-size", "2"]
    assert in_processes(2, train_and_write, flags, tmp_path) == [1, 1]
    lines = [(tmp_path / rank).read_text().splitlines()[-1] for rank in "01"]
    assert lines[0] == lines[1]
    assert re.match(r"error: train/.* is not finite in ", lines[0]), lines
