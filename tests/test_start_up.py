"""Help, versions and wrong settings are answered at once: before anything heavy is imported."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import command_environment

pytestmark = pytest.mark.slow

Command = Callable[..., "subprocess.CompletedProcess[str]"]

SUITE = """
question = "?"
preset = "demo"
seeds = [0]
[[variants]]
name = "dense"
changes = {{ {} }}
"""
SUITES = {
    "unknown.toml": SUITE.format('"optim.max_step" = 3'),
    "refused.toml": SUITE.format('"optim.max_steps" = 0'),
    "torn.toml": "question =",
    "keyless.toml": 'question = "?"',
}

ANSWERS: dict[str, dict[str, str]] = {
    "train": {
        "--help": "--moe-layers",
        "--version": "moe-emergence",
        "--num-expert 3": "--num-expert: there is no such flag; did you mean --num-experts?",
        "--lr 3": "did you mean --learning-rate?",
        "--gradient-accumulation-steps=3": "did you mean --grad-accum-steps?",
        "--preset dnese": "--preset dnese: choose from",
        "--router hsah": "'hsah'",
        "--max-steps many": "--max-steps many: give a whole number",
        "--compare-dense true": "('yes', 'no')",
        "--moe-layers 2,x": "--moe-layers x: give a whole number",
        "--top-k 9": "--top-k 9: give a number from 1 to --num-experts (8)",
        "stray": "stray",
    },
    "suite": {
        "--help": "report",
        "--version": "moe-emergence",
        "paln": "did you mean plan?",
        "plan --help": "--budget",
        "plan dmo": "did you mean demo?",
        "plan --job 2": "did you mean --jobs?",
        "plan demo --jobs 0": "--jobs 0: give",
        "plan demo --only mo": "--only mo: choose from",
        "plan demo --device tpu": "'tpu'",
        "run demo --base gpt2": "demo pretrains its own bases",
        "run unknown.toml": "no setting optim.max_step; did you mean optim.max_steps?",
        "run refused.toml": "refused: dense: --max-steps 0: give at least 1",
        "run torn.toml": "not TOML",
        "run keyless.toml": "not a suite",
        "report demo": "run python -m moe_emergence.suite run demo first",
        "report dmo": "did you mean demo?",
        "report --margins 1": "did you mean --margin?",
    },
    "analyze": {
        "--help": "--permutations",
        "--version": "moe-emergence",
        "": "SOURCE of nothing",
        "runs/demo --max-token 3": "did you mean --max-tokens?",
        "runs/demo --permutations 1": "--permutations 1: give at least 19",
        "runs/demo --device tpu": "--device tpu: give",
    },
    "generate": {
        "--help": "--sample-top-k",
        "--version": "moe-emergence",
        "--prompt x": "--checkpoint: required",
        "--checkpoint x --prompt y --top-k 3": "did you mean --sample-top-k?",
        "--checkpoint x --prompt y --temperature -1": "--temperature -1.0: give",
    },
    "verify": {
        "--help": "--implementation",
        "--version": "moe-emergence",
        "--familly mixtral": "did you mean --family?",
        "--cases -1": "--cases -1: give",
        "--dtype fp31": "'fp31'",
    },
    "cli": {
        "": "completion",
        "--help": "completion",
        "--version": "moe-emergence",
        "analyse": "did you mean analyze?",
        "completion bash": "--moe-layers",
        "completion bsh": "did you mean bash?",
        "train --top-k 9": "--top-k 9",
    },
}

ASK = """
import contextlib, importlib, io, json, sys
from dataclasses import dataclass
import tyro

@dataclass
class Anything:
    numbers: tuple[int, ...] | None = (0,)

def packages():
    return {{name.partition(".")[0] for name in sys.modules}}

with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    tyro.cli(Anything, args=["--help"])
tyro.cli(Anything, args=[])
light = packages() | set(sys.stdlib_module_names) | {{"moe_emergence"}}
module = importlib.import_module("moe_emergence.{verb}")
main = getattr(module, "dispatch_verb", None) or module.main
from moe_emergence.entry import run

found = {{}}
for line in {lines!r}:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = run(main, line.split())
        except SystemExit as stop:
            code = stop.code or 0
    found[line] = code, said.getvalue(), sorted(packages() - light)
print(json.dumps(found))
"""


@pytest.mark.parametrize("verb", ANSWERS)
def test_nothing_but_tyro_is_imported_for_an_answer(
    verb: str, command: Command, tmp_path: Path
) -> None:
    for name, text in SUITES.items():
        (tmp_path / name).write_text(text)
    done = command("-c", ASK.format(verb=verb, lines=list(ANSWERS[verb])), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line, (code, said, heavy) in json.loads(done.stdout).items():
        assert not heavy, line
        assert ANSWERS[verb][line] in " ".join(said.split()), line
        if said.startswith("error: "):
            assert code == 2, line
            assert said.count("\n") == 1, said
        else:
            assert code == 0, line


def test_a_wrong_flag_takes_little_more_than_importing_tyro() -> None:
    """The best of some tries each, in turn, so that a busy machine is busy for both."""
    commands = {
        "tyro": ["-c", "import tyro"],
        "train": ["-m", "moe_emergence.train", "--top-k", "9"],
    }
    best = dict.fromkeys(commands, float("inf"))
    for _ in range(4):
        for name, arguments in commands.items():
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments],
                env=command_environment(),
                capture_output=True,
                timeout=300,
                check=False,
            )
            best[name] = min(best[name], time.perf_counter() - started)
    assert best["train"] < 5 * best["tyro"], best
