"""What acts on the calls of modules acts on the experts: offloading, hooks, pruning, wrappers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from moe_emergence.models import MoEGPT2LMHeadModel, upcycle
from moe_emergence.moe import MoELayer
from moe_emergence.moe.sequential import SequentialDispatcher

PATHS = ("sequential", "grouped", "fused")


def make(path: str = "fused") -> MoEGPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=32, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = upcycle(GPT2LMHeadModel(config), [1, 2], 4, 2, noise=0.5)
    model.set_dispatch(path)
    return model.eval()


def ids() -> Tensor:
    return torch.randint(1, 97, (3, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module) -> Tensor:
    return model(input_ids=ids(), labels=ids()).loss


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("place", ["cpu", "disk", "map"])
def test_an_offloaded_model_computes_the_same(place: str, path: str, tmp_path: Path) -> None:
    model = make(path)
    expected = model(ids()).logits
    if place == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif place == "disk":
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    else:
        model.save_pretrained(tmp_path / "model")
        size = sum(4 * p.numel() for p in model.parameters())
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map="auto", max_memory={"cpu": int(0.7 * size)},
            offload_folder=str(tmp_path / "away"),
        ).eval()  # fmt: skip
        model.set_dispatch(path)
        assert "disk" in model.hf_device_map.values()
    torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_hooks_of_the_experts_fire_and_may_change_the_output(path: str) -> None:
    layer = MoELayer(16, 32, 4, 2, dispatch=path)
    x, fired = torch.randn(5, 16), []
    layer.experts.register_forward_hook(lambda *_: fired.append("forward"))
    layer.experts.register_full_backward_hook(lambda *_: fired.append("backward"))
    expected = layer(x.requires_grad_())[0]
    expected.sum().backward()
    assert fired == ["forward", "backward"]
    layer.experts.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(layer(x)[0], 2 * expected)


@pytest.mark.parametrize("path", PATHS)
def test_a_mask_that_is_changed_acts_at_once(path: str) -> None:
    layer = MoELayer(16, 32, 4, 2, dispatch=path)
    prune.custom_from_mask(layer.experts, "w2", torch.ones(4, 32, 16))
    x = torch.randn(5, 16)
    assert layer(x)[0].abs().max() > 0
    with torch.no_grad():
        layer.experts.w2_mask.zero_()
    assert (layer(x)[0] == 0).all()


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "checkpoint": checkpoint_wrapper,
    "compile": lambda module: torch.compile(module, backend="eager"),
    "sequential": lambda module: _Wrapped(module),
}


class _Wrapped(nn.Module):
    """As an adapter's library puts a module into one of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.inner(*inputs, **named)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_block_whose_mlp_is_wrapped_is_the_same(wrap: Callable[[nn.Module], Any]) -> None:
    model = make()
    expected = loss_of(model)
    for block in model.transformer.h:
        block.mlp = wrap(block.mlp)
    found = loss_of(model)
    torch.testing.assert_close(found, expected)
    found.backward()
    layers = model.moe_layers()
    assert list(layers) == [1, 2]
    assert all(layer.experts.w1.grad is not None for layer in layers.values())
    model.set_dispatch("sequential")
    assert all(isinstance(m.experts.dispatcher, SequentialDispatcher) for m in layers.values())


@pytest.mark.parametrize("path", PATHS)
def test_experts_that_are_sharded_by_themselves(path: str) -> None:
    layer = MoELayer(16, 32, 4, 2, dispatch=path)
    x = torch.randn(6, 16)
    expected = layer(x)[0].detach()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        fully_shard(layer.experts, mesh=init_device_mesh("cpu", (1,)))
        found = layer(x)[0]
        found.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, expected)
    assert layer.experts.w1.grad is not None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["w1", "w2", "w1_bias"])
def test_low_rank_adapters_of_the_experts(name: str, path: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters are made by peft, which is not installed")
    model = make(path)
    before = model(ids()).logits.detach()
    config = peft.LoraConfig(
        r=4, target_parameters=[f"mlp.experts.{name}"], target_modules=[], task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(input_ids=ids()).logits, before)
    loss_of(adapted).backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora" in n for n in trained)
    assert any(p.grad.abs().sum() > 0 for n, p in trained.items() if "lora_B" in n)
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.3)
    moved = adapted(input_ids=ids()).logits.detach()
    assert (moved - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(path), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids()).logits, moved)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids()).logits, moved, rtol=1e-4, atol=1e-5)


def test_outputs_can_be_taken_apart_and_exported() -> None:
    model = make()
    leaves, spec = torch.utils._pytree.tree_flatten(model(ids(), labels=ids(), use_cache=False))
    assert all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    decision = again.router_decisions[0]
    assert torch.equal(decision.expert_counts(), decision.sums.expert_counts_E)
    program = torch.export.export(model, (ids(),), kwargs={"use_cache": False}, strict=False)
    found = program.module()(ids(), use_cache=False).logits
    torch.testing.assert_close(found, model(ids()).logits, rtol=1e-5, atol=1e-6)
