"""Runs of the trainer by its own command line: some seconds of it, and variants for equal steps."""

import shutil
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu.checks import kept_output
from benchmarks.gpu.pack import LOCAL, packed_data
from benchmarks.gpu.program import REPOSITORY, Fields, OutOfTime, Setting
from moe_emergence.run_folder import RunFolder, read_json, read_metrics

SIZE = ("--batch-size", "8", "--grad-accum-steps", "1")
TINY_SIZE = (
    "--n-layer", "2", "--n-embd", "16", "--n-head", "2", "--batch-size", "2",
    "--grad-accum-steps", "1",
)  # fmt: skip
TINY_LAYERS = ("--moe-layers", "1", "--num-experts", "4")
EMBEDDED = ("--data", "embedded", "--tokenizer", "train")
TINY_EMBEDDED = (*EMBEDDED, "--block-size", "32", "--size-mb", "0.2", "--vocab-size", "300")
SCRATCH = ("--preset", "dense", "--base", "scratch", "--learning-rate", "6e-4")
VARIANTS: dict[str, tuple[str, ...]] = {
    "dense": ("--preset", "dense"),
    "mixture": ("--preset", "moe-main"),
    "frozen": ("--preset", "moe-main", "--router", "frozen"),
    "hash": ("--preset", "moe-main", "--router", "hash"),
    "no-lb": ("--preset", "no-lb"),
    "top2": ("--preset", "top2"),
}
BASE_SHARE = 0.25
"""Of the stage's time for pretraining the base that all variants start from."""
START_S = 32.0
"""What a run takes besides its steps: imports, data, evaluation, saving."""


def short_training(setting: Setting) -> Iterator[Fields]:
    """A mixture trained for a few seconds, launch by launch and as a CUDA graph."""
    steps = 4 if setting.tiny else 150
    base = _Run("train-base", setting, SCRATCH)
    yield base.train(max(2, steps // 3))
    graphs = ("off",) if setting.device == "cpu" else ("off", "on")
    for graph in graphs:
        flags = ("--preset", "moe-main", "--base", base.model, "--cuda-graph", graph)
        yield _Run(f"train-graph-{graph}", setting, flags).train(steps)


def equal_steps(setting: Setting) -> Iterator[Fields]:
    """A base from scratch, then every variant for as many steps as all of them have time for."""
    began = time.time()
    base = _Run("base", setting, (*SCRATCH, "--cuda-graph", "auto"))
    probe = base.train(2 if setting.tiny else 40)
    yield probe
    left = setting.deadline - time.time()
    seconds = 8 * 512 / probe["tokens_per_sec"]
    base_steps = 3 if setting.tiny else int(BASE_SHARE * left / seconds)
    yield base.train(max(base_steps, 2))
    left = setting.deadline - time.time() - START_S * len(VARIANTS)
    # a mixture's step is at most half as fast again
    steps = 2 if setting.tiny else int(left / len(VARIANTS) / (1.5 * seconds))
    yield {
        "run": "projection",
        "dense_step_s": seconds,
        "base_steps": base_steps,
        "steps": steps,
        "spent_s": round(time.time() - began, 1),
    }
    for name, flags in VARIANTS.items():
        if steps < 1 or time.time() > setting.deadline - START_S:
            raise OutOfTime
        flags = (*flags, "--base", base.model, "--cuda-graph", "auto")
        yield _Run(name, setting, flags).train(steps)


class RunFailed(Exception):
    """A run ended with another exit code than 0."""

    def __init__(self, name: str, ended: Fields) -> None:
        said = "\n".join(ended["last_lines"][-8:])
        super().__init__(f"{name}: exit {ended['exit']} after {ended['seconds']} s\n{said}")


class _Run:
    """A run whose folder lies where nothing travels back."""

    def __init__(self, name: str, setting: Setting, flags: tuple[str, ...]) -> None:
        self.name, self.setting, self.flags = name, setting, flags
        self.folder = RunFolder(LOCAL / "runs" / name)

    @property
    def model(self) -> str:
        """Where the trained model will be, from the repository on."""
        return str(self.folder.final_model.relative_to(REPOSITORY))

    def train(self, steps: int) -> Fields:
        """Train for `steps`, from the beginning: speed, losses and routing.

        Raises:
            RunFailed: with what it said, when it did not end well.
        """
        shutil.rmtree(self.folder.root, ignore_errors=True)
        data, tiny = packed_data(), self.setting.tiny
        source: tuple[str, ...] = TINY_EMBEDDED if tiny else EMBEDDED
        if data is not None:
            source = ("--data", str(data.relative_to(REPOSITORY)))
        layers = TINY_LAYERS if tiny and "dense" not in self.flags else ()
        command = [
            sys.executable, "-m", "moe_emergence.train", *self.flags, *source,
            *(TINY_SIZE if tiny else SIZE), *layers,
            "--run-name", self.name, "--output-dir", f"{LOCAL.name}/runs",
            "--cache-dir", f"{LOCAL.name}/cache", "--device", self.setting.device,
            "--max-steps", str(steps), "--eval-every", str(steps), "--save-every", str(steps),
            "--keep-last-k", "1", "--eval-blocks", "2" if tiny else "64", "--dispatch", "fused",
            "--track", "none",
        ]  # fmt: skip
        ended = kept_output(command, "runs.log", self.setting)
        if ended["exit"] != 0:
            raise RunFailed(self.name, ended)
        return {"run": self.name, "steps": steps, **ended, **self._measured()}

    def _measured(self) -> Fields:
        summary = read_json(self.folder.summary)
        rows = read_metrics(self.folder.metrics)
        rates = sorted(r["perf/tokens_per_sec"] for r in rows if "perf/tokens_per_sec" in r)
        evaluations = [r for r in rows if "eval/lm_loss" in r]
        found: Fields = {"status": summary["status"]}
        if rates:
            found["tokens_per_sec"] = rates[len(rates) // 2]
        for place, row in (("first", evaluations[:1]), ("last", evaluations[-1:])):
            losses = [(k, v) for of in row for k, v in of.items() if k.startswith("eval/lm_loss")]
            found[place] = {name: round(loss, 5) for name, loss in losses}
        if self.folder.expert_domain.exists():
            found["expert_domain"] = self.folder.expert_domain.read_text("utf-8")[:6000]
        return found
