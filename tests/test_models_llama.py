"""Llama, Mistral, Qwen2 and Qwen3 upcycled: the dense model at the start, a mixture from there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_models import DENSE, SHAPE, ids, make_dense, make_mixture
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

from moe_emergence.config import RunConfig
from moe_emergence.models import start_routers_at_clusters, upcycle
from moe_emergence.models.export import to_transformers
from moe_emergence.models.families import FAMILIES
from moe_emergence.models.loading import load_trained_model
from moe_emergence.moe import RouterNoise, auxiliary_losses
from moe_emergence.run_folder import RunFolder, read_metrics
from moe_emergence.training.experiment import run_experiment
from moe_emergence.training.objective import NextTokenLoss
from moe_emergence.training.operators import use_fast_operators


@pytest.mark.parametrize("router", ["learned", "frozen", "hash"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("kind", DENSE)
def test_without_noise_the_logits_are_the_dense_models(kind: str, top_k: int, router: str) -> None:
    dense = make_dense(kind)
    model = upcycle(dense, [3, 1], 4, top_k, noise=0.0, router=router)
    assert list(model.moe_layers()) == [1, 3]
    with torch.no_grad():
        expected, found = dense(ids()).logits, model(ids())
    assert expected.std() > 0.3
    assert (found.logits - expected).abs().max() <= 1e-5
    assert [len(d.topk_experts) for d in found.router_decisions] == [ids().numel()] * 2
    tied = dense.lm_head.weight is dense.model.embed_tokens.weight
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("kind", DENSE)
def test_noise_is_that_of_each_dense_parameter(kind: str) -> None:
    dense = make_dense(kind)
    mlp = dense.model.layers[3].mlp
    experts = upcycle(dense, [3], 6, 1, noise=0.05).moe_layers()[3].experts
    gate, up = experts.w1.split(40, dim=2)
    for found, source in ((gate, mlp.gate_proj), (up, mlp.up_proj), (experts.w2, mlp.down_proj)):
        moved = (found - source.weight.t()).detach().flatten(1)
        assert moved.std(dim=1) / source.weight.detach().std() == pytest.approx(
            torch.full((6,), 0.05), rel=0.2
        )
        assert torch.corrcoef(moved).fill_diagonal_(0).abs().max() < 0.25


@pytest.mark.parametrize("router", ["learned", "hash"])
@pytest.mark.parametrize("kind", DENSE)
def test_saved_and_loaded_it_is_the_same(kind: str, router: str, tmp_path: Path) -> None:
    model = make_mixture(kind, router=router)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.moe_layers == [1, 3]
    assert torch.equal(model(ids()).logits, loaded(ids()).logits)


@pytest.mark.parametrize("router", ["learned", "hash"])
@pytest.mark.parametrize("kind", DENSE)
def test_it_generates_with_its_cache_as_without(kind: str, router: str) -> None:
    model = make_mixture(kind, router=router)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids(2, 8), **options)
    assert torch.equal(with_cache, model.generate(ids(2, 8), use_cache=False, **options))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", DENSE)
def test_losses_add_up_and_every_gradient_is_there(kind: str, top_k: int) -> None:
    model = make_mixture(kind, top_k).train()
    out = model(ids(6), labels=ids(6), router_noise=RouterNoise(0.5, 0, 0))
    lb_loss, z_loss = auxiliary_losses(out.router_decisions)
    expected = out.lm_loss + model.config.lb_coef * lb_loss + model.config.z_coef * z_loss
    assert out.loss.item() == pytest.approx(expected.item())
    flat = out.logits[:, :-1].flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(flat, ids(6)[:, 1:].flatten())
    assert out.lm_loss.item() == pytest.approx(plain.item())
    out.lm_loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["llama", "qwen2-window"])
def test_noise_differs_between_layers_and_acts_in_training_only(kind: str) -> None:
    model = make_mixture(kind)
    noise = RouterNoise(1.0, 0, 0)
    plain = model(ids()).router_decisions
    assert all(
        torch.equal(a.topk_experts, b.topk_experts)
        for a, b in zip(plain, model(ids(), router_noise=noise).router_decisions, strict=True)
    )
    deviates = [
        (d.noisy_probs.log() - d.router_probs.log()).detach()
        for d in model.train()(ids(), router_noise=noise).router_decisions
    ]
    deviates = [d - d.mean(dim=1, keepdim=True) for d in deviates]
    assert deviates[0].std() > 0.5
    correlation = torch.corrcoef(torch.stack([d.flatten() for d in deviates]))[0, 1]
    assert correlation.abs() < 0.3


@pytest.mark.parametrize("kind", DENSE)
def test_dispatchers_and_checkpointing_change_no_gradient(kind: str) -> None:
    def gradients(model: Any) -> dict[str, Tensor]:
        model.train().zero_grad()
        model(ids(), labels=ids()).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    model = make_mixture(kind, 2)
    model.set_dispatch("sequential")
    expected = gradients(model)
    model.set_dispatch("grouped")
    grouped = gradients(model)
    model.activation_checkpointing_enable()
    recomputed = gradients(model)
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert (grouped[name] - gradient).abs().max() <= 1e-5 * scale + 1e-7, name
        assert (recomputed[name] - grouped[name]).abs().max() <= 1e-6 * scale + 1e-8, name


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", DENSE)
def test_the_trained_loss_is_the_models_own(kind: str, precision: str) -> None:
    """Without masks where there is no window, with fast operators, and 16-bit attention."""
    model = make_mixture(kind)
    with torch.no_grad():
        expected = model(ids(4, 20), labels=ids(4, 20)).lm_loss
        use_fast_operators(model, torch.device("cpu"), precision)
        losses, decisions = NextTokenLoss(model)(ids(4, 20))
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(decisions) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2-window"])
def test_the_trainer_upcycles_trains_and_resumes_it(
    kind: str, tiny_config: RunConfig, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    make_dense(kind, vocab_size=300).save_pretrained(base)
    config = replace(
        tiny_config, model=replace(tiny_config.model, base=str(base), moe_layers=(1, 3)),
        optim=replace(tiny_config.optim, pretrain_steps=0, learning_rate=1e-2),
    )  # fmt: skip
    assert run_experiment(replace(config, stop_after=3)).status == "interrupted"
    assert run_experiment(replace(config, resume="auto")).status == "completed"
    whole = replace(config, run_name="whole")
    run_experiment(whole)
    runs = [RunFolder(Path(config.output_dir) / name) for name in ("tiny", "whole")]
    models = [load_trained_model(run.final_model).state_dict() for run in runs]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    rows = [row for row in read_metrics(runs[0].metrics) if "eval/lm_loss" in row]
    assert rows[-1]["eval/lm_loss"] < rows[0]["eval/lm_loss"]
    assert "eval/layer_3_churn" in rows[-1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_in_no_loss(side: str) -> None:
    model = make_mixture("llama")
    padded = torch.zeros(3, 18, dtype=torch.long)
    kept = slice(4, None) if side == "left" else slice(None, 14)
    padded[:, kept] = ids()
    mask = torch.zeros_like(padded)
    mask[:, kept] = 1
    labels = torch.where(mask.bool(), padded, -100)
    labels[:, kept.start or 0] = -100  # it would be predicted from padding
    with torch.no_grad():
        alone = model(ids(), labels=ids())
        beside = model(padded, attention_mask=mask, labels=labels)
    assert beside.lm_loss.item() == pytest.approx(alone.lm_loss.item(), rel=1e-5)
    assert beside.lb_loss.item() == pytest.approx(alone.lb_loss.item(), rel=1e-5)


def test_hidden_states_are_recorded_beside_the_decisions() -> None:
    dense = make_dense("qwen3")
    model = upcycle(dense, [1, 3], 4, 1, noise=0.0)
    out = model(ids(), output_hidden_states=True, output_attentions=False)
    expected = dense(ids(), output_hidden_states=True).hidden_states
    assert len(out.hidden_states) == len(expected) == 5
    for a, b in zip(out.hidden_states, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    none = upcycle(dense, [], 4, 1)
    assert none(ids(), labels=ids()).router_decisions == ()


def test_the_stock_trainer_trains_it(tmp_path: Path) -> None:
    model = make_mixture("llama")
    rows = [{"input_ids": row, "labels": row} for row in ids(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.2


def test_routers_start_at_clusters_of_any_family() -> None:
    model = upcycle(make_dense("mistral-window"), [1, 3], 4, 1)
    start_routers_at_clusters(model, [ids(8, seed=n) for n in range(6)])
    for decision in model(ids(8, seed=9)).router_decisions:
        load = decision.expert_counts() / decision.topk_experts.numel()
        assert load.max() < 0.6


def test_what_has_no_swiglu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--base: .* MLP without biases and with silu or swish"):
        upcycle(make_dense("llama", mlp_bias=True), [1])
    with pytest.raises(ValueError, match=r"--base: .* not relu"):
        upcycle(make_dense("qwen3", hidden_act="relu"), [1])
    for family in FAMILIES.values():
        if family.name != "GPT-2":
            with pytest.raises(ValueError, match="hidden_act 'gelu'"):
                family.config(**SHAPE, moe_layers=[1], hidden_act="gelu")


@pytest.mark.parametrize("router", ["learned", "frozen"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen3"])
def test_exported_it_is_a_stock_model_with_the_same_logits(
    kind: str, top_k: int, router: str, tmp_path: Path
) -> None:
    model = make_mixture(kind, top_k, router=router)
    stock = to_transformers(model)
    assert stock.config.model_type == ("qwen3_moe" if kind == "qwen3" else "mixtral")
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(stock)
    assert type(loaded).__module__.startswith("transformers.")
    with torch.no_grad():
        assert (loaded(ids()).logits - model(ids()).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("qwen2-window", {}, "only mixtures of Llama, Mistral and Qwen3"),
        ("llama-untied", {}, "attention_bias"),
        ("llama", {"router": "hash"}, "a hash router"),
        ("llama", {"use_expert_bias": True}, "use_expert_bias"),
        ("qwen3", {"top1_weight": "probability"}, "top1_weight probability"),
    ],
)
def test_what_transformers_has_no_name_for_is_not_exported(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        to_transformers(make_mixture(kind, **options))
