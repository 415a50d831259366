"""`MoERoutingCallback` on the stock Trainer, against routers read by hooks of the test's own."""

import copy
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_models
import pytest
import torch
from conftest import REPOSITORY
from peft import LoraConfig, get_peft_model
from process_groups import in_processes
from routing_models import tiny_mixture
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.routing_callback import main as measure_cost
from moe_emergence.analysis.meter import RoutingMeter
from moe_emergence.analysis.routers import RouterReader, find_routers
from moe_emergence.analysis.sources import open_source
from moe_emergence.analysis.tidy import read_tables
from moe_emergence.analyze import main as analyze_command
from moe_emergence.data.tokenizer import train_bpe
from moe_emergence.integrations.callback import MoERoutingCallback
from moe_emergence.run_folder import TRAINER_ROUTING, read_json, read_metrics

VOCAB, LENGTH, ROWS = 64, 10, 16
MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: tiny_mixture("mixtral"),
    "olmoe": lambda: tiny_mixture("olmoe"),
    "deepseek_v3": lambda: tiny_mixture("deepseek_v3"),
    "ours-gpt2": lambda: tiny_mixture("learned"),
    "ours-hash": lambda: tiny_mixture("hash"),
    "ours-llama": lambda: llama_models.make_mixture("llama"),
    "adapter": lambda: get_peft_model(
        tiny_mixture("mixtral"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ),
}


class Rows(torch.utils.data.Dataset):
    """The row `i` is padded behind its first `LENGTH - i % 4` tokens."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        row = torch.randint(1, VOCAB, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < LENGTH - index % 4).long()
        return {"input_ids": row, "labels": row.where(mask > 0, -100), "attention_mask": mask}


def trainer_of(model: nn.Module, folder: Path, tokenizer: Any = None, **changes: Any) -> Trainer:
    settings = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "logging_steps": 2, "report_to": [], "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, **changes,
    }  # fmt: skip
    return Trainer(
        model, TrainingArguments(**settings), train_dataset=Rows(), eval_dataset=Rows(),
        processing_class=tokenizer,
    )  # fmt: skip


class Oracle(TrainerCallback):
    """Copies of the weights at every step, and the batches, to route them again one by one."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.passes = trainer, []
        inner = trainer.training_step

        def step(model: nn.Module, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
            kept = copy.deepcopy(trainer.model)
            self.passes.append((trainer.state.global_step, kept, copy.deepcopy(inputs)))
            return inner(model, inputs, *rest)

        trainer.training_step = step

    def expected(self, first: int, last: int) -> dict[int, tuple[list[int], float]]:
        """Per layer counts and mean entropy over the steps in [first, last), row by row."""
        found: dict[int, tuple[list[int], float]] = {}
        for layer in RouterReader(self.trainer.model).layers:
            counts, entropies = None, []
            for step, model, inputs in self.passes:
                if not first <= step < last:
                    continue
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                    reader = RouterReader(model)
                    with reader.reading():
                        # causal: what is behind a token does not change it
                        routing = {r.layer: r for r in reader.read(ids[None, : int(mask.sum())])}
                    probs = routing[layer].probs_TE
                    counts = counts or [0] * probs.shape[1]
                    for expert in routing[layer].experts_TK.flatten().tolist():
                        counts[expert] += 1
                    entropies += (-(probs * probs.clamp(min=1e-30).log()).sum(1)).tolist()
            found[layer] = counts, sum(entropies) / len(entropies)
        return found


def check_row(row: dict[str, Any], expected: dict[int, tuple[list[int], float]]) -> None:
    for layer, (counts, entropy) in expected.items():
        shares = [count / sum(counts) for count in counts]
        name = f"router/layer_{layer}"
        for expert, share in enumerate(shares):
            assert row[f"{name}_expert_{expert}_frac"] == pytest.approx(share, abs=1e-6)
        assert row[f"{name}_max_frac"] == pytest.approx(max(shares))
        assert row[f"{name}_min_frac"] == pytest.approx(min(shares))
        assert row[f"{name}_dead_experts"] == counts.count(0)
        assert row[f"{name}_entropy"] == pytest.approx(entropy, rel=1e-4, abs=1e-6)
        share = entropy / math.log(len(counts))
        assert row[f"{name}_normalised_entropy"] == pytest.approx(share, rel=1e-4, abs=1e-6)


def documented_keys() -> set[str]:
    text = (REPOSITORY / "docs/transformers.md").read_text("utf-8")
    table = text.split("## Watching a Trainer")[1].split("\n- ")[0]
    return set(re.findall(r"`((?:router|eval)/[^`]+)`", table))


# peft about transformers' attribute of the former name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient-checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_every_training_pass(
    name: str, checkpointing: bool, tmp_path: Path
) -> None:
    """Of both micro-batches, without padding, without the evaluation in between, and once each."""
    changes = {"eval_strategy": "steps", "eval_steps": 1, "activation_checkpointing": checkpointing}
    trainer = trainer_of(MODELS[name](), tmp_path, **changes)
    oracle = Oracle(trainer)
    trainer.add_callback(MoERoutingCallback(trainer, churn_every=1))
    trainer.train()
    rows = read_metrics(tmp_path / TRAINER_ROUTING)
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        check_row(row, oracle.expected(row["step"] - 2, row["step"]))
    keys = {re.sub(r"expert_\d", "expert_E", re.sub(r"layer_\d", "layer_N", k)) for k in rows[-1]}
    assert keys - {"step"} == documented_keys()
    # the Trainer's own history has the same, without a number for every expert
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for row, entry in zip(rows, logged, strict=True):
        shown = {key: value for key, value in row.items() if "_expert_" not in key}
        shown = {key: value for key, value in shown.items() if not key.endswith("_entropy")
                 or key.endswith("_normalised_entropy")}  # fmt: skip
        assert shown.items() <= entry.items()
        assert not any(key.endswith("_frac") and "_expert_" in key for key in entry)
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 4
    assert not any(key.startswith("router/") for entry in evaluated for key in entry)


@pytest.mark.parametrize("name", ["mixtral", "ours-gpt2"])
def test_training_is_the_same_with_the_callback_and_no_hook_is_left(
    name: str, tmp_path: Path
) -> None:
    weights = []
    for watched in (False, True):
        trainer = trainer_of(MODELS[name](), tmp_path, eval_strategy="steps", eval_steps=1)
        if watched:
            trainer.add_callback(MoERoutingCallback(trainer, churn_every=1))
        trainer.train()
        weights.append(trainer.model.state_dict())
        for module in trainer.model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


def test_churn_is_the_share_of_the_probe_with_another_first_expert(tmp_path: Path) -> None:
    probe = torch.randint(1, VOCAB, (3, 7), generator=torch.Generator().manual_seed(9))
    trainer = trainer_of(MODELS["mixtral"](), tmp_path, logging_steps=1, learning_rate=0.1)
    firsts: list[list[Tensor]] = []

    class Reads(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reader = RouterReader(trainer.model)
            with reader.reading():
                firsts.append([routing.experts_TK[:, 0] for routing in reader.read(probe)])

    trainer.add_callback(Reads())
    trainer.add_callback(MoERoutingCallback(trainer, churn_every=2, probe=probe))
    trainer.train()
    rows = {row["step"]: row for row in read_metrics(tmp_path / TRAINER_ROUTING)}
    for layer in (0, 1):
        key = f"eval/layer_{layer}_churn"
        assert [step for step in rows if key in rows[step]] == [4]
        moved = (firsts[3][layer] != firsts[1][layer]).double().mean()
        assert rows[4][key] == pytest.approx(float(moved))
    assert max(rows[4][f"eval/layer_{layer}_churn"] for layer in (0, 1)) > 0


def test_a_probe_of_the_first_batch_leaves_its_padding_out(tmp_path: Path) -> None:
    trainer = trainer_of(MODELS["mixtral"](), tmp_path, logging_steps=1, learning_rate=0.1)
    oracle = Oracle(trainer)
    trainer.add_callback(MoERoutingCallback(trainer, churn_every=1))
    trainer.train()
    _, _, inputs = oracle.passes[0]
    kept = inputs["attention_mask"].flatten() > 0
    assert not kept.all()
    firsts = []
    for _, model, _ in oracle.passes[2:5:2]:  # the models after the first and the second step
        reader = RouterReader(model)
        with reader.reading():
            firsts.append([r.experts_TK[kept, 0] for r in reader.read(inputs["input_ids"])])
    row = read_metrics(tmp_path / TRAINER_ROUTING)[1]
    for layer, (before, after) in enumerate(zip(*firsts, strict=True)):
        assert row[f"eval/layer_{layer}_churn"] == pytest.approx(
            float((before != after).double().mean())
        )


def test_trackers_see_what_is_added(tmp_path: Path) -> None:
    """A tracker's callback comes before all that are added later."""
    seen: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = trainer_of(MODELS["olmoe"](), tmp_path)
    trainer.callback_handler.callbacks.insert(0, Tracker())
    trainer.add_callback(MoERoutingCallback(trainer))
    trainer.train()
    assert sum("router/layer_1_max_frac" in logs for logs in seen) == 2


def test_a_dead_expert_is_counted_and_a_collapse_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = MODELS["mixtral"]()
    router = find_routers(model)[1].module
    inner = router.forward

    def two_experts(*inputs: Any) -> Any:
        logits, weights, experts = inner(*inputs)
        return logits, weights, torch.tensor([2, 0]).expand_as(experts)

    router.forward = two_experts
    trainer = trainer_of(model, tmp_path, max_steps=8, logging_steps=1)
    trainer.add_callback(MoERoutingCallback(trainer, collapse_checks=3))
    with caplog.at_level(logging.WARNING, "moe_emergence"):
        trainer.train()
    rows = read_metrics(tmp_path / TRAINER_ROUTING)
    assert {row["router/layer_1_dead_experts"] for row in rows} == {2}
    (message,) = [r.getMessage() for r in caplog.records if "collapse" in r.getMessage()]
    assert "at step 3: expert 2 of layer 1" in message or "at step 3: expert 0 of" in message


def test_the_file_goes_on_after_a_resume_and_begins_anew_otherwise(tmp_path: Path) -> None:
    def watched(steps: int) -> Trainer:
        changes = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        # on resume transformers' Trainer does not load Mixtral's experts
        trainer = trainer_of(MODELS["ours-gpt2"](), tmp_path, logging_steps=1, **changes)
        trainer.add_callback(MoERoutingCallback(trainer))
        return trainer

    watched(4).train()
    whole = read_metrics(tmp_path / TRAINER_ROUTING)
    watched(4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = read_metrics(tmp_path / TRAINER_ROUTING)
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    assert resumed == whole
    watched(2).train()
    assert [row["step"] for row in read_metrics(tmp_path / TRAINER_ROUTING)] == [1, 2]


def test_a_failed_pass_and_passes_without_gradients_are_not_counted() -> None:
    model = MODELS["mixtral"]().train()
    meter = RoutingMeter(model)
    meter.start()
    ids = torch.randint(1, VOCAB, (2, 5))
    with torch.no_grad():
        model(input_ids=ids)
    model.eval()
    model(input_ids=ids)
    model.train()
    failing = model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids)
    failing.remove()
    assert meter.take() == []
    model(input_ids=ids)
    assert [sum(load.counts) for load in meter.take()] == [20, 20]
    assert meter.take() == []
    meter.stop()


class StubRouter(nn.Linear):
    """Chooses without asking the device for anything."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = super().forward(x)
        weights, experts = logits.softmax(1).topk(2, dim=1)
        return logits, weights, experts


class Stub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(StubRouter(8, 4)) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor) -> list[Any]:
        return [router(x) for router in self.layers]


def test_a_step_never_waits_for_the_device() -> None:
    """Fake tensors have no values: whatever asks for one raises."""
    with FakeTensorMode():
        model = Stub()
        meter = RoutingMeter(model)
        meter.start()
        for _ in range(2):
            model(torch.zeros(6, 8), attention_mask=torch.ones(2, 3))
        with pytest.raises(DataDependentOutputException):
            meter.take()


def test_the_cost_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "benchmarks"):
        measure_cost(["--tiny", "--pairs", "2", "--rows", "1"])
    lines = [record.getMessage() for record in caplog.records if "hooks" in record.getMessage()]
    assert [line.split(":")[0] for line in lines] == ["Mixtral", "upcycled GPT-2"]
    for line in lines:
        _, ratio, share = map(float, re.findall(r"\d+\.\d+", line))
        assert ratio > 0
        assert 0 < share < 100


def _in_two(folder: str) -> None:
    torch.set_num_threads(1)
    trainer = trainer_of(MODELS["mixtral"](), Path(folder), gradient_accumulation_steps=1)
    trainer.add_callback(MoERoutingCallback(trainer, churn_every=2))
    trainer.train()


@pytest.mark.slow
def test_two_processes_count_what_one_does(tmp_path: Path) -> None:
    """The same batches, in two micro-batches or in two processes; one file."""
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = trainer_of(MODELS["mixtral"](), tmp_path / "one", **changes)
    trainer.add_callback(MoERoutingCallback(trainer, churn_every=2))
    trainer.train()
    assert in_processes(2, _in_two, str(tmp_path / "two")) == [0, 0]
    one, two = (read_metrics(tmp_path / name / TRAINER_ROUTING) for name in ("one", "two"))
    assert [row["step"] for row in two] == [2, 4]
    for row, expected in zip(two, one, strict=True):
        for key, value in expected.items():
            # the probe is of each process' own first batch
            if "churn" not in key:
                assert row[key] == pytest.approx(value, rel=1e-5), key
    assert 0 <= two[1]["eval/layer_0_churn"] <= 1


def test_bad_arguments_and_dense_models_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(MODELS["mixtral"](), tmp_path)
    for arguments, message in (
        ({"churn_every": -1}, "churn_every -1: give 0"),
        ({"collapse_checks": 0}, "collapse_checks 0: give at least 1"),
        ({"collapse_threshold": 1.5}, "collapse_threshold 1.5: give a share"),
        ({"probe": torch.zeros(3)}, r"probe of shape \(3,\): give token ids"),
    ):
        with pytest.raises(ValueError, match=message):
            MoERoutingCallback(trainer, **arguments)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)
    dense = trainer_of(GPT2LMHeadModel(config), tmp_path)
    with pytest.raises(ValueError, match="no routers that can be read"):
        MoERoutingCallback(dense)


@pytest.mark.slow
def test_analyze_reads_the_trainers_folder(
    tmp_path: Path, data_folder: Path, cache_folder: Path
) -> None:
    """Curves of training beside the routing of the newest checkpoint."""
    tokenizer = train_bpe(["code math prose 0 1 2"], 300)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trainer_of(
        MODELS["ours-gpt2"](), tmp_path, tokenizer, save_strategy="steps", save_steps=2
    )
    trainer.add_callback(MoERoutingCallback(trainer, churn_every=1))
    trainer.train()
    flags = ["--data", str(data_folder), "--block-size", "16", "--max-tokens", "600"]
    flags += ["--knockout-tokens", "0", "--permutations", "19", "--device", "cpu"]
    assert analyze_command([str(tmp_path), *flags, "--cache-dir", str(cache_folder)]) == 0
    folder = tmp_path / "analysis"
    (about,) = read_json(folder / "analysis.json")["runs"]
    assert about["step"] == 4
    assert about["source"] == str(tmp_path / "checkpoint-4")
    tables = read_tables(folder)
    rows = read_metrics(tmp_path / TRAINER_ROUTING)
    load = tables["load_over_training"].set_index(["step", "layer", "expert"])["fraction"]
    assert len(load) == 2 * 2 * 4
    assert load[4, 2, 3] == rows[1]["router/layer_2_expert_3_frac"]
    assert set(tables["entropy_over_training"]["step"]) == {2, 4}
    assert "eval/layer_1_churn" in set(tables["training"]["metric"])
    for name in ("collapse", "load_over_training", "entropy_over_training", "expert_domain"):
        assert (folder / f"figures/{name}.png").is_file(), name
    assert (folder / "report.html").is_file()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match=r"neither a model nor a checkpoint .*save_model\(\)"):
        open_source(str(tmp_path), "run", "cpu")
