"""Every command and Python block in README and docs works, shortened, from another folder."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ACCELERATE, REPOSITORY, TORCHRUN
from transformers import GPT2Config, GPT2LMHeadModel, OlmoeConfig, OlmoeForCausalLM

import make_hub_package
from moe_emergence.analysis.figures import FIGURES
from moe_emergence.command import parse
from moe_emergence.config import RunConfig
from moe_emergence.errors import exit_code
from moe_emergence.experiments.suite_file import built_in
from moe_emergence.presets import get_preset
from moe_emergence.suite import verbs
from moe_emergence.train import preset_name
from moe_emergence.training.experiment import run_experiment

pytestmark = pytest.mark.slow

TASKS = [REPOSITORY / "docs" / f"{name}.md" for name in ("train", "look", "use", "reproduce")]
DOCUMENTS = [REPOSITORY / "README.md", *TASKS]
DOCUMENTS += [path for path in sorted((REPOSITORY / "docs").glob("*.md")) if path not in TASKS]
DOCUMENTS += [REPOSITORY / "docs" / "experiments" / "README.md", REPOSITORY / "CONTRIBUTING.md"]

# what a test cannot run: installers and this test suite itself, servers, hooks
NOT_RUN = ("pip install", "pytest", "tensorboard ", "pre-commit ", "bash ", "git ")
NOT_RUN += ("python -m benchmarks.",)

TINY = [
    *("--n-layer", "2", "--n-embd", "16", "--n-head", "2", "--moe-layers", "1", "--device", "cpu"),
    *("--base", "scratch", "--tokenizer", "train", "--vocab-size", "300", "--block-size", "16"),
    *("--max-steps", "3", "--pretrain-steps", "1", "--batch-size", "2", "--eval-blocks", "2"),
]


@dataclass(frozen=True)
class Shown:
    """A command as a document shows it."""

    document: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def shown_commands() -> list[Shown]:
    found = []
    for document in DOCUMENTS:
        blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", document.read_text("utf-8"), re.S)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            commands = (part.strip() for part in line.split("&&"))
            found += [Shown(document.name, c) for c in commands if c and not c.startswith("#")]
    return found


def runnable() -> list[Shown]:
    commands = [c for c in shown_commands() if not c.text.startswith(NOT_RUN)]
    return list({c.text: c for c in commands}.values())


def tiny_train(words: list[str], data: Path, cache: Path) -> list[str]:
    """The words after `moe_emergence.train`, at toy size on test data."""
    flags = [*words, "--data", str(data), "--cache-dir", str(cache), *TINY]
    if "--stop-after" in words:
        flags += ["--stop-after", "2"]
    return flags


def tiny_verify(words: list[str]) -> list[str]:
    """The words after `moe_emergence.verify`, in one arithmetic, with one activation or family."""
    if "--implementation" in words:
        words = [*words, "--family", "mixtral"]
    return [*words, "--dtype", "fp32", "--activation", "swiglu", "--cases", "1", "--device", "cpu"]


def after_module(words: list[str]) -> list[str]:
    return words[words.index("moe_emergence.train") + 1 :]


def test_readme_has_exactly_the_two_set_up_commands() -> None:
    text = (REPOSITORY / "README.md").read_text("utf-8")
    install = "pip install -e '.[test]' -c moe_emergence/constraints.txt"
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("pip install")]
    assert lines == [
        f"{install} && python -m moe_emergence.train --dispatch fused",
        f"{install} && pytest",
    ]


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    kinds = ("python -m moe_emergence.", "moe-emergence ", "accelerate launch ", "torchrun ")
    assert runnable()
    for command in runnable():
        assert command.text.startswith(kinds), command


def test_commands_work_one_after_another(
    data_folder: Path,
    cache_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the order of the documents, in one folder, as a reader would.

    Entry points are called, which saves importing everything for each; that they start as modules
    of their own is tested in test_packaging.py, and launchers in test_training_distributed.py. All
    figures but one are left to test_analyze.py.
    """
    for name in [*FIGURES][1:]:
        monkeypatch.delitem(FIGURES, name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for shown in runnable():
        words = shown.words
        if words[0] == "moe-emergence":
            words = ["python", "-m", f"moe_emergence.{words[1]}", *words[2:]]
        if words[0] in ("accelerate", "torchrun"):
            flags = after_module(words)
            parse(RunConfig, flags, "train", default=get_preset(preset_name(flags)))
            launcher = tuple(words[: words.index("-m")])
            several = {"--multi_gpu", "--nnodes"} & set(words)
            assert several or launcher in (ACCELERATE, TORCHRUN), shown
            continue
        if "moe_emergence.suite" in words:
            # what it takes an hour to do is done at toy size by test_suite_execute.py
            options = verbs.options_of(words[words.index("moe_emergence.suite") + 1 :])
            assert options.suite in built_in()
            continue
        if "moe_emergence.train" in words:
            place = words.index("moe_emergence.train") + 1
            words = [*words[:place], *tiny_train(words[place:], data_folder, cache_folder)]
        if "moe_emergence.analyze" in words:
            words = [*words, "--max-tokens", "3000"]
        if "moe_emergence.verify" in words:
            words = tiny_verify(words)
        assert words[:2] == ["python", "-m"], shown
        entry = importlib.import_module(words[2])
        assert exit_code(entry.main, words[3:]) == 0, shown


def small_models(folder: Path) -> None:
    """Tiny models under the names that the documents load from the hub or from a run."""
    torch.manual_seed(0)
    gpt2 = GPT2Config(n_layer=12, n_embd=8, n_head=2, vocab_size=300, n_positions=64)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    width = {"hidden_size": 8, "intermediate_size": 16, "vocab_size": 300}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    olmoe = OlmoeConfig(**width, **heads, num_experts=4, num_experts_per_tok=2)
    OlmoeForCausalLM(olmoe).save_pretrained(folder / "allenai" / "OLMoE-1B-7B-0924")


def python_blocks() -> list[tuple[Path, list[str]]]:
    blocks = [
        (d, re.findall(r"```python\n(.*?)```", d.read_text("utf-8"), re.S)) for d in DOCUMENTS
    ]
    return [(document, found) for document, found in blocks if found]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the blocks read, in which they are run."""
    small_models(tmp_path)
    (tmp_path / "docs").symlink_to(REPOSITORY / "docs", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run(tiny_config: RunConfig, reader: Path) -> None:
    """Those of a page one after another, in one namespace."""
    run_experiment(replace(tiny_config, run_name="demo", output_dir=str(reader / "runs")))
    make_hub_package.make(reader / "FOLDER", "owner/emergence-kernels")
    for document, blocks in python_blocks():
        namespace: dict[str, object] = {"__name__": document.name}
        for block in blocks:
            exec(compile(block, str(document), "exec"), namespace)


def test_benchmark_commands_have_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """They are run, at toy size, by the tests of the benchmarks."""
    shown = [c for c in shown_commands() if c.text.startswith("python -m benchmarks.")]
    assert shown
    for command in shown:
        name, verb = command.words[2], []
        if (REPOSITORY / name.replace(".", "/")).is_dir():
            name, verb = f"{name}.__main__", command.words[3:4]
        with pytest.raises(SystemExit) as done:
            importlib.import_module(name).main([*verb, "--help"])
        assert done.value.code == 0
        known = capsys.readouterr().out
        for flag in (word for word in command.words[3:] if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", known), command


def in_a_clone(path: Path) -> bool:
    """Whether others get `path` too: it exists, and Git does not ignore it."""
    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        return path.exists()
    # another user may own the checkout, as in a container
    git = ("git", "-c", f"safe.directory={REPOSITORY}", "ls-files", "--cached", "--others")
    command = [*git, "--exclude-standard", "--", str(path)]
    found = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return path.exists() and bool(found.stdout)


def test_links_between_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text("utf-8")):
            if not target.startswith(("http:", "https:")):
                assert in_a_clone(document.parent / target), (document.name, target)


@pytest.mark.skipif(sys.platform == "win32", reason="paths below are POSIX")
def test_documents_name_files_that_exist() -> None:
    """Paths in backticks under the source folders are real."""
    pattern = r"`((?:moe_emergence|kernels|tests|docs|benchmarks)/[\w./-]+\.\w+)`"
    for document in DOCUMENTS:
        for path in re.findall(pattern, document.read_text("utf-8")):
            assert (REPOSITORY / path).exists(), (document.name, path)
