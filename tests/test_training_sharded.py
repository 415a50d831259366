"""Sharded weights and experts train what one process trains, in every layout and across layouts."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_models
import pytest
import small_models
import torch
from conftest import flags_of, tiny
from equal_runs import assert_equal_runs, assert_same_run
from process_groups import in_processes, run_processes
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from moe_emergence.config import RunConfig
from moe_emergence.models.loading import load_trained_model
from moe_emergence.run_folder import RunFolder, read_metrics
from moe_emergence.training.experiment import run_experiment

pytestmark = pytest.mark.slow

Layout = tuple[int, int, int]
"""Processes, --fsdp-size and --ep-size."""
ONE, TWO, EXPERTS, FOUR, REPLICAS = (1, 1, 1), (2, 2, 1), (2, 2, 2), (4, 4, 2), (4, 2, 2)


def varied(config: RunConfig) -> RunConfig:
    """All that is counted over processes, and gradients clipped so far that AdamW's epsilon tells.

    Of 5 evaluation blocks a domain some process has more than others.
    """
    return replace(
        config,
        run_name="run",
        model=replace(config.model, num_experts=8, top_k=2, expert_bias_rate=1e-3),
        optim=replace(
            config.optim, batch_size=8, pretrain_steps=2, lb_coef=0.1, variance_coef=1.0,
            noise_anneal_fraction=1.0, learning_rate=1e-3, max_grad_norm=1e-5,
        ),
        monitor=replace(config.monitor, eval_blocks=5),
    )  # fmt: skip


def train(config: RunConfig, layout: Layout, where: Path, **changes: Any) -> RunFolder:
    """The run of `config` in `where`; a process has two micro-batches of its share."""
    processes, fsdp_size, ep_size = layout
    rows = config.optim.batch_size // processes
    config = replace(
        config, output_dir=str(where), fsdp_size=fsdp_size, ep_size=ep_size,
        optim=replace(config.optim, batch_size=rows // 2, grad_accum_steps=2), **changes,
    )  # fmt: skip
    if processes == 1:
        run_experiment(config)
    else:
        assert run_processes(processes, flags_of(config)) == [0] * processes
    return RunFolder(where / config.run_name)


def go_on(config: RunConfig, run: RunFolder, layout: Layout, where: Path) -> RunFolder:
    """The run of `config` from its checkpoint of step 3, as after a crash."""
    later = shutil.ignore_patterns("step-000006", "final-model", "run_summary.json")
    shutil.copytree(run.root, where / run.root.name, ignore=later)
    return train(config, layout, where, resume="auto")


@pytest.fixture(scope="module")
def from_scratch(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, cache_folder: Path
) -> RunConfig:
    return varied(tiny(data_folder, cache_folder, tmp_path_factory.mktemp("unused")))


@pytest.fixture(scope="module")
def one(from_scratch: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run in one process."""
    torch.set_num_threads(1)  # as in every test, before the first of which this may run
    return train(from_scratch, ONE, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def config(from_scratch: RunConfig, one: RunFolder) -> RunConfig:
    """The run from the base that was made for it, which is not made again."""
    base = str(RunFolder(one.root / "dense-base").final_model)
    return replace(
        from_scratch,
        model=replace(from_scratch.model, base=base),
        optim=replace(from_scratch.optim, pretrain_steps=0),
    )


def test_two_processes_and_their_dense_base_equal_one(
    from_scratch: RunConfig, one: RunFolder, tmp_path: Path
) -> None:
    found = train(from_scratch, TWO, tmp_path)
    assert_equal_runs(RunFolder(one.root / "dense-base"), RunFolder(found.root / "dense-base"))
    assert_equal_runs(one, found)


def test_four_processes_equal_one(config: RunConfig, one: RunFolder, tmp_path: Path) -> None:
    assert_equal_runs(one, train(config, FOUR, tmp_path, dispatch="sequential"))


def test_a_run_goes_on_bitwise_in_its_layout_and_equal_in_one_process(
    config: RunConfig, one: RunFolder, tmp_path: Path
) -> None:
    whole = train(config, EXPERTS, tmp_path / "whole")
    assert_equal_runs(one, whole)
    assert_same_run(whole, go_on(config, whole, EXPERTS, tmp_path / "same"))
    assert_equal_runs(one, go_on(config, whole, ONE, tmp_path / "one"))


def test_a_run_of_one_process_goes_on_in_two_sharded_replicas(
    from_scratch: RunConfig, one: RunFolder, tmp_path: Path
) -> None:
    assert_equal_runs(one, go_on(from_scratch, one, REPLICAS, tmp_path))


def from_base(config: RunConfig, dense: Any, folder: Path) -> RunConfig:
    """A short run that starts from a dense model."""
    dense.save_pretrained(folder)
    last = dense.config.num_hidden_layers - 1
    return replace(
        config,
        model=replace(config.model, base=str(folder), moe_layers=(last,), top_k=1),
        optim=replace(config.optim, pretrain_steps=0, max_steps=2, learning_rate=1e-4),
        monitor=replace(config.monitor, eval_every=2, eval_blocks=1, log_router_every=1),
    )


def test_experts_of_a_process_may_get_no_tokens(config: RunConfig, tmp_path: Path) -> None:
    """The router reads the same of every token, so all go to one expert."""
    dense = small_models.make_dense(vocab_size=300)
    torch.nn.init.zeros_(dense.transformer.h[-1].ln_2.weight)
    short = from_base(config, dense, tmp_path / "base")
    quiet = replace(short.optim, noise_std=0.0)
    short = replace(short, optim=quiet, model=replace(short.model, expert_bias_rate=0.0))
    alone = train(short, ONE, tmp_path / "one")
    rows = [row for row in read_metrics(alone.metrics) if "router/layer_3_entropy" in row]
    assert len(rows) == 2
    for row in rows:
        shares = sorted(row[f"router/layer_3_expert_{expert}_frac"] for expert in range(8))
        assert shares == [0.0] * 7 + [1.0]
    assert_equal_runs(alone, train(short, EXPERTS, tmp_path / "two", dispatch="fused"))


def test_llama_and_its_dense_comparison_equal_one_process(
    config: RunConfig, tmp_path: Path
) -> None:
    dense = llama_models.make_dense("llama", vocab_size=300)
    assert dense.config.tie_word_embeddings
    short = from_base(config, dense, tmp_path / "base")
    short = replace(short, optim=replace(short.optim, compare_dense=True))
    alone, found = (train(short, n, tmp_path / str(n)) for n in (ONE, EXPERTS))
    assert_equal_runs(alone, found)
    assert_equal_runs(RunFolder(alone.root / "dense"), RunFolder(found.root / "dense"))
    assert load_trained_model(found.final_model).config.tie_word_embeddings


def check_gradients(folders: list[Path]) -> None:
    """In one of two processes: models loaded as shares have the gradients of those loaded whole."""
    ids = small_models.ids(batch=4)
    for folder in folders:
        whole = AutoModelForCausalLM.from_pretrained(folder)
        layout = DistributedConfig(fsdp_size=2, ep_size=2)
        shared = AutoModelForCausalLM.from_pretrained(folder, distributed_config=layout)
        for part in ids.chunk(2):
            (whole(input_ids=part, labels=part, use_cache=False).loss / 2).backward()
        part = ids.chunk(2)[torch.distributed.get_rank()]
        shared(input_ids=part, labels=part, use_cache=False).loss.backward()
        expected = dict(whole.named_parameters())
        for name, parameter in shared.named_parameters():
            assert isinstance(parameter.grad, DTensor)
            gradient = expected.pop(name).grad
            assert gradient.any()
            # sums of few dozen terms below 10, in another order
            torch.testing.assert_close(parameter.grad.full_tensor(), gradient, rtol=0, atol=1e-6)
        assert not expected


def test_transformers_loads_a_share_by_the_plans_of_the_configuration(tmp_path: Path) -> None:
    models = (small_models.make_model(), *map(llama_models.make_mixture, ("llama", "llama-untied")))
    folders = [tmp_path / str(place) for place in range(len(models))]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    assert in_processes(2, check_gradients, folders) == [0, 0]


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"fsdp_size": 0}, {}, "--fsdp-size 0: give at least 1"),
        ({"fsdp_size": 3, "ep_size": 2}, {}, r"--ep-size 2: give a divisor of --fsdp-size \(3\)"),
        ({"ep_size": 2}, {}, r"--ep-size 2: give a divisor of --fsdp-size \(1\)"),
        ({"fsdp_size": 3, "ep_size": 3}, {}, r"--ep-size 3: .* of --num-experts \(4\)"),
        ({"fsdp_size": 2, "ep_size": 2}, {"moe_layers": ()}, "--ep-size 2: .* no experts"),
        ({"fsdp_size": 2}, {"frozen_layers": 1}, "--frozen-layers 1: .* --fsdp-size 1"),
        ({"fsdp_size": 2}, {}, r"--fsdp-size 2: .* number of processes \(1\)"),
        ({"fsdp_size": 2, "ep_size": 2, "autotune": True}, {}, "--autotune: .* --ep-size 2"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    changes: dict[str, Any], model: dict[str, Any], message: str, tiny_config: RunConfig
) -> None:
    with pytest.raises(ValueError, match=message):
        run_experiment(replace(tiny_config, **changes, model=replace(tiny_config.model, **model)))


def test_every_process_refuses(tiny_flags: list[str]) -> None:
    assert run_processes(2, [*tiny_flags, "--fsdp-size", "3"]) == [2, 2]
