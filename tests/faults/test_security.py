"""What is promised in SECURITY.md of files, terminals, tables, Markdown and run folders."""

import ast
import csv
import getpass
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import rich.table
import rich.text
import small_models
import torch
from conftest import REPOSITORY, flags_of, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_emergence import train
from moe_emergence.analysis.gallery import write_gallery
from moe_emergence.analysis.loading import Placement
from moe_emergence.analysis.routing_record import read_routing
from moe_emergence.analysis.sources import open_source
from moe_emergence.analysis.tidy import write_tables
from moe_emergence.analysis.token_routing import print_routing
from moe_emergence.config import SHIPPED, RunConfig
from moe_emergence.csv_cells import csv_of, guarded, read_csv, unguarded
from moe_emergence.data import prepare_data
from moe_emergence.data.prepared import save_prepared
from moe_emergence.errors import RunError, exit_code
from moe_emergence.models.loading import load_trained_model
from moe_emergence.moe.tuning import load_table
from moe_emergence.printable import inert, printable
from moe_emergence.run_folder import RunFolder, read_json, write_json
from moe_emergence.terminal import Console
from moe_emergence.training.checkpoint import MANIFEST, TRAINER_STATE, load_checkpoint
from moe_emergence.training.frozen_states import _read as read_frozen_states

# ---- nothing that is read is executed

FORBIDDEN = re.compile(
    r"(pickle|marshal|shelve|dill|cloudpickle|joblib)\.(loads?|open|Unpickler)|yaml\.(unsafe_)?load"
    r"|(pd|pandas)\.read_pickle|torch\.hub\.load|os\.(system|popen)|eval|exec|__import__"
)
NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def offences(source: str) -> Iterator[str]:
    """Calls that unpickle, evaluate or start a shell, or do not say that they do not."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given_as = {
            k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
        }
        word, value = NEEDED.get(name, (None, None))
        if FORBIDDEN.fullmatch(name) or (word is not None and given_as.get(word) is not value):
            yield f"{node.lineno}: {name}"
        if given_as.get("trust_remote_code") or given_as.get("shell"):
            yield f"{node.lineno}: {name} runs what it is given"


@pytest.mark.parametrize("folder", ["moe_emergence", "kernels"])
def test_no_source_unpickles_or_evaluates(folder: str) -> None:
    found = {
        str(path): list(offences(path.read_text(encoding="utf-8")))
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    assert len(found) > 10
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)", "pickle.loads(b)",
        "np.load(f, allow_pickle=True)", "pd.read_pickle(f)", "eval(text)", "yaml.load(f)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)", "subprocess.run(t, shell=True)",
    ],
)  # fmt: skip
def test_the_audit_sees(line: str) -> None:
    assert list(offences(line))


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.mark,)


def poisons(mark: Path) -> dict[str, bytes]:
    """Files that make `mark` when they are unpickled, each in another container."""
    in_zip, in_array, in_arrays = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"a": Evil(mark)}, in_zip)
    array = np.array([Evil(mark)], dtype=object)
    np.save(in_array, array, allow_pickle=True)
    np.savez(in_arrays, **dict.fromkeys(["experts", "probs", "layers", "a"], array))
    return {
        "pickle": pickle.dumps(Evil(mark), protocol=2), "zip": in_zip.getvalue(),
        "npy": in_array.getvalue(), "npz": in_arrays.getvalue(),
    }  # fmt: skip


def test_the_poison_works(tmp_path: Path) -> None:
    """Else a test that sees no mark would see nothing."""
    for name, poison in poisons(tmp_path / "mark").items():
        (tmp_path / name).write_bytes(poison)
        with suppress(TypeError, AttributeError):  # of what mkdir gave
            if name == "pickle":
                pickle.loads(poison)
            elif name == "zip":
                torch.load(tmp_path / name, weights_only=False)
            elif name == "npy":
                np.load(tmp_path / name, allow_pickle=True)
            else:
                np.load(tmp_path / name, allow_pickle=True)["a"]
        (tmp_path / "mark").rmdir()


def never_unpickled(folder: Path, tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Every file of `folder` in turn is each poison; `read` may fail, and may not run it."""
    mark = tmp_path / "mark"
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        kept = file.read_bytes()
        for poison in poisons(mark).values():
            file.write_bytes(poison)
            with suppress(Exception):
                read(folder)
            assert not mark.exists(), file
        file.write_bytes(kept)
    read(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> RunFolder:
    """A run of a user whose home, name and tokens are easy to find, started from the home."""
    home = tmp_path_factory.mktemp("zqxhome")
    config = private_config(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name in ("USER", "LOGNAME", "HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"):
            patch.setenv(name, f"zqx{name}")
        patch.setenv("HOME", str(home))
        patch.setattr("sys.argv", [str(home / "bin" / "moe-emergence"), *flags_of(config)])
        assert getpass.getuser() == "zqxLOGNAME"
        assert train.main(flags_of(config)) == 0
    return RunFolder(home / "runs" / "tiny")


def private_config(home: Path) -> RunConfig:
    rng = random.Random(0)
    (home / "data").mkdir()
    for domain in SHIPPED:
        words = [f"{domain}{i}" for i in range(30)]
        rows = [json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(40)]
        (home / "data" / f"{domain}.jsonl").write_text("\n".join(rows))
    config = tiny(Path("data"), Path("cache"), Path())
    object.__setattr__(config.monitor, "track", "tensorboard")
    return config


def test_a_run_folder_holds_no_name_token_or_home(run: RunFolder) -> None:
    files = [path for path in run.root.rglob("*") if path.is_file()]
    assert {"environment.json", "config.json", "data_manifest.json", "trainer.pt"} <= {
        path.name for path in files
    }
    assert any(path.name.startswith("events.") for path in files)
    assert [str(path) for path in files if b"zqx" in path.read_bytes()] == []


def test_a_model_folder_is_never_unpickled(run: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run.final_model, folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"")  # what a Trainer leaves there, and nobody reads
    never_unpickled(folder, tmp_path, lambda f: open_source(str(f), "one", Placement()))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_weights_that_are_pickles_only_are_refused(name: str, tmp_path: Path) -> None:
    folder, mark = tmp_path / "base", tmp_path / "mark"
    small_models.make_dense().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "part.bin"}}
    for poison in list(poisons(mark).values())[:2]:
        is_index = name.endswith("json")
        (folder / name).write_bytes(json.dumps(index).encode() if is_index else poison)
        (folder / "part.bin").write_bytes(poison)
        with pytest.raises(ValueError, match="a pickle of more than tensors, which could run"):
            load_trained_model(folder)
        with pytest.raises(ValueError, match=r"^SOURCE .* a pickle of more than tensors"):
            open_source(str(folder), "one", Placement())
        assert not mark.exists()


def test_a_checkpoint_is_never_unpickled(run: RunFolder, tmp_path: Path) -> None:
    """Not even one whose hashes are those of the poison."""
    mark, folder = tmp_path / "mark", tmp_path / "step-000006"
    shutil.copytree(run.checkpoint(6), folder)
    for poison in poisons(mark).values():
        (folder / TRAINER_STATE).write_bytes(poison)
        manifest = read_json(folder / MANIFEST)
        manifest["files"][TRAINER_STATE] = hashlib.sha256(poison).hexdigest()
        write_json(folder / MANIFEST, manifest)
        with pytest.raises((ValueError, RunError)):
            load_checkpoint(folder)
        assert not mark.exists()


def test_a_run_folder_is_never_unpickled(run: RunFolder, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    left = shutil.ignore_patterns("checkpoints", "dense-base", "best-model", "tensorboard")
    shutil.copytree(run.root, folder, ignore=left)
    for file in (folder / "final-model").iterdir():  # has its own test
        if file.name not in ("config.json", "model.safetensors", "tokenizer.json"):
            file.unlink()
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        os.rename(folder / "final-model" / name, tmp_path / name)
    (folder / "final-model").rmdir()
    shutil.copytree(run.final_model, tmp_path / "kept")
    mark = tmp_path / "mark"

    def read(place: Path) -> None:
        shutil.copytree(tmp_path / "kept", place / "final-model", dirs_exist_ok=True)
        try:
            open_source(str(place), "one", Placement())
        finally:
            shutil.rmtree(place / "final-model")

    never_unpickled(folder, tmp_path, read)
    assert not mark.exists()


def test_texts_are_never_unpickled(tmp_path: Path, run: RunFolder) -> None:
    rows = [{"text": f"some words {n} and " * 20} for n in range(40)]
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(str(saved))
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows).to_parquet(plain / "b.parquet")
    (plain / "c").mkdir()
    for name in "123":
        (plain / "c" / f"{name}.txt").write_text(f"words and {name} " * 300)
    config = tiny(saved, tmp_path / "cache", tmp_path).data
    for folder in (saved, plain):
        object.__setattr__(config, "data", str(folder))
        object.__setattr__(config, "domains", ())
        object.__setattr__(config, "token_types", ())
        never_unpickled(folder, tmp_path, lambda _: prepare_data(config, 0))


def test_prepared_blocks_are_never_unpickled(tmp_path: Path, data_folder: Path) -> None:
    config = tiny(data_folder, tmp_path / "cache", tmp_path).data
    folder = tmp_path / "prepared"
    save_prepared(prepare_data(config, 0), folder)
    object.__setattr__(config, "data", str(folder))
    never_unpickled(folder, tmp_path, lambda _: prepare_data(config, 0))


@pytest.mark.parametrize("kind", ["pickle", "zip", "npy", "npz"])
def test_arrays_and_tuning_tables_are_never_unpickled(kind: str, tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "file.npz"
    file.write_bytes(poisons(mark)[kind])
    for read in (read_routing, read_frozen_states):
        with pytest.raises((ValueError, RunError)):
            read(file)
    assert load_table(file).entries == {}
    assert not mark.exists()


# ---- terminals

texts = st.text(st.characters(codec="utf-8"), max_size=40)
ALLOWED = re.compile(r"[\t\n\x20-\x7e\xa0-\U0010ffff]*")
OBEYED = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\x08[red]x[/red]:smile:"


@given(texts)
def test_printable_text_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert ALLOWED.fullmatch(shown)
    assert len(shown) == len(text)
    assert printable(shown) == shown
    assert text != shown or ALLOWED.fullmatch(text)


@given(st.one_of(texts, st.just(OBEYED)))
def test_a_console_obeys_no_text(text: str) -> None:
    file = io.StringIO()
    console = Console(file=file, width=200)
    table = rich.table.Table(text, title=text)
    table.add_row(text)
    console.print(text, soft_wrap=True)
    console.print(rich.text.Text(text), table)
    assert ALLOWED.fullmatch(file.getvalue())


def test_markup_and_emoji_codes_of_others_are_text() -> None:
    file = io.StringIO()
    table = rich.table.Table()
    table.add_row(OBEYED)
    Console(file=file, width=200).print(OBEYED, table)
    assert file.getvalue().count("[red]x[/red]:smile:") == 2


def test_every_console_is_ours() -> None:
    """Those of rich are named in annotations only."""
    for path in (REPOSITORY / "moe_emergence").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "terminal.py" and re.search(
            r"from rich.console import .*\bConsole\b", text
        ):
            assert "Console(" not in text, path


def test_tokens_that_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    model, file = small_models.make_model(), io.StringIO()
    tokenizer: Any = SimpleNamespace(decode=lambda ids: OBEYED)
    console = Console(file=file, force_terminal=True, width=200, color_system="truecolor")
    print_routing(console, model, tokenizer, small_models.ids(1, 3))
    styles = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())
    assert ALLOWED.fullmatch(styles)
    assert "[red]x[/red]" in styles


def test_an_error_line_obeys_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: list[str]) -> int:
        raise ValueError(f"{argv[0]}: no such thing")

    assert exit_code(fail, [OBEYED]) == 2
    assert ALLOWED.fullmatch(capsys.readouterr().err)


# ---- tables

cells = st.one_of(
    texts,
    st.tuples(st.sampled_from(["=", "+", "-", "@", "\t", "\r", "\n", "'=", "''-", "'"]), texts).map(
        "".join
    ),
)


@given(cells)
def test_a_cell_begins_no_formula_and_is_read_back(text: str) -> None:
    assert unguarded(guarded(text)) == text
    assert guarded(text)[:1] not in set("=+-@\t\r\n")
    if text[:1] not in set("'=+-@\t\r\n"):
        assert guarded(text) == text


@settings(max_examples=40)
@given(st.lists(st.tuples(cells, st.floats(-9, 9), st.integers(-9, 9)), min_size=1, max_size=5))
def test_a_table_is_read_back_and_numbers_stay_numbers(rows: list[tuple[str, float, int]]) -> None:
    table = pd.DataFrame(rows, columns=["=token", "share", "count"])
    text = csv_of(table)
    read = list(csv.reader(io.StringIO(text, newline="")))
    assert read[0] == ["'=token", "share", "count"]
    for (token, share, count), cell in zip(rows, read[1:], strict=True):
        assert (unguarded(cell[0]), float(cell[1]), int(cell[2])) == (token, share, count)
        assert cell[0][:1] not in set("=+-@\t\r\n")


def test_tables_of_an_analysis_and_of_a_suite(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"token": ["=HYPERLINK(1)", "'=", "plain"], "kind": pd.Categorical(["-a", "b", "-a"]),
         "share": [-0.5, 0.25, float("nan")], "on": [True, False, True]}
    )  # fmt: skip
    write_tables(tmp_path, {"tokens": table})
    file = tmp_path / "tables" / "tokens.csv"
    assert file.read_text().splitlines()[1:] == [
        "'=HYPERLINK(1),'-a,-0.5,True", "''=,b,0.25,False", "plain,'-a,,True"
    ]  # fmt: skip
    read = read_csv(file)
    assert list(read["token"]) == list(table["token"])
    assert list(read["kind"]) == list(table["kind"])
    pd.testing.assert_series_equal(read["share"], table["share"])
    assert list(pd.read_parquet(file.with_suffix(".parquet"))["token"]) == list(table["token"])


# ---- Markdown


@given(st.lists(st.sampled_from(["<img onerror=a>", "</p>", "<!--", "<0.001", "a", "\x1b[1m"])))
def test_markdown_has_no_tags_of_others(parts: list[str]) -> None:
    shown = inert(" ".join(parts))
    assert not re.search(r"<[A-Za-z/!?]", shown)
    assert "\x1b" not in shown
    assert shown.count("<0.001") == parts.count("<0.001")


def test_a_gallery_keeps_the_command_of_a_run_in_its_place(tmp_path: Path) -> None:
    """A run folder of somebody else says by what command it was made."""
    hostile = "python ` [x](javascript:a)\n\n# <script>b</script>"
    run = {"name": "a`b", "made_by": hostile}
    about = {"runs": [run], "tokens": 3, "data": "<b>", "command": "c"}
    write_json(tmp_path / "analysis.json", about)
    text = write_gallery(tmp_path, tmp_path / "page.md").read_text()
    assert "\n# <" not in text
    assert "<script" not in text
    (line,) = [one for one in text.splitlines() if "javascript" in one]
    assert line.count("`") == 4
