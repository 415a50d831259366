"""The model in other people's training loops: accumulation, masks, balancing bias, upcycling."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from moe_emergence.models import MoEGPT2LMHeadModel, upcycle
from moe_emergence.moe import RouterNoise
from moe_emergence.moe.noise import gaussian_noise
from moe_emergence.moe.routing import TopKRouter


def dense(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def mixture(**options: Any) -> MoEGPT2LMHeadModel:
    return upcycle(dense(), [1, 2], 4, options.pop("top_k", 1), noise=0.5, **options).train()


def padded(*lengths: int) -> dict[str, Tensor]:
    """Rows of random tokens, padded to the longest."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 97, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)
    }  # fmt: skip


def test_accumulated_micro_batches_of_unequal_lengths_are_the_whole_batch() -> None:
    """As the stock Trainer does it: every micro-batch is told how many labels all of them have."""
    model = mixture(lb_coef=0.3, z_coef=0.1, variance_coef=0.7)
    batch = padded(40, 3, 4, 5)
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    counts = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
    outputs = [model(**row, num_items_in_batch=sum(counts)) for row in rows]
    total = sum(output.loss for output in outputs)
    whole = model(**batch)
    torch.testing.assert_close(sum(output.lm_loss for output in outputs), whole.lm_loss)
    alone = [
        0.3 * output.lb_loss + 0.1 * output.z_loss - 0.7 * output.routing_variance
        for output in outputs
    ]
    auxiliary = sum(a * c for a, c in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(total, whole.lm_loss + auxiliary)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(whole.lm_loss + auxiliary, parameters, retain_graph=True)
    found = torch.autograd.grad(total, parameters)
    for ours, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)


def test_a_batch_without_labels_loses_nothing_and_trains_the_router_only() -> None:
    model, batch = mixture(lb_coef=0.3), padded(9, 7)
    output = model(**batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert output.lm_loss == 0
    torch.testing.assert_close(output.loss, 0.3 * output.lb_loss + 0.001 * output.z_loss)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("aux", [0.0, 0.5])
def test_the_stock_trainer_takes_the_same_step_however_the_batch_is_split(
    aux: float, tmp_path: Any
) -> None:
    """Rows of one length: then the auxiliary losses' means are those of the whole as well."""
    batch = padded(9, 9, 9, 9) if aux else padded(40, 3, 4, 5)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    updates = []
    for size, steps in ((4, 1), (1, 4)):
        model = mixture(lb_coef=0.0, z_coef=aux)
        before = [p.detach().clone() for p in model.parameters()]
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=1, learning_rate=1e-2, optim="sgd", max_grad_norm=0.0, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        moved = [p - b for p, b in zip(model.parameters(), before, strict=True)]
        updates.append(torch.cat([m.flatten() for m in moved]))
    assert (updates[0] - updates[1]).norm() < 1e-3 * updates[0].norm()


def test_label_smoothing_is_of_the_next_token_and_says_what_it_leaves_out(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = mixture(), padded(9, 9)
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True
    )
    trainer = Trainer(model, arguments)
    with caplog.at_level(logging.WARNING):
        found = trainer.compute_loss(model, dict(batch), num_items_in_batch=16)
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(found, expected)
    assert "balance and z loss are not in the loss" in caplog.text


@pytest.mark.parametrize("kind", ["bool", "added"])
def test_padding_given_as_a_mask_of_queries_and_keys_counts_alike(kind: str) -> None:
    model, batch = mixture(), padded(8, 5)
    expected = model(**batch)
    keys = batch["attention_mask"].bool()[:, None, None, :]
    mask = torch.ones(8, 8).tril().bool()[None, None] & keys
    if kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    found = model(**batch | {"attention_mask": mask})
    for name in ("lb_loss", "z_loss", "lm_loss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_the_balancing_bias_is_in_fp32_whatever_the_model_is_in(
    cast: torch.dtype, tmp_path: Any
) -> None:
    model = mixture(use_expert_bias=True)
    values = 0.35 + 0.0004 * torch.arange(4)
    for layer in model.moe_layers().values():
        layer.router.expert_bias.copy_(values)
    model.save_pretrained(tmp_path)
    loaded = MoEGPT2LMHeadModel.from_pretrained(tmp_path, dtype=cast)
    for one in (copy.deepcopy(model).to(cast), loaded):
        router = one.moe_layers()[1].router
        assert (router.weight.dtype, router.expert_bias.dtype) == (cast, torch.float32)
        assert torch.equal(router.expert_bias, values)
        router.expert_bias.fill_(0.5)
        for _ in range(100):
            router.update_expert_bias(torch.tensor([9.0, 1.0, 1.0, 1.0]), 1e-3)
        expected = torch.tensor([0.4, 0.6, 0.6, 0.6])
        torch.testing.assert_close(router.expert_bias, expected, rtol=0, atol=1e-5)
    assert model.to("meta").moe_layers()[1].router.expert_bias.device.type == "meta"


def test_the_router_moves_its_bias_by_the_assignments_of_the_pass_before() -> None:
    torch.manual_seed(0)
    router = TopKRouter(16, 4, 2, use_expert_bias=True, expert_bias_rate=0.01)
    other = copy.deepcopy(router)
    other.expert_bias_rate = 0.0
    for step in range(8):
        x = torch.randn(32, 16)
        if step:
            other.update_expert_bias(counts, 0.01)  # noqa: F821 - of the pass before
        counts = router(x).expert_counts()
        assert torch.equal(router.expert_bias, other.expert_bias)
        assert torch.equal(counts, other(x).expert_counts())
        for quiet in (router.eval(), router.train()):
            with torch.no_grad():
                quiet(torch.randn(5, 16))
    assert router.expert_bias.abs().sum() > 0


def test_activations_computed_again_route_as_before() -> None:
    biases, gradients = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = mixture(use_expert_bias=True, expert_bias_rate=0.05)
        if recompute:
            model.activation_checkpointing_enable()
        for _ in range(4):
            model.zero_grad()
            model(**padded(9, 7)).loss.backward()
        biases.append(model.moe_layers()[1].router.expert_bias.clone())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert biases[0].abs().sum() > 0
    assert torch.equal(*biases)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    router = TopKRouter(16, 4, 2, use_expert_bias=True, expert_bias_rate=0.5)
    x = torch.randn(32, 16, requires_grad=True)
    for _ in range(2):
        checkpoint(lambda t: router(t).topk_weights, x, use_reentrant=False).sum().backward()
    assert router.expert_bias.abs().max() == 0.5


def test_large_seeds_are_other_seeds() -> None:
    cpu = torch.device("cpu")
    draws = [gaussian_noise(RouterNoise(1.0, s, 2), 9, 4, cpu) for s in (0, 2**32, 2**33, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_upcycling_carries_over_what_is_frozen_and_recomputed() -> None:
    base = dense()
    frozen = ("transformer.wpe.weight", "transformer.h.1.mlp.c_fc.weight",
              "transformer.h.0.ln_1.bias")  # fmt: skip
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name not in frozen)
    base.activation_checkpointing_enable()
    model = upcycle(base, [1], 4)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        "transformer.wpe.weight", "transformer.h.1.mlp.experts.w1", "transformer.h.0.ln_1.bias"
    }  # fmt: skip
    assert model.transformer.gradient_checkpointing
    assert not upcycle(dense(), [1], 4).transformer.gradient_checkpointing


def test_upcycling_refuses_what_is_no_plain_gpt2() -> None:
    biased = dense()
    biased.lm_head = torch.nn.Linear(32, 97)
    with pytest.raises(ValueError, match=r"--base: .*lm_head.bias.* take off what was added"):
        upcycle(biased, [1], 4)
    peft = pytest.importorskip("peft", reason="adapters are made by peft, which is not installed")
    for target in ("c_fc", "c_attn"):
        base = dense()
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=2, target_modules=[target], fan_in_fan_out=True), base
        )
        with pytest.raises(ValueError, match=r"--base: .*merge_and_unload"):
            upcycle(base, [1], 4)
