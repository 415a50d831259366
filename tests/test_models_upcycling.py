"""Upcycling: the mixture starts as the dense model, and nothing else changes."""

import copy
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from moe_emergence.models import MoEGPT2Config, MoEGPT2LMHeadModel, upcycle
from moe_emergence.moe import HashRouter

VOCAB = 64


def make_dense(**changes) -> GPT2LMHeadModel:
    settings = {
        "vocab_size": VOCAB,
        "n_positions": 32,
        "n_layer": 4,
        "n_embd": 24,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **changes,
    }
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, and outputs of order one
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def ids(batch: int = 3, length: int = 12, seed: int = 5) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("router", ["learned", "frozen", "hash"])
@pytest.mark.parametrize(
    ("layers", "top_k"),
    [([1], 1), ([2, 3], 1), ([0, 1, 2, 3], 1), ([3, 0], 2), ([1, 2], 5), ([], 1)],
    ids=["one", "last-two", "all", "unsorted-top-2", "every-expert", "none"],
)
def test_without_noise_the_logits_are_those_of_the_dense_model(layers, top_k, router) -> None:
    dense = make_dense()
    model = upcycle(dense, layers, 5, top_k, noise=0.0, router=router)
    assert list(model.moe_layers()) == sorted(layers)
    assert model.config.moe_layers == sorted(layers)
    with torch.no_grad():
        expected, found = dense(ids()).logits, model(ids()).logits
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "gelu_pytorch_tanh"},
        {"n_inner": 40},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"layer_norm_epsilon": 1e-2},
        {"tie_word_embeddings": False},
    ],
    ids=lambda c: next(iter(c)),
)
def test_variants_of_gpt_2_are_inherited(changes) -> None:
    dense = make_dense(**changes)
    model = upcycle(dense, [1, 2], 3, 2, noise=0.0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, dense(ids()).logits, rtol=0, atol=1e-5)
    tied = model.lm_head.weight is model.transformer.wte.weight
    assert tied == changes.get("tie_word_embeddings", True)
    for key, value in dense.config.to_dict().items():
        if key not in {"model_type", "architectures", "transformers_version"}:
            assert model.config.to_dict()[key] == value, key


def test_noise_is_relative_to_each_parameter_and_differs_between_experts() -> None:
    dense = make_dense(n_embd=64)
    noise = 1e-3
    experts = upcycle(dense, [2], 6, 1, noise=noise).moe_layers()[2].experts
    mlp = dense.transformer.h[2].mlp
    sources = {
        "w1": mlp.c_fc.weight,
        "w1_bias": mlp.c_fc.bias,
        "w2": mlp.c_proj.weight,
        "w2_bias": mlp.c_proj.bias,
    }
    for name, source in sources.items():
        delta = (getattr(experts, name) - source).detach().double()
        n, expected = delta.numel(), noise * float(source.detach().std())
        # standard error of a standard deviation, 5 sigma; fp32 rounding of source + noise adds
        # at most an ulp of the source
        rounding = torch.finfo(torch.float32).eps * float(source.detach().abs().max())
        assert abs(delta.std() - expected) <= 5 * expected / math.sqrt(2 * n) + rounding
        assert abs(delta.mean()) <= 5 * expected / math.sqrt(n) + rounding
        flat = delta.flatten(1)
        correlation = torch.corrcoef(flat).fill_diagonal_(0).abs().max()
        assert correlation <= 5 / math.sqrt(flat.shape[1])


def test_everything_but_the_chosen_mlps_is_copied_bitwise() -> None:
    dense = make_dense()
    before = copy.deepcopy(dense.state_dict())
    model = upcycle(dense, [1, 3], 4, 2)
    state = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(dense.state_dict()[name], tensor), f"{name} of the dense model changed"
        converted = any(name.startswith(f"transformer.h.{i}.mlp.") for i in (1, 3))
        assert (name not in state) == converted
        if not converted:
            assert torch.equal(state[name], tensor), name
            assert state[name].data_ptr() != dense.state_dict()[name].data_ptr()
    new = {name.split(".mlp.")[1] for name in state.keys() - before.keys()}
    assert new == {"router.weight", *(f"experts.{n}" for n in ("w1", "w1_bias", "w2", "w2_bias"))}


def test_the_dense_model_shares_nothing_with_the_mixture() -> None:
    dense = make_dense()
    settings = dense.generation_config.to_dict()
    config = dense.config.to_dict()
    model = upcycle(dense, [1], 4, 1)
    model.generation_config.max_new_tokens = 77
    model.config.n_positions = 31
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert dense.generation_config.to_dict() == settings
    assert dense.config.to_dict() == config
    assert all(p.any() for p in dense.parameters())


def test_the_seed_decides_the_noise_and_the_router_and_nothing_else_does() -> None:
    dense = make_dense()

    def state(**changes):
        return upcycle(dense, [1, 2], 4, 1, **changes).state_dict()

    torch.manual_seed(1)
    first = state(seed=3)
    torch.manual_seed(2)
    again = state(seed=3)
    assert all(torch.equal(first[k], again[k]) for k in first)
    other, quiet = state(seed=4), state(seed=3, noise=0.0)
    routers = [name for name in first if ".router." in name]
    assert len(routers) == 2
    for name in routers:
        assert not torch.equal(first[name], other[name])
        assert torch.equal(first[name], quiet[name])  # noise does not move the router
        assert abs(first[name].std() - 0.02) < 0.01
    assert not torch.equal(first[routers[0]], first[routers[1]])


@pytest.mark.parametrize("training", [True, False])
def test_it_keeps_the_mode_of_the_dense_model(training) -> None:
    model = upcycle(make_dense().train(training), [1], 2, 1)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_it_keeps_the_dtype_of_the_dense_model(dtype) -> None:
    dense = make_dense().to(dtype)
    model = upcycle(dense, [1], 3, 2, noise=0.0)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        found, expected = model(ids()).logits, dense(ids()).logits
    assert found.dtype == dtype
    # eight roundings of the residual stream are enough for either
    bound = 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= bound


@pytest.mark.parametrize("says", [True, False], ids=["says tied", "says untied"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_is_what_it_was_whatever_the_configuration_says(tied: bool, says: bool) -> None:
    dense = make_dense()
    if not tied:
        dense.lm_head.weight = torch.nn.Parameter(torch.randn_like(dense.lm_head.weight))
    dense.config.tie_word_embeddings = says
    model = upcycle(dense, [1], 4, 1, noise=0.0)
    torch.testing.assert_close(model(ids()).logits, dense(ids()).logits, rtol=1e-5, atol=1e-5)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert model.config.tie_word_embeddings == tied


def test_every_parameter_keeps_its_own_dtype() -> None:
    """Embeddings in bf16 do not round the rest, nor a block in fp64 the other way."""
    dense = make_dense().eval()
    dense.transformer.wte.to(torch.bfloat16)
    dense.transformer.h[1].mlp.to(torch.float64)
    dense.transformer.h[2].mlp.c_fc.to(torch.float64)
    model = upcycle(dense, [1, 3], 4, 1, noise=0.0)
    theirs = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs:
            assert parameter.dtype == theirs[name].dtype, name
            assert torch.equal(parameter, theirs[name]), name
    for name, dense_name in (("w1", "c_fc.weight"), ("w2_bias", "c_proj.bias")):
        ours = getattr(model.moe_layers()[1].experts, name)
        theirs_now = theirs[f"transformer.h.1.mlp.{dense_name}"]
        assert ours.dtype == torch.float64
        assert torch.equal(ours[2], theirs_now)
    assert model.moe_layers()[3].experts.w1.dtype == torch.float32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_it_keeps_the_implementation_of_attention(attention: str) -> None:
    dense = make_dense()
    dense.set_attn_implementation(attention)
    assert upcycle(dense, [1], 4, 1).config._attn_implementation == attention


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradient_reaches_the_router_and_every_used_expert(top_k) -> None:
    model = upcycle(make_dense(), [1, 3], 4, top_k, noise=1e-2, lb_coef=0.0, z_coef=0.0)
    output = model(ids(), labels=ids())
    output.lm_loss.backward()
    for layer, decision in zip(model.moe_layers().values(), output.router_decisions, strict=True):
        assert layer.router.weight.grad.abs().max() > 0
        used = decision.expert_counts() > 0
        for parameter in layer.experts.parameters():
            touched = parameter.grad.flatten(1).abs().amax(dim=1) > 0
            assert torch.equal(touched, used)


def test_router_kinds_and_bias_are_passed_on() -> None:
    dense = make_dense()
    frozen = upcycle(dense, [1], 4, 1, router="frozen").moe_layers()[1].router
    assert not frozen.weight.requires_grad
    assert frozen.weight.abs().max() > 0
    hashed = upcycle(dense, [1, 2], 4, 1, router="hash").moe_layers()
    assert all(isinstance(layer.router, HashRouter) for layer in hashed.values())
    assert [layer.router.layer for layer in hashed.values()] == [1, 2]
    biased = upcycle(dense, [1], 4, 1, use_expert_bias=True).moe_layers()[1].router
    assert biased.expert_bias.tolist() == [0.0] * 4


class TestRefusals:
    def test_another_architecture(self) -> None:
        phi = PhiForCausalLM(
            PhiConfig(
                vocab_size=16,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
            )
        )
        with pytest.raises(ValueError, match=r"--base: .* GPT-2, Llama, .*, not PhiForCausalLM"):
            upcycle(phi, [0])

    def test_a_mixture(self) -> None:
        model = upcycle(make_dense(), [1], 2, 1)
        with pytest.raises(ValueError, match=r"not MoEGPT2LMHeadModel \(moe_gpt2\)"):
            upcycle(model, [2], 2, 1)

    @pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
    def test_another_activation(self, activation) -> None:
        with pytest.raises(ValueError, match=rf"tanh GELU .* not {activation}$"):
            upcycle(make_dense(activation_function=activation), [1])

    @pytest.mark.parametrize("layers", [[4], [-1], [0, 12]], ids=str)
    def test_layers_outside(self, layers) -> None:
        with pytest.raises(ValueError, match=r"moe_layers .*layers 0 to 3, not \["):
            upcycle(make_dense(), layers)

    @pytest.mark.parametrize("top_k", [0, 5])
    def test_top_k(self, top_k) -> None:
        with pytest.raises(ValueError, match=rf"num_experts_per_tok {top_k}: .*1 to .*\(4\)"):
            upcycle(make_dense(), [1], 4, top_k)

    def test_an_unknown_dispatcher(self) -> None:
        with pytest.raises(ValueError, match="dispatch quick"):
            upcycle(make_dense(), [1], 2, 1, dispatch="quick")

    def test_an_unknown_router(self) -> None:
        with pytest.raises(ValueError, match="hashed"):
            upcycle(make_dense(), [1], 2, 1, router="hashed")

    def test_a_mixture_with_an_activation_its_experts_do_not_have(self) -> None:
        """Experts compute the tanh GELU; a config that says otherwise must not be half true."""
        with pytest.raises(ValueError, match="relu"):
            MoEGPT2LMHeadModel(
                MoEGPT2Config(
                    vocab_size=16,
                    n_layer=2,
                    n_embd=8,
                    n_head=1,
                    moe_layers=[1],
                    activation_function="relu",
                )
            )
