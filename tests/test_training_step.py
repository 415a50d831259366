"""One optimizer step: what it computes, and that it does not depend on how the batch is split."""

from dataclasses import replace
from itertools import pairwise
from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, get_cosine_schedule_with_warmup

from moe_emergence.config import OptimConfig, RunConfig
from moe_emergence.data.loader import StepBatch
from moe_emergence.models import MoEGPT2LMHeadModel, upcycle
from moe_emergence.models.loading import LanguageModel
from moe_emergence.moe import (
    RouterNoise,
    auxiliary_losses,
    load_balancing_loss,
    routing_variance,
)
from moe_emergence.training.evaluation import evaluate
from moe_emergence.training.objective import NextTokenLoss
from moe_emergence.training.schedules import Rates, build_optimizer, learning_rate, noise_std
from moe_emergence.training.step import StepStatistics, forward_backward
from moe_emergence.training.tuning import tokens_of_a_pass

ROWS, LENGTH, VOCABULARY = 8, 12, 50
OPTIM = OptimConfig(lb_coef=0.3, z_coef=0.1, variance_coef=0.7)


def dense_model(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).double()


def moe_model(top_k: int) -> MoEGPT2LMHeadModel:
    return upcycle(dense_model(), [0, 1], 4, top_k, noise=0.5).double().train()


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    return ids, torch.randint(0, 3, (ROWS,), generator=generator)


def step(
    model: LanguageModel, micro: int, scope: str = "global", optim: OptimConfig = OPTIM
) -> tuple[StepStatistics, dict[str, Tensor]]:
    ids, domains = rows()
    batch = StepBatch(
        ids.view(micro, -1, LENGTH), torch.eye(3).double()[domains].view(micro, -1, 3)
    )
    noise = RouterNoise(0.4, 3, 5) if isinstance(model, MoEGPT2LMHeadModel) else None
    model.zero_grad()
    sums = forward_backward(
        Accelerator(cpu=True),
        NextTokenLoss(model),
        batch,
        replace(optim, balance_scope=scope),
        noise,
    )
    return sums, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("micro", [2, 4, 8])
def test_global_balance_gives_the_same_for_any_split(top_k: int, micro: int) -> None:
    model = moe_model(top_k)
    whole, whole_grads = step(model, 1)
    split, split_grads = step(model, micro)
    for field in vars(whole):
        torch.testing.assert_close(
            getattr(split, field), getattr(whole, field), rtol=1e-9, atol=1e-12
        )
    assert whole_grads.keys() == split_grads.keys()
    for name, grad in whole_grads.items():
        torch.testing.assert_close(split_grads[name], grad, rtol=1e-9, atol=1e-12)


def test_micro_balance_depends_on_the_split_and_is_the_mean_of_micro_losses() -> None:
    model = moe_model(1)
    whole, _ = step(model, 1, "micro")
    split, _ = step(model, 4, "micro")
    assert abs(float(whole.lb_loss - split.lb_loss)) > 1e-6
    assert abs(float(whole.routing_variance - split.routing_variance)) > 1e-6
    torch.testing.assert_close(split.lm_loss, whole.lm_loss, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", ["global", "micro"])
def test_gradient_is_that_of_lm_plus_weighted_auxiliary_losses(scope: str) -> None:
    """Against one plain forward pass with the model's own labels and losses."""
    model = moe_model(2)
    sums, grads = step(model, 1, scope)
    ids, _ = rows()
    model.zero_grad()
    outputs = model(input_ids=ids, router_noise=RouterNoise(0.4, 3, 5))
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    lb_loss, z_loss = auxiliary_losses(outputs.router_decisions)
    lm_loss = functional.cross_entropy(logits, targets)
    variance = routing_variance(outputs.router_decisions)
    (lm_loss + 0.3 * lb_loss + 0.1 * z_loss - 0.7 * variance).backward()
    for name, parameter in model.named_parameters():
        # the plain pass has the shares of the balance loss in fp32
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-5, atol=1e-9)
    assert float(sums.lm_loss) == pytest.approx(lm_loss.item(), rel=1e-6)
    assert float(sums.lb_loss) == pytest.approx(lb_loss.item(), rel=1e-6)
    assert float(sums.z_loss) == pytest.approx(z_loss.item(), rel=1e-6)
    assert float(sums.routing_variance) == pytest.approx(variance.item(), rel=1e-6)


@pytest.mark.parametrize("scope", ["global", "micro"])
def test_tuning_is_for_as_many_tokens_as_a_layer_gets(
    scope: Literal["global", "micro"], tiny_config: RunConfig
) -> None:
    model = moe_model(1)
    seen = []
    for layer in model.moe_layers().values():
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., 0].numel()))
    step(model, 4, scope)
    optim = replace(
        tiny_config.optim, balance_scope=scope, batch_size=ROWS // 4, grad_accum_steps=4
    )
    config = replace(tiny_config, optim=optim)
    config = replace(config, data=replace(config.data, block_size=LENGTH))
    assert set(seen) == {tokens_of_a_pass(config)}


def test_sums_add_up() -> None:
    sums, _ = step(moe_model(2), 2)
    _, domains = rows()
    assert sums.domain_rows_D.tolist() == torch.bincount(domains, minlength=3).tolist()
    assert float(sums.domain_loss_D.sum() / ROWS) == pytest.approx(float(sums.lm_loss))
    assert sums.expert_counts_NE.sum(dim=1).tolist() == [ROWS * LENGTH * 2] * 2


def test_dense_step_has_no_router_measurements() -> None:
    sums, grads = step(dense_model(), 2)
    assert sums.expert_counts_NE.numel() == sums.routing_variance.numel() == 0
    assert float(sums.lb_loss) == 0.0
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize(("batch_size", "max_blocks"), [(1, 0), (3, 0), (8, 0), (2, 3)])
def test_evaluation_equals_a_plain_loop(batch_size: int, max_blocks: int) -> None:
    model = moe_model(1)
    generator = torch.Generator().manual_seed(2)
    blocks = {
        domain: torch.randint(0, VOCABULARY, (n, LENGTH), generator=generator, dtype=torch.int32)
        for domain, n in (("code", 5), ("math", 3), ("prose", 4))
    }
    found = evaluate(
        Accelerator(cpu=True),
        NextTokenLoss(model),
        blocks,
        batch_size=batch_size,
        max_blocks=max_blocks,
        moe_layers=(0, 1),
        num_experts=4,
    )
    assert model.training
    model.eval()
    losses, counted, decisions = {}, 0, []
    for d, (domain, all_rows) in enumerate(blocks.items()):
        kept = all_rows[: max_blocks or None].long()
        with torch.no_grad():
            passes = [model(input_ids=row[None], labels=row[None]) for row in kept]
        losses[domain] = [p.lm_loss.item() for p in passes]
        counted += len(kept)
        counts = sum(p.router_decisions[1].expert_counts() for p in passes)
        expected = (counts / counts.sum()).tolist()
        assert found.domain_fractions[1][d] == pytest.approx(expected)
        decisions += [p.router_decisions for p in passes]
    for domain, values in losses.items():
        mean = sum(values) / len(values)
        assert found.domain_lm_loss[domain] == pytest.approx(mean, rel=1e-5)
    everything = [v for values in losses.values() for v in values]
    assert found.lm_loss == pytest.approx(sum(everything) / counted, rel=1e-5)
    balance = []
    for layer in range(2):
        probs = torch.cat([d[layer].router_probs for d in decisions])
        experts = torch.cat([d[layer].topk_experts for d in decisions])
        balance.append(load_balancing_loss(probs, experts).item())
    assert found.lb_loss == pytest.approx(sum(balance) / 2, rel=1e-6)


@given(
    steps=st.integers(1, 500),
    warmup=st.floats(0, 1),
    anneal=st.floats(0, 1),
    std=st.floats(0, 2),
)
def test_schedules(steps: int, warmup: float, anneal: float, std: float) -> None:
    optim = OptimConfig(
        max_steps=steps, warmup_fraction=warmup, noise_anneal_fraction=anneal, noise_std=std
    )
    noises = [noise_std(step, optim) for step in range(steps + 1)]
    assert all(a >= b >= 0 for a, b in pairwise(noises))
    assert noises[0] == (std if anneal > 0 else 0.0)
    assert all(n == 0 for step, n in enumerate(noises) if step >= anneal * steps)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=optim.learning_rate)
    peak = round(warmup * steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, peak, steps)
    for step in range(steps):
        assert learning_rate(step, optim) == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


def test_weight_decay_is_for_matrices_only() -> None:
    model = moe_model(1)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5))
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {
        group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups
    }
    decayed, plain, routers = groups["decayed"], groups["not decayed"], groups["routers"]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0, 0.0]
    assert "transformer.h.0.mlp.experts.w1" in decayed
    assert routers == {n for n in names.values() if "router" in n}
    assert "transformer.h.0.mlp.experts.w2_bias" in plain
    assert all("ln" in n or "bias" in n for n in plain)
    # transformers' own trainer goes by names and decays the same, and the routers
    assert decayed | routers == {*Trainer.get_decay_parameter_names(None, model)} & {
        *names.values()
    }
    assert decayed | plain | routers == set(names.values())


@given(st.floats(0, 4), st.none() | st.integers(0, 12))
def test_routers_have_a_rate_of_their_own_and_stop_when_told(
    scale: float, after: int | None
) -> None:
    optim = OptimConfig(max_steps=10, router_learning_rate_scale=scale, freeze_router_after=after)
    optimizer = build_optimizer(moe_model(1), optim)
    for step in range(10):
        Rates.at(step, optim).assign(optimizer)
        whole = learning_rate(step, optim)
        trains = after is None or step < after
        expected = {"routers": whole * scale if trains else 0.0}
        for group in optimizer.param_groups:
            assert group["lr"] == expected.get(group["name"], whole)


def test_a_dense_model_and_null_routers_have_no_group_of_routers() -> None:
    dense = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    frozen = upcycle(dense, [0], 2, 1, router="frozen")
    for model in (dense, frozen):
        names = [group["name"] for group in build_optimizer(model, OptimConfig()).param_groups]
        assert names == ["decayed", "not decayed"]
