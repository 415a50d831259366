"""Layers that are not trained: passed over with what they computed once, to the same end."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llama_models
import pytest
import small_models
import torch
from conftest import tiny
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from moe_emergence.config import ModelConfig, RunConfig
from moe_emergence.errors import RunError
from moe_emergence.models.lower_layers import layers_of, lower_modules, lower_states
from moe_emergence.run_folder import RunFolder, read_metrics
from moe_emergence.training.experiment import run_experiment
from moe_emergence.training.frozen_states import FrozenStates
from moe_emergence.training.objective import NextTokenLoss

MODELS = {
    "gpt2": lambda: small_models.make_model(1),
    "gpt2-dense": small_models.make_dense,
    **{kind: lambda kind=kind: llama_models.make_mixture(kind) for kind in llama_models.DENSE},
    **{f"{k}-dense": lambda k=k: llama_models.make_dense(k) for k in llama_models.DENSE},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]().train()


def gradients(
    model: PreTrainedModel, objective: NextTokenLoss, ids_BL: Tensor
) -> dict[str, Tensor]:
    model.zero_grad()
    losses_BL, decisions = objective(ids_BL)
    loss = losses_BL.square().sum()
    for decision in decisions:
        loss = loss + decision.router_logits.square().mean()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_losses_and_gradients_are_those_of_the_whole_model(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    first = min(getattr(model.config, "moe_layers", [3]))
    for module in lower_modules(model, first):
        module.requires_grad_(False)
    ids_BL = small_models.ids(4, 14)
    whole = NextTokenLoss(model)
    passed = NextTokenLoss(model, first, FrozenStates(model, first, tmp_path, "no"))
    expected, found = whole(ids_BL)[0], passed(ids_BL)[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected)
    expected_grads, grads = gradients(model, whole, ids_BL), gradients(model, passed, ids_BL)
    assert grads.keys() == expected_grads.keys()
    assert len(grads) < len(list(model.parameters()))
    for name, expected in expected_grads.items():
        torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=1e-4)
    # nothing of it is left behind
    assert torch.equal(whole(ids_BL)[0], whole(ids_BL)[0])
    assert [type(layer) for layer in layers_of(model)] == [type(layers_of(model)[0])] * 4


def test_states_are_those_that_the_layer_reads(model: PreTrainedModel) -> None:
    ids_BL, read = small_models.ids(), []
    layer = layers_of(model.eval())[2]
    hook = layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    model.base_model(input_ids=ids_BL, use_cache=False)
    hook.remove()
    assert torch.equal(lower_states(model, 2, ids_BL), read[0])


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[tuple[GPT2LMHeadModel, FrozenStates, list[Tensor]]]:
    """A model, its kept states, and what its lowest layer is run on."""
    model, runs = small_models.make_dense(), []
    hook = model.transformer.h[0].register_forward_pre_hook(lambda m, i: runs.append(i[0]))
    yield model, FrozenStates(model, 2, tmp_path, "no"), runs
    hook.remove()


def test_a_sequence_is_computed_once_whatever_batch_it_is_in(
    kept: tuple[GPT2LMHeadModel, FrozenStates, list[Tensor]], tmp_path: Path
) -> None:
    model, states, runs = kept
    ids_BL = small_models.ids(5)
    first = states(ids_BL)
    assert len(runs) == 5
    order = torch.tensor([3, 0, 4])
    assert torch.equal(states(ids_BL[order]), first[order])
    again = FrozenStates(model, 2, tmp_path, "no")
    assert torch.equal(again(ids_BL), first)
    assert len(runs) == 5
    assert torch.equal(again(ids_BL[:, :7]), states(ids_BL[:, :7]))
    assert len(runs) == 10
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_model_layer_or_precision_has_states_of_its_own(tmp_path: Path) -> None:
    def folder(model: PreTrainedModel, first: int = 2, precision: str = "no") -> Path:
        return FrozenStates(model, first, tmp_path, precision).folder

    dense = small_models.make_dense()
    own = folder(dense)
    upcycled = small_models.upcycle(dense, [2], 4, noise=0.3)
    assert folder(upcycled) == own
    others = [folder(dense, 1), folder(dense, 2, "bf16")]
    others.append(folder(small_models.make_dense(layer_norm_epsilon=1e-3)))
    with torch.no_grad():
        dense.transformer.h[3].mlp.c_fc.bias[0] += 1
        assert folder(dense) == own
        dense.transformer.h[1].mlp.c_fc.bias[0] += 1
        others.append(folder(dense))
        dense.transformer.wpe.weight[5, 0] += 1
        others.append(folder(dense))
    assert len({own, *others}) == 6


def test_a_damaged_file_is_named(
    kept: tuple[GPT2LMHeadModel, FrozenStates, list[Tensor]],
) -> None:
    _, states, _ = kept
    ids_BL = small_models.ids(1)
    states(ids_BL)
    (path,) = states.folder.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match=f"{path.name}: damaged .* delete it"):
        states(ids_BL)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    kept: tuple[GPT2LMHeadModel, FrozenStates, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, states, _ = kept

    def full(file: object, array: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(RunError, match="No space left on device"):
        states(small_models.ids(1))
    assert list(states.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen_layers": -1}, "--frozen-layers -1: give 0 or more"),
        ({"frozen_layers": 2, "dropout": 0.1}, "--frozen-layers 2: .* --dropout 0.1"),
        ({"frozen_layers": 9}, "--frozen-layers 9: --moe-layers 8 9 10 11 must not be among"),
        (
            {"frozen_layers": 4, "moe_layers": (), "base": "scratch", "n_layer": 4},
            "--frozen-layers 4: the model has 4 layers",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


@pytest.mark.slow
def test_a_run_leaves_the_frozen_layers_alone_and_resumes_bitwise(
    data_folder: Path, cache_folder: Path, tmp_path: Path
) -> None:
    def config(name: str) -> RunConfig:
        run = tiny(data_folder, tmp_path / "cache", tmp_path / name)
        model = replace(run.model, frozen_layers=1, moe_layers=(1,))
        return replace(run, model=model, optim=replace(run.optim, compare_dense=True))

    assert run_experiment(config("whole")).status == "completed"
    (states,) = (tmp_path / "cache" / "hidden-states").iterdir()
    files = {path.name: path.stat().st_mtime_ns for path in states.iterdir()}
    stopped = replace(config("stopped"), stop_after=3)
    assert run_experiment(stopped).status == "interrupted"
    resumed = replace(stopped, stop_after=None, resume="auto")
    assert run_experiment(resumed).status == "completed"
    assert {path.name: path.stat().st_mtime_ns for path in states.iterdir()} == files

    def weights(run: RunFolder) -> dict[str, Tensor]:
        return load_file(run.final_model / "model.safetensors")

    run, other = (RunFolder(tmp_path / name / "runs" / "tiny") for name in ("whole", "stopped"))
    end, again = weights(run), weights(other)
    assert all(torch.equal(end[name], again[name]) for name in end)
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_metrics(m)]
        for m in (run.metrics, other.metrics)
    ]
    assert rows[0] == rows[1]
    base = weights(RunFolder(run.root / "dense-base"))
    lower = ("transformer.wte.", "transformer.wpe.", "transformer.h.0.")
    for trained in (end, weights(RunFolder(run.root / "dense"))):
        kept = {name for name in base if name.startswith(lower)}
        assert len(kept) == 14
        assert all(torch.equal(trained[name], base[name]) for name in kept)
        moved = list(trained.keys() & base.keys() - kept)
        assert all(not torch.equal(trained[name], base[name]) for name in moved)
        assert len(moved) > 4
