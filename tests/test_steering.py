"""Muted experts are never chosen, boosted ones more often, and the rest is the router's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from routing_models import tiny_mixture
from small_models import ids, make_dense, make_model

from moe_emergence.analysis.routers import RouterReader
from moe_emergence.analysis.steering import BOOST, steered
from moe_emergence.data.tokenizer import train_bpe
from moe_emergence.generate import main

IDS = ids(4, 20)


def routed(model: Any, mute: tuple[str, ...] = (), boost: tuple[str, ...] = ()) -> Any:
    with torch.no_grad(), steered(model, mute, boost):
        return model(IDS)


def layer_one(output: Any) -> Any:
    return output.router_decisions[0]


@pytest.mark.parametrize("options", [{}, {"use_expert_bias": True}], ids=["", "expert-bias"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_muted_experts_tokens_go_to_the_next_best(top_k: int, options: dict[str, Any]) -> None:
    model = make_model(top_k, **options)
    if options:
        bias = torch.tensor([0.0, 0.9, 0.1, 0.0])
        model.moe_layers()[1].router.expert_bias.copy_(bias)
    whole = layer_one(routed(model))
    found = layer_one(routed(model, mute=("1:1",)))
    assert (whole.topk_experts == 1).any()
    # the experts that are left, by their logits (or probability and bias), written out
    kept = torch.tensor([0, 2, 3])
    logits = whole.router_logits[:, kept]
    order = logits.softmax(1) + bias[kept] if options else logits
    chosen = kept[order.topk(top_k, dim=1).indices]
    assert torch.equal(found.topk_experts.sort(1).values, chosen.sort(1).values)
    assert not (found.topk_experts == 1).any()
    if top_k == 2:
        own = logits.softmax(1).gather(1, order.topk(2, dim=1).indices)
        expected = (own / own.sum(1, keepdim=True)).gather(1, chosen.argsort(1))
        by_expert = found.topk_weights.gather(1, found.topk_experts.argsort(1))
        torch.testing.assert_close(by_expert, expected)


@pytest.mark.parametrize(("entry", "bias"), [("1:2", BOOST), ("1:2=1.5", 1.5), ("1:2=-2", -2.0)])
def test_a_boost_is_added_to_the_logit(entry: str, bias: float) -> None:
    model = make_model(2)
    whole, found = layer_one(routed(model)), layer_one(routed(model, boost=(entry,)))
    logits = whole.router_logits + bias * torch.tensor([0.0, 0.0, 1.0, 0.0])
    values, experts = logits.softmax(1).topk(2, dim=1)
    assert torch.equal(found.topk_experts, experts)
    torch.testing.assert_close(found.topk_weights, values / values.sum(1, keepdim=True))
    before, after = (int((d.topk_experts == 2).sum()) for d in (whole, found))
    assert after > before if bias > 0 else after < before


def test_only_the_layers_named_are_steered_and_only_within_the_block() -> None:
    model = make_model(2)
    before = routed(model)
    with steered(model, ("3:0", "3:1"), ("3:2=3",)):
        within = model(IDS)
    assert torch.equal(layer_one(within).topk_experts, layer_one(before).topk_experts)
    assert set(within.router_decisions[1].topk_experts.flatten().tolist()) == {2, 3}
    after = routed(model)
    assert torch.equal(after.logits, before.logits)
    assert not torch.equal(within.logits, before.logits)
    # analyses read what is steered where their hooks come later
    reader = RouterReader(model)
    with steered(model, ("3:0", "3:1"), ()), reader.reading():
        assert set(reader.read(IDS)[1].experts_TK.flatten().tolist()) == {2, 3}


@pytest.mark.parametrize(
    ("mute", "boost", "message"),
    [
        (("1",), (), r"--mute 1: give LAYER:EXPERT, such as 2:0$"),
        (("1:0=2",), (), r"--mute 1:0=2: give LAYER:EXPERT; a muted expert has no bias"),
        (("0:0",), (), r"--mute 0:0: the model has mixtures in layers 1, 3"),
        ((), ("1:4",), r"--boost 1:4: layer 1 has experts 0 to 3"),
        ((), ("1:2=x",), r"--boost 1:2=x: give LAYER:EXPERT, such as 2:0 or 2:0=1\.5"),
        (("1:0",), ("1:0",), r"--boost 1:0: it is muted"),
        (("1:0", "1:1", "1:2"), (), r"--mute 1:0 1:1 1:2: 1 experts would be left in layer 1"),
    ],
)
def test_what_cannot_be_steered_is_refused_by_name(
    mute: tuple[str, ...], boost: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        routed(make_model(2), mute, boost)


def test_other_routers_and_dense_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--mute 1:0: layer 1 has a HashRouter; .* no hash"):
        routed(make_model(1, router="hash"), ("1:0",))
    with pytest.raises(ValueError, match=r"--boost 0:0: layer 0 has a MixtralTopKRouter"):
        routed(tiny_mixture("mixtral"), (), ("0:0",))
    with pytest.raises(ValueError, match=r"--mute 1:0: GPT2LMHeadModel has no routers"):
        routed(make_dense(), ("1:0",))


def test_the_command_shows_the_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_mixture("learned")
    model.save_pretrained(tmp_path)
    train_bpe(["def mean values"], 280).save_pretrained(tmp_path)
    flags = ["--checkpoint", str(tmp_path), "--prompt", "def mean", "--max-new-tokens", "12"]
    flags += ["--show-routing"]

    def loads(*steering: str) -> list[str]:
        assert main([*flags, *steering]) == 0
        layer = capsys.readouterr().out.split("layer 1")[1].splitlines()[0]
        return [word for word in layer.split() if word.endswith("%")]

    most = max(range(4), key=lambda expert: int(loads()[expert][:-1]))
    assert loads("--mute", f"1:{most}", "2:0")[most] == "0%"
    other = (most + 1) % 4
    assert loads("--boost", f"1:{other}=100", "2:1")[other] == "100%"
