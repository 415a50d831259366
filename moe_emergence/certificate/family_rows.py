"""Whether an implementation computes what transformers' own loop does, family by family.

The experts of a family alone are judged in every arithmetic, on given routing, as a layer of this
library is. A whole model is judged in fp32 and bf16 only: many round to fp32 inside, so that fp64
would compare those roundings. Tokens for which an arithmetic changes the routing are drawn again.

Letters: T tokens, H model width, E experts, K experts per token, B sequences, L tokens each.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_emergence.certificate.arithmetic import Arithmetic, get_arithmetic
from moe_emergence.certificate.cases import Case
from moe_emergence.certificate.certify import Row, Status, finding, one_thread
from moe_emergence.certificate.families import Family, recorded_routing
from moe_emergence.certificate.judge import Draw, judge
from moe_emergence.certificate.problem import FP64, Results

if TYPE_CHECKING:
    from moe_emergence.integrations.transformers import ExpertsFunction

_TOKENS, _TOP_K = 96, 2
_SEQUENCES, _LENGTH = 2, 16
_DRAWS = 6
_TRIES = 60
"""Draws of which every arithmetic must route `_DRAWS` alike."""
_GENERATED = 8
_OUR_NAMES = {"gate_up_proj": "w1", "up_proj": "w1", "down_proj": "w2"}
"""By which the judge knows that an expert without tokens gets a gradient of zero."""


def certify_family(
    name: str,
    family: Family,
    arithmetics: Sequence[Arithmetic],
    device: torch.device,
    seed: int = 0,
) -> list[Row]:
    """Rows of one family: its experts in every arithmetic, the whole model in fp32 and bf16.

    Args:
        name: of the implementation, see `ImplementationDispatcher`.
    """
    with one_thread(device):
        return list(_rows(name, family, arithmetics, device, seed))


def _rows(
    name: str,
    family: Family,
    arithmetics: Sequence[Arithmetic],
    device: torch.device,
    seed: int,
) -> Iterator[Row]:
    from moe_emergence.integrations.transformers import get_implementation

    registered, function = get_implementation(name)
    model = family.model(FP64, device, seed)
    experts = family.experts(FP64, device, seed)
    width = experts.down_proj.shape[1 if experts.is_transposed else 2]
    case = Case(
        f"{family.name} experts",
        family.about,
        _TOKENS,
        experts.down_proj.shape[2 if experts.is_transposed else 1],
        width,
        experts.num_experts,
        _TOP_K,
        "swiglu" if experts.has_gate else "gelu_tanh",
        routing="given",
    )

    def of_experts(arithmetic: Arithmetic) -> list[Draw]:
        return [_draw_experts(experts, function, arithmetic, seed + n) for n in range(_DRAWS)]

    def of_model(arithmetic: Arithmetic) -> list[Draw]:
        return _draw_models(model, registered, arithmetic, seed)

    for arithmetic in arithmetics:
        yield _row(name, case, arithmetic, of_experts)
        if family.whole and arithmetic.name in ("fp32", "bf16"):
            whole = Case(
                f"{family.name} model",
                "loss, logits, every gradient, generated tokens",
                _SEQUENCES * _LENGTH,
                *(case.hidden, case.width, case.experts, _TOP_K, case.activation),
            )
            yield _row(name, whole, arithmetic, of_model, whole.tokens * _TOP_K)


def _row(
    name: str,
    case: Case,
    arithmetic: Arithmetic,
    draw: Callable[[Arithmetic], list[Draw]],
    independent: int | None = None,
) -> Row:
    draws: list[Draw] = []
    tensors = []
    try:
        draws = draw(arithmetic)
        tensors = judge(draws, arithmetic, case, independent)
        note = "; ".join(f"{v.tensor}: {v.problem}" for v in tensors if v.problem is not None)
        status: Status = "failed" if note else "passed"
    except Exception as error:  # noqa: BLE001 a finding, not an accident
        status, note = finding(error)
    return Row(
        name, arithmetic.name, case.name, case.reason, asdict(case), status, note,
        draws=len(draws), tensors=tuple(tensors),
    )  # fmt: skip


def _draw_experts(
    experts: Any, function: "ExpertsFunction", arithmetic: Arithmetic, seed: int
) -> Draw:
    """The same numbers through the function, the family's loop, and the loop in fp64."""
    rng = torch.Generator().manual_seed(seed)
    device = experts.down_proj.device
    hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
    # the last expert has no tokens
    scores = torch.rand(_TOKENS, experts.num_experts - 1, generator=rng)
    chosen_TK = scores.argsort(dim=1)[:, :_TOP_K].to(device)
    weights_TK = (0.1 + torch.rand(_TOKENS, _TOP_K, generator=rng)).to(device)
    x_TH, dy_TH = (
        torch.randn(_TOKENS, hidden, generator=rng).to(device, arithmetic.stored) for _ in range(2)
    )
    fp64 = get_arithmetic("fp64", device)
    stored = copy.deepcopy(experts).to(arithmetic.stored)
    wide = torch.promote_types(arithmetic.stored, torch.float32)
    own = (stored, x_TH, chosen_TK, weights_TK.to(wide), dy_TH)
    found = _run_experts(function, *own, arithmetic)
    loop = _run_experts(_loop, *own, arithmetic)
    exact = _run_experts(
        _loop, copy.deepcopy(stored).double(), x_TH.double(), chosen_TK, weights_TK.double(),
        dy_TH.double(), fp64,
    )  # fmt: skip
    return Draw(found, loop, exact)


def _loop(experts: Any, x_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The family's own forward pass, which its configuration names "eager"."""
    assert experts.config._experts_implementation == "eager"
    y_TH: Tensor = experts(x_TH, chosen_TK, weights_TK)
    return y_TH


def _run_experts(
    function: "ExpertsFunction",
    experts: Any,
    x_TH: Tensor,
    chosen_TK: Tensor,
    weights_TK: Tensor,
    dy_TH: Tensor,
    arithmetic: Arithmetic,
) -> Results:
    leaves = {"x": x_TH.detach().requires_grad_()}
    leaves["routing weights"] = weights_TK.detach().requires_grad_()
    for name, parameter in experts.named_parameters():
        weight, bias = name.removesuffix("_bias"), "_bias" * name.endswith("_bias")
        leaves[_OUR_NAMES.get(weight, weight) + bias] = parameter
    with arithmetic.active(x_TH.device):
        y_TH = function(experts, leaves["x"], chosen_TK, leaves["routing weights"])
        gradients = torch.autograd.grad(
            y_TH, list(leaves.values()), dy_TH.to(y_TH.dtype), allow_unused=True
        )
    results: Results = {"y": y_TH.detach(), "experts": chosen_TK}
    return results | dict(zip(leaves, gradients, strict=True))


def _draw_models(model: Any, name: str, arithmetic: Arithmetic, seed: int) -> list[Draw]:
    """Draws in which no arithmetic changed the routing, so that they have one exact result."""
    low = copy.deepcopy(model).to(arithmetic.stored)
    exact_model = copy.deepcopy(low).double()
    rng = torch.Generator().manual_seed(seed)
    draws: list[Draw] = []
    others = 0
    for _ in range(_TRIES):
        ids_BL = torch.randint(3, model.config.vocab_size, (_SEQUENCES, _LENGTH), generator=rng)
        ids_BL = ids_BL.to(next(model.parameters()).device)
        exact, loop = (_run_model(m, "eager", ids_BL) for m in (exact_model, low))
        if not _chose_alike(exact, loop):
            continue
        found = _run_model(low, name, ids_BL)
        if _chose_alike(exact, found):
            draws.append(Draw(found, loop, exact))
            # in 16 bits two tokens may be equally likely
            if arithmetic.name == "fp32":
                generated = (_generate(low, path, ids_BL) for path in ("eager", name))
                assert torch.equal(*generated), "other tokens are generated"
        else:
            others += 1
        if len(draws) == _DRAWS:
            return draws
        assert others <= _DRAWS, f"{others} draws are routed otherwise, {len(draws)} alike"
    raise AssertionError(f"{len(draws)} of {_TRIES} draws were routed alike in every arithmetic")


def _chose_alike(one: Results, other: Results) -> bool:
    chosen = one["experts"], other["experts"]
    return all(isinstance(c, Tensor) for c in chosen) and torch.equal(*chosen)  # type: ignore[arg-type]


def _run_model(model: Any, name: str, ids_BL: Tensor) -> Results:
    """Loss, logits and every gradient, and the experts that were chosen."""
    model.set_experts_implementation(name)
    model.zero_grad(set_to_none=True)
    with recorded_routing(model) as routing:
        output = model(input_ids=ids_BL, labels=ids_BL, use_cache=False)
    output.loss.backward()
    # the order of a token's experts may differ, and only among the experts of a tie
    chosen = torch.cat([chosen_TK.sort(dim=1).values for chosen_TK in routing])
    results: Results = {"loss": output.loss.detach(), "logits": output.logits.detach()}
    results |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return results | {"experts": chosen}


@torch.no_grad()
def _generate(model: Any, name: str, ids_BL: Tensor) -> Tensor:
    model.set_experts_implementation(name)
    generated: Tensor = model.generate(ids_BL, max_new_tokens=_GENERATED, do_sample=False)
    return generated
