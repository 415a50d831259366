"""The mixture as a Hugging Face model: outputs, losses, saving, generation, the stock Trainer."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SIZE, VOCAB, ids, make_dense, make_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

from moe_emergence.models import MoECausalLMOutput, MoEGPT2Config, MoEGPT2LMHeadModel, upcycle
from moe_emergence.moe import RouterNoise, auxiliary_losses, routing_variance

NOISE = RouterNoise(std=0.5, seed=1, step=4)


def same_parameters(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first
    )


# outputs and losses -----------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["learned", "frozen", "hash"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_no_token_sees_a_later_one(router: str, top_k: int) -> None:
    model = make_model(top_k, router=router).double()
    first = ids()
    second = first.clone()
    second[:, 7] = (second[:, 7] + 1) % VOCAB
    before, after = model(input_ids=first).logits, model(input_ids=second).logits
    # not bit for bit: other tokens make other groups, and products of other shapes
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-10, atol=1e-12)
    assert (before[:, 7:] != after[:, 7:]).any(dim=-1).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_loss_is_the_sum_of_its_named_parts(top_k) -> None:
    model = make_model(top_k, lb_coef=0.7, z_coef=0.3)
    output = model(ids(), labels=ids())
    assert isinstance(output, MoECausalLMOutput)
    assert len(output.router_decisions) == 2
    for decision in output.router_decisions:
        assert decision.topk_experts.shape == (36, top_k)
    balance, z = auxiliary_losses(output.router_decisions)
    assert torch.equal(output.lb_loss, balance)
    assert torch.equal(output.z_loss, z)
    torch.testing.assert_close(output.loss, output.lm_loss + 0.7 * balance + 0.3 * z)
    assert output.routing_variance is None
    model.config.variance_coef = 0.9
    told_apart = model(ids(), labels=ids())
    variance = routing_variance(output.router_decisions)
    assert torch.equal(told_apart.routing_variance, variance)
    torch.testing.assert_close(told_apart.loss, output.loss - 0.9 * variance)
    flat = output.logits[:, :-1].reshape(-1, VOCAB)
    expected = torch.nn.functional.cross_entropy(flat, ids()[:, 1:].reshape(-1))
    torch.testing.assert_close(output.lm_loss, expected)


def test_lm_loss_is_the_dense_models_loss_before_training() -> None:
    dense = make_dense()
    model = upcycle(dense, [1, 2], 4, 1, noise=0.0)
    labels = ids()
    labels[0, :5] = -100
    mask = torch.ones_like(labels)
    mask[1, 8:] = 0
    expected = dense(ids(), attention_mask=mask, labels=labels).loss
    found = model(ids(), attention_mask=mask, labels=labels)
    torch.testing.assert_close(found.lm_loss, expected, rtol=1e-5, atol=0)
    assert found.loss > found.lm_loss


def test_without_labels_there_are_logits_and_decisions_but_no_losses() -> None:
    output = make_model()(ids())
    assert output.loss is None
    assert output.lm_loss is output.lb_loss is output.z_loss is None
    assert len(output.router_decisions) == 2


def test_without_mixture_layers_the_loss_is_the_lm_loss() -> None:
    output = upcycle(make_dense(), [], 4, 1)(ids(), labels=ids())
    assert torch.equal(output.loss, output.lm_loss)
    assert output.lb_loss is None
    assert output.router_decisions == ()


def test_a_tuple_on_request() -> None:
    model = make_model().eval()
    output, parts = model(ids(), labels=ids()), model(ids(), labels=ids(), return_dict=False)
    assert isinstance(parts, tuple)
    assert torch.equal(parts[0], output.loss)
    assert torch.equal(parts[1], output.logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_in_no_loss(side) -> None:
    """transformers 28505: each auxiliary loss is that of the real tokens alone."""
    model = make_model().eval()
    tokens, mask = ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    if side == "left":
        mask[0, :4] = 0
    else:
        mask[0, 6:] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[mask.cumsum(-1) == 1] = -100  # else padding predicts the first token, as in GPT-2
    padded = model(tokens, attention_mask=mask, position_ids=position_ids, labels=labels)
    short = tokens[0, 4:] if side == "left" else tokens[0, :6]
    alone = [model(short[None]), model(tokens[1:])]
    for name, function in (("lb_loss", 0), ("z_loss", 1)):
        joined = []
        for layer in range(2):
            parts = [output.router_decisions[layer] for output in alone]
            fields = {
                f: torch.cat([getattr(p, f) for p in parts])
                for f in ("router_logits", "router_probs", "noisy_probs", "topk_experts")
            }
            weights = torch.cat([p.topk_weights for p in parts])
            joined.append(type(parts[0])(**fields, topk_weights=weights))
        expected = auxiliary_losses(joined)[function]
        torch.testing.assert_close(getattr(padded, name), expected, rtol=1e-5, atol=0)
    other = tokens.clone()
    other[mask == 0] = 1 + other[mask == 0] % (VOCAB - 1)
    again = model(other, attention_mask=mask, position_ids=position_ids, labels=labels)
    torch.testing.assert_close(again.loss, padded.loss)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_and_attentions_are_those_of_gpt_2(attention) -> None:
    dense = make_dense()
    model = upcycle(dense, [1, 3], 4, 2, noise=0.0)
    for each in (dense, model):
        each.set_attn_implementation(attention)
    wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    found, expected = model(ids(), **wanted), dense(ids(), **wanted)
    assert len(found.hidden_states) == len(expected.hidden_states) == 5
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if attention == "eager":
        assert len(found.attentions) == 4
        for a, b in zip(found.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_inputs_embeds_take_the_place_of_input_ids() -> None:
    model = make_model().eval()
    embedded = model.get_input_embeddings()(ids())
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids()).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids(), inputs_embeds=embedded)
    hashed = make_model(router="hash").eval()
    with pytest.raises(ValueError, match=r"hash router .*not inputs_embeds"):
        hashed(inputs_embeds=embedded)


def test_logits_to_keep() -> None:
    model = make_model().eval()
    logits = model(ids()).logits
    torch.testing.assert_close(model(ids(), logits_to_keep=2).logits, logits[:, -2:])
    kept = torch.tensor([1, 5])
    torch.testing.assert_close(model(ids(), logits_to_keep=kept).logits, logits[:, kept])


def test_noise_acts_in_training_only_and_differs_between_layers() -> None:
    model = make_model(top_k=1).eval()
    clean = model(ids()).logits
    assert torch.equal(model(ids(), router_noise=NOISE).logits, clean)
    model.train()
    assert torch.equal(model(ids()).logits, clean)
    noisy = model(ids(), router_noise=NOISE)
    assert not torch.equal(noisy.logits, clean)
    assert torch.equal(model(ids(), router_noise=NOISE).logits, noisy.logits)
    first, second = (
        (d.noisy_probs.log() - d.router_logits).log_softmax(-1).flatten()
        for d in noisy.router_decisions
    )
    # the same noise in both layers would make these equal up to normalisation
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.4


@pytest.mark.parametrize("top_k", [1, 2])
def test_dispatch_changes_the_path_not_the_results(top_k) -> None:
    model = make_model(top_k)
    results = []
    for name in ("sequential", "fused", "grouped", "auto"):
        model.set_dispatch(name)
        model.zero_grad()
        output = model(ids(), labels=ids())
        output.loss.backward()
        results.append((output, {k: p.grad.clone() for k, p in model.named_parameters()}))
        kinds = {type(layer.experts.dispatcher).__name__ for layer in model.moe_layers().values()}
        assert len(kinds) == 1
    assert kinds == {"AutoDispatcher"}
    for output, gradients in results[1:]:
        torch.testing.assert_close(output.logits, results[0][0].logits, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            expected = results[0][1][name]
            # fp32 through four layers, relative to the largest entry
            assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-9, name
    with pytest.raises(ValueError, match="dispatch quick"):
        model.set_dispatch("quick")


def gradients_of(model: MoEGPT2LMHeadModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(ids(), labels=ids(), router_noise=NOISE, use_cache=False)
    output.loss.backward()
    return {
        "loss": output.loss.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}], ids=["default", "explicit"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradient_checkpointing_changes_no_gradient(top_k, options) -> None:
    """Neither lost (NeMo Automodel 1408) nor counted twice (torchtitan 1593)."""
    model = make_model(top_k, lb_coef=1.0, z_coef=0.5).train()
    plain = gradients_of(model)
    model.activation_checkpointing_enable(options)
    recomputed = gradients_of(model)
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name


def test_reentrant_checkpointing_is_refused() -> None:
    """It runs the first forward without a graph: the auxiliary losses would lose their gradient."""
    with pytest.raises(ValueError, match="use_reentrant=True"):
        make_model(1).activation_checkpointing_enable({"use_reentrant": True})


def test_gradient_checkpointing_with_dropout_draws_the_same_masks() -> None:
    model = make_model(1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        model(ids(), labels=ids(), router_noise=NOISE, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_mixture_layers_have_the_residual_dropout_of_gpt_2() -> None:
    """With noise 0 and the same seed, training logits equal the dense model's bit for bit in
    their dropout masks."""
    dense = make_dense(resid_pdrop=0.3, embd_pdrop=0.1)
    model = upcycle(dense, [1, 3], 4, 1, noise=0.0)
    logits = []
    for each in (dense, model):
        torch.manual_seed(2)
        logits.append(each.train()(ids()).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


# configuration, saving, loading -----------------------------------------------------------------


def test_config_round_trip(tmp_path) -> None:
    config = MoEGPT2Config(
        **SIZE,
        moe_layers=(3, 1),
        num_experts=6,
        num_experts_per_tok=2,
        router="hash",
        use_expert_bias=False,
        lb_coef=0.5,
        z_coef=0.25,
    )
    assert config.moe_layers == [1, 3]
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "moe_gpt2"
    assert written["moe_layers"] == [1, 3]
    assert not any("dispatch" in key for key in written)
    for loaded in (
        AutoConfig.from_pretrained(tmp_path),
        MoEGPT2Config.from_pretrained(tmp_path),
        MoEGPT2Config.from_dict(config.to_dict()),
    ):
        assert type(loaded) is MoEGPT2Config
        ours, theirs = loaded.to_dict(), config.to_dict()
        for key in ("_name_or_path", "transformers_version"):
            ours.pop(key, None), theirs.pop(key, None)
        assert ours == theirs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_layers": [4]}, r"moe_layers \[4\]: .*0 to 3, not \[4\]"),
        ({"moe_layers": [-1]}, r"moe_layers \[-1\]"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, r"num_experts_per_tok 3: .*\(2\)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok 0"),
        ({"router": "hashed"}, "hashed"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_wrong_config_is_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        MoEGPT2Config(**SIZE, **changes)


@pytest.mark.parametrize("router", ["learned", "frozen", "hash"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "expert-bias"])
def test_save_and_load_is_bitwise(tmp_path, router, bias) -> None:
    model = make_model(router=router, use_expert_bias=bias and router != "hash").eval()
    for i, layer in model.moe_layers().items():
        if getattr(layer.router, "expert_bias", None) is not None:
            layer.router.expert_bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.05]) * i)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    expected = model(ids()).logits
    for loader in (MoEGPT2LMHeadModel, AutoModelForCausalLM):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is MoEGPT2LMHeadModel
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        assert not loaded.training
        assert same_parameters(loaded, model)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert torch.equal(loaded(ids()).logits, expected)


@pytest.mark.slow
def test_a_saved_model_loads_through_auto_in_a_fresh_process(tmp_path) -> None:
    """And what is optional is imported by neither; triton transformers imports by itself."""
    make_model().save_pretrained(tmp_path)
    program = (
        "import sys, moe_emergence.models\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model).__name__, *{'megablocks', 'wandb'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == "MoEGPT2LMHeadModel"


def test_a_frozen_router_stays_frozen_after_loading(tmp_path) -> None:
    model = make_model(router="frozen")
    model.save_pretrained(tmp_path)
    loaded = MoEGPT2LMHeadModel.from_pretrained(tmp_path).train()
    routers = [layer.router.weight for layer in loaded.moe_layers().values()]
    before = [router.detach().clone() for router in routers]
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        loaded(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(a, b) for a, b in zip(routers, before, strict=True))
    # and it says so: parameter counts, optimizer groups and DDP look at requires_grad
    assert not any(router.requires_grad for router in routers)


def test_a_bf16_load_computes_and_routes_in_fp32(tmp_path) -> None:
    model = make_model(use_expert_bias=True).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    output = loaded(ids(), labels=ids())
    assert output.logits.dtype == torch.bfloat16
    assert {d.router_logits.dtype for d in output.router_decisions} == {torch.float32}
    assert output.lb_loss.dtype == output.loss.dtype == torch.float32
    expected = model(ids(), labels=ids())
    assert abs(output.lm_loss - expected.lm_loss) < 0.05 * expected.lm_loss


@pytest.mark.parametrize("shards", ["5GB", "20KB"], ids=["one file", "shards"])
def test_biases_are_read_by_their_former_names(tmp_path: Path, shards: str) -> None:
    model = make_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    expected = model(ids()).logits
    model.save_pretrained(tmp_path / "new", max_shard_size=shards)
    former = 0
    for file in (tmp_path / "new").glob("*.safetensors"):
        tensors = load_file(file)
        assert not [name for name in tensors if name.endswith((".b1", ".b2"))]
        renamed = {re.sub(r"w(\d)_bias$", r"b\1", name): t for name, t in tensors.items()}
        former += sum(name.endswith((".b1", ".b2")) for name in renamed)
        save_file(renamed, file, {"format": "pt"})
    assert former == 4
    for index in (tmp_path / "new").glob("*.index.json"):
        index.write_text(re.sub(r"w(\d)_bias", r"b\1", index.read_text("utf-8")), "utf-8")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert torch.equal(found(ids()).logits, expected)
    # and what was read so is written and read again
    found.save_pretrained(tmp_path / "again")
    again, report = MoEGPT2LMHeadModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(again.eval()(ids()).logits, expected)


def test_new_weights_follow_gpt_2s_initialisation() -> None:
    torch.manual_seed(0)
    config = MoEGPT2Config(
        **{**SIZE, "n_embd": 64}, moe_layers=[1], num_experts=4, use_expert_bias=True
    )
    layer = MoEGPT2LMHeadModel(config).moe_layers()[1]
    assert layer.router.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert layer.experts.w1.std().item() == pytest.approx(0.02, rel=0.02)
    assert layer.experts.w2.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.02)
    for zero in (layer.experts.w1_bias, layer.experts.w2_bias, layer.router.expert_bias):
        assert not zero.any()


def test_resizing_the_vocabulary_keeps_the_tie() -> None:
    model = make_model()
    model.resize_token_embeddings(VOCAB + 8)
    assert model.config.vocab_size == VOCAB + 8
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model(ids(), labels=ids()).logits.shape[-1] == VOCAB + 8


# the cache --------------------------------------------------------------------------------------


def test_the_cache_can_be_fed_by_hand_with_losses() -> None:
    model = make_model().double().eval()
    tokens = ids(2, 10)
    mask = torch.ones_like(tokens)
    whole = model(tokens, attention_mask=mask)
    start = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True)
    rest = model(
        tokens[:, 6:],
        attention_mask=mask,
        cache=start.cache,
        labels=tokens[:, 6:],
    )
    torch.testing.assert_close(rest.logits, whole.logits[:, 6:], rtol=1e-10, atol=1e-12)
    assert rest.router_decisions[0].topk_experts.shape == (8, 2)
    torch.testing.assert_close(rest.lb_loss, auxiliary_losses(rest.router_decisions)[0])


# the stock Trainer ------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = ids(8, 12)[index]
        return {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}


def trainer_of(model, folder, **changes) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    rows = Rows()
    return Trainer(model, TrainingArguments(**settings), train_dataset=rows, eval_dataset=rows)


def test_the_stock_trainer_takes_the_step_one_would_take_by_hand(tmp_path, monkeypatch) -> None:
    model = make_model(lb_coef=0.5, z_coef=0.1)
    by_hand = copy.deepcopy(model).train()
    trainer = trainer_of(model, tmp_path)
    monkeypatch.setattr(
        trainer, "_get_train_sampler", lambda *_: torch.utils.data.SequentialSampler(Rows())
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1e-3)
    for step in range(2):
        total = 0.0
        for part in range(2):
            rows = ids(8, 12)[4 * step + 2 * part :][:2]
            loss = by_hand(rows, labels=rows).loss / 2
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        # the Trainer rounds what it logs to four decimals
        assert logged[step] == pytest.approx(total, abs=1e-4)
    for (name, found), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation_checkpointing": True}, {"bf16": True}],
    ids=["fp32", "gradient-checkpointing", "bf16"],
)
@pytest.mark.parametrize("router", ["learned", "frozen", "hash"])
def test_the_stock_trainer_trains_evaluates_and_predicts(tmp_path, changes, router) -> None:
    model = make_model(router=router)
    before = copy.deepcopy(model)
    trainer = trainer_of(model, tmp_path, optim="adamw_torch", **changes)
    trainer.train()
    changed = {
        name
        for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    expected = {name for name, _ in model.named_parameters()}
    if router == "frozen":
        expected -= {name for name in expected if ".router." in name}
    assert changed == expected
    metrics = trainer.evaluate()
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="bf16" in changes):
        parts = [model(ids(8, 12)[i : i + 4], labels=ids(8, 12)[i : i + 4]) for i in (0, 4)]
    expected_loss = sum(float(part.loss) for part in parts) / 2
    assert metrics["eval_loss"] == pytest.approx(expected_loss, rel=1e-3)
    predictions = trainer.predict(Rows()).predictions
    assert predictions.shape == (8, 12, VOCAB)
