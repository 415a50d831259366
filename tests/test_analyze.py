"""`python -m moe_emergence.analyze` on runs, on Hugging Face mixtures, and misused."""

import csv
import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from routing_models import tiny_mixture
from warm_commands import run_warm

from moe_emergence.analysis.ablation import block_losses
from moe_emergence.analysis.documents import main_documents, spread, take
from moe_emergence.analysis.explorer import OWN_TEXTS, own_text
from moe_emergence.analysis.figures import FIGURES, write_figures
from moe_emergence.analysis.knockout import mean_losses
from moe_emergence.analysis.loading import Placement, load_model
from moe_emergence.analysis.modules import halves
from moe_emergence.analysis.report import write_report
from moe_emergence.analysis.settings import AnalyzeConfig
from moe_emergence.analysis.sources import Source, TextChoice, open_source, read_text
from moe_emergence.analysis.tidy import write_tables
from moe_emergence.analyze import main
from moe_emergence.analyze.describe import made_by, source_names
from moe_emergence.analyze.work import analyze, output_folder
from moe_emergence.config import SHIPPED, RunConfig
from moe_emergence.data import prepare_data
from moe_emergence.errors import RunError
from moe_emergence.run_folder import RunFolder, read_json
from moe_emergence.settings import from_dict
from moe_emergence.training.experiment import run_experiment

pytestmark = pytest.mark.slow

MADE_BY = {
    "train.py": "python -m moe_emergence.train --seed 3",
    "moe-emergence": "python -m moe_emergence --seed 3",
    "moe_emergence.py": "python -m moe_emergence --seed 3",
}
FEW = ("--permutations", "39", "--device", "cpu", "--max-tokens", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> RunFolder:
    """A toy mixture with three checkpoints, evaluated on all of its evaluation blocks."""
    data = request.getfixturevalue("data_folder")
    cache = request.getfixturevalue("cache_folder")
    return make_run(tmp_path_factory.mktemp("runs"), data, cache)


def make_run(where: Path, data: Path, cache: Path) -> RunFolder:
    from conftest import tiny

    config = tiny(data, cache, where)
    run_experiment(replace(config, monitor=replace(config.monitor, eval_blocks=0)))
    return RunFolder(where / "runs/tiny")


@pytest.fixture(scope="module")
def analysed(run: RunFolder, cache_folder: Path) -> Path:
    assert main([str(run.root), *FEW, "--cache-dir", str(cache_folder)]) == 0
    return run.root / "analysis"


def test_fractions_are_those_the_run_logged(run: RunFolder, analysed: Path) -> None:
    table = pd.read_csv(analysed / "tables/expert_domain.csv")
    own = table[table["slot"] == -1].set_index(["layer", "domain", "expert"])["fraction"]
    with run.expert_domain.open() as file:
        logged = list(csv.DictReader(file))
    assert len(logged) == len(own)
    for row in logged:
        found = own[int(row["layer"]), row["domain"], int(row["expert"])]
        assert found == pytest.approx(float(row["fraction"]), abs=1e-5)


def test_loss_is_the_one_the_run_logged(run: RunFolder, analysed: Path) -> None:
    table = pd.read_parquet(analysed / "tables/training.parquet")
    logged = table[table["metric"] == "eval/lm_loss"].sort_values("step")["value"].iloc[-1]
    (about,) = read_json(analysed / "analysis.json")["runs"]
    assert about["lm_loss"] == pytest.approx(logged, rel=1e-5)
    assert about["step"] == 6


def test_every_table_is_there_in_both_forms(analysed: Path) -> None:
    names = {path.stem for path in (analysed / "tables").glob("*.parquet")}
    assert names == {path.stem for path in (analysed / "tables").glob("*.csv")}
    expected = {figure.table for figure in FIGURES.values()} | {
        "vocabulary",
        "passages",
        "trajectory",
    }
    # one layer, one expert per token; no test was asked for
    assert names == expected - {"coactivation", "module_damage", "retention", "regret"}
    for path in (analysed / "tables").glob("*.parquet"):
        table = pd.read_parquet(path)
        assert table.columns[0] == "run"
        text = pd.read_csv(path.with_suffix(".csv"), keep_default_na=False)
        assert list(text.columns) == list(table.columns)
        assert len(text) == len(table)
    assert (analysed / "figures/trajectory.gif").is_file()
    assert (analysed / "report.html").is_file()


def test_experts_begin_at_the_dense_base_and_saturation_ends_at_one(analysed: Path) -> None:
    movement = pd.read_parquet(analysed / "tables/movement.parquet")
    assert set(movement["start"]) == {"dense base"}
    assert (movement["relative_distance"] > 0).all()
    saturation = pd.read_parquet(analysed / "tables/saturation.parquet")
    assert saturation.groupby("step")["share"].first().iloc[-1] == 1


def test_explorer_pieces_join_to_the_text(analysed: Path, run: RunFolder) -> None:
    _, tokenizer = load_model(str(run.final_model), Placement())
    (one,) = json.loads((analysed / "explorer.json").read_text())["runs"]
    assert {text["domain"] for text in one["texts"]} == set(SHIPPED)
    for text in one["texts"]:
        joined = "".join(text["tokens"])
        assert text["domain"] in joined
        assert tokenizer.decode(tokenizer(joined)["input_ids"]) == joined
        assert len(text["experts"][0]) == len(text["tokens"])


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "gpt_oss"])
def test_a_hugging_face_mixture_in_a_folder(
    family: str, run: RunFolder, data_folder: Path, cache_folder: Path, tmp_path: Path
) -> None:
    _, tokenizer = load_model(str(run.final_model), Placement())
    folder = tmp_path / family
    tiny_mixture(family).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = AnalyzeConfig(
        sources=(str(folder),), data=str(data_folder), block_size=16, permutations=19,
        knockout_tokens=200, cache_dir=str(cache_folder), max_tokens=600, device="cpu",
        test="modules", second_data=str(other_text(data_folder, tmp_path / "other")),
    )  # fmt: skip
    analyze(config, tmp_path / "out", "command")
    modules = pd.read_parquet(tmp_path / "out/tables/modules.parquet")
    assert list(modules["corpus"]) == ["second half"] * 3 + [str(tmp_path / "other")] * 3
    assert (modules["sets"] == 15).all()  # one of four experts in two layers
    # of blocks that are far apart no document is lost
    source = open_source(str(folder), family, Placement())
    text = read_text(
        source, TextChoice(str(data_folder), block_size=16, cache_dir=str(cache_folder))
    ).blocks
    found = modules[modules["corpus"] == "second half"].set_index("domain")["documents"]
    for domain, part in halves(text)[1].items():
        documents = main_documents(part, tokenizer.eos_token_id)
        assert found[domain] == len({*documents[spread(len(part), 200 // 3 // 16)]})
    load = pd.read_parquet(tmp_path / "out/tables/expert_load.parquet")
    assert set(load["layer"]) == {0, 1}
    assert set(load["slot"]) == {-1, 0, 1}
    assert set(pd.read_parquet(tmp_path / "out/tables/knockout.parquet")["how"]) == {"zeroed"}
    assert (tmp_path / "out/tables/coactivation.parquet").is_file()
    if family == "mixtral":  # what is drawn and written knows no family
        write_figures(tmp_path / "out")
        assert (tmp_path / "out/figures/modules.png").is_file()
        page = write_report(tmp_path / "out").read_text(encoding="utf-8")
        undecided = "not decided (15 other sets are too few). Without experts 0: "
        assert page.count(undecided) == 6
        assert page.count("with its best experts of each layer alone: 2 cost it ") == 3
        assert page.count("nats better than a draw") == 6  # two layers, three domains


def other_text(folder: Path, other: Path) -> Path:
    """A folder with the same words in other documents."""
    shutil.copytree(folder, other)
    for path in other.glob("*.jsonl"):
        texts = [json.loads(line)["text"].split() for line in path.read_text().splitlines()]
        lines = [json.dumps({"text": " ".join(reversed(words))}) for words in texts]
        path.write_text("\n".join(lines))
    return other


def test_a_run_is_read_on_its_own_evaluation_documents(
    run: RunFolder, cache_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """In shorter blocks too, and when --data names what it was trained on."""
    source = open_source(str(run.root), "run", Placement())
    assert source.config is not None
    own = prepare_data(source.config.data, source.config.seed).eval_blocks
    for data in (None, str(data_folder), f"{data_folder.parent}/./{data_folder.name}"):
        same = read_text(source, TextChoice(data, cache_dir=str(cache_folder))).blocks
        short = read_text(
            source, TextChoice(data, block_size=8, cache_dir=str(cache_folder))
        ).blocks
        for domain in SHIPPED:
            assert torch.equal(same[domain], own[domain])
            shared = min(short[domain].numel(), own[domain].numel())
            assert torch.equal(short[domain].flatten()[:shared], own[domain].flatten()[:shared])
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(run.root, copy.root, ignore=shutil.ignore_patterns("checkpoints"))
    manifest = read_json(copy.data_manifest)
    manifest["domains"]["math"]["eval"]["sha256"] = "other"
    copy.data_manifest.write_text(json.dumps(manifest))
    changed = open_source(str(copy.root), "run", Placement())
    with pytest.raises(ValueError, match=r"cannot be made again \(domains\.math\.eval\.sha256"):
        read_text(changed, TextChoice(cache_dir=str(cache_folder)))


def test_what_would_mislead_or_overwrite_is_refused(run: RunFolder, cache_folder: Path) -> None:
    flags = [*FEW, "--test", "modules", "--cache-dir", str(cache_folder)]
    with pytest.raises(ValueError, match=r"--second-data .* named on that text"):
        main([str(run.root), *flags, "--second-data", str(run_data(run))])
    with pytest.raises(ValueError, match=r"--keep-experts .* one SOURCE is cut at a time, not 2"):
        main([str(run.root), str(run.final_model), *flags, "--keep-experts", "code"])


def test_a_domains_experts_are_cut_out(run: RunFolder, cache_folder: Path, tmp_path: Path) -> None:
    flags = ["--test", "modules", "--keep-experts", "code", "math", "--keep", "2", "--out"]
    # a block of each domain, of which there are no halves: --max-tokens is not for this test
    flags += [str(tmp_path), *FEW[:-1], "48"]
    flags += ["--knockout-tokens", "400", "--cache-dir", str(cache_folder)]
    assert main([str(run.root), *flags]) == 0
    table = pd.read_parquet(tmp_path / "tables/retention.parquet")
    loss = table.set_index(["best_for", "kept", "on"])["lm_loss"]
    config = from_dict(RunConfig, read_json(run.config))
    blocks = prepare_data(config.data, config.seed).eval_blocks
    _, second = halves(blocks)
    for domain in ("code", "math"):
        model, _ = load_model(str(tmp_path / f"kept-{domain}"), Placement())
        assert model.config.num_experts == 2
        few = take(second, 400)
        losses = mean_losses(block_losses(model, few, 8), few)
        for on in SHIPPED:
            assert losses[on][0] == pytest.approx(loss[domain, 2, on], rel=1e-5)
    with pytest.raises(ValueError, match=r"--keep-experts .* give --test modules too"):
        main([str(run.root), *FEW, "--keep-experts", "code"])


def test_the_command_says_what_to_open(run: RunFolder, tmp_path: Path) -> None:
    flags = [*FEW, "--knockout-tokens", "0", "--out", str(tmp_path / "out")]
    flags += ["--data", str(run_data(run))]
    command = ("-m", "moe_emergence.analyze", str(run.root))
    done = run_warm(*command, *flags, where=tmp_path, logs=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert last == f"report: {tmp_path}/out/report.html"
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    opening = re.search(r'class="headline">([^<]+)<', page)
    assert opening
    assert html.unescape(opening[1]) in done.stdout
    assert "Experts of tiny" in done.stdout


def test_a_text_of_ones_own_is_explored(run: RunFolder, cache_folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.txt"
    own.write_text("the <b>expert</b> é\n" * 400, encoding="utf-8")
    source = open_source(str(run.root), "run", Placement())
    parts = own_text(own, source.tokenizer, 16)["mine.txt"]
    assert [len(part) for part in parts] == [16] * OWN_TEXTS
    flags = [*FEW, "--knockout-tokens", "0", "--out", str(tmp_path / "out"), "--text", str(own)]
    assert main([str(run.root), *flags, "--cache-dir", str(cache_folder)]) == 0
    (one,) = json.loads((tmp_path / "out/explorer.json").read_text())["runs"]
    texts = [text for text in one["texts"] if text["domain"] == "mine.txt"]
    assert [text["title"] for text in texts] == [f"mine.txt {n + 1}" for n in range(OWN_TEXTS)]
    assert own.read_text(encoding="utf-8").startswith("".join(texts[0]["tokens"]))
    (tmp_path / "none.txt").write_bytes(b"\xff")
    (tmp_path / "empty.txt").touch()
    for name, message in (("none", "cannot be read as UTF-8"), ("empty", "it has no text")):
        with pytest.raises(ValueError, match=rf"--text .*{name}.txt.*{message}"):
            own_text(tmp_path / f"{name}.txt", source.tokenizer, 16)


def test_several_runs_are_compared(run: RunFolder, cache_folder: Path, tmp_path: Path) -> None:
    sources = (str(run.root), str(run.final_model))
    config = AnalyzeConfig(
        sources=sources, permutations=19, knockout_tokens=0, device="cpu", max_tokens=300,
        cache_dir=str(cache_folder), data=str(run_data(run)),
    )  # fmt: skip
    analyze(config, tmp_path, "command")
    table = pd.read_parquet(tmp_path / "tables/expert_domain.parquet")
    names = source_names(sources)
    assert list(dict.fromkeys(table["run"])) == names
    one, other = (table[table["run"] == name]["tokens"].sum() for name in names)
    assert one == other
    assert not (tmp_path / "tables/knockout.parquet").exists()


def run_data(run: RunFolder) -> Path:
    return Path(read_json(run.config)["data"]["data"])


def test_names_of_sources_differ() -> None:
    assert source_names(("runs/a", "runs/b")) == ["a", "b"]
    assert source_names(("x/moe/seed-0", "x/no-lb/seed-0")) == ["moe/seed-0", "no-lb/seed-0"]
    assert source_names(("a", "a")) == ["a (1)", "a (2)"]
    assert output_folder(AnalyzeConfig(sources=("org/model",))) == Path("runs/analysis/model")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "SOURCE"),
        (["runs/none", "--permutations", "3"], "--permutations 3"),
        (["--max-tokens", "-1", "x"], "--max-tokens -1"),
        (["--device", "tpu", "x"], "--device tpu"),
        (["--block-size", "1", "x"], "--block-size 1"),
    ],
)
def test_bad_flags_name_themselves(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(argv)


def test_a_folder_that_is_neither_run_nor_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SOURCE .* neither a run folder nor a model folder"):
        main([str(tmp_path)])


def test_a_dense_run_is_refused(run: RunFolder, cache_folder: Path) -> None:
    with pytest.raises(ValueError, match="no routers that can be read"):
        main([str(run.root / "dense-base"), "--cache-dir", str(cache_folder)])


def test_a_full_disk_leaves_no_half_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame({"run": ["a"], "layer": [1]})
    write_tables(tmp_path, {"load": table})
    before = (tmp_path / "tables/load.parquet").read_bytes()

    def full(self: pd.DataFrame, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(RunError, match=r"cannot write .*load\.parquet: No space left"):
        write_tables(tmp_path, {"load": table.assign(layer=2)})
    assert (tmp_path / "tables/load.parquet").read_bytes() == before
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {"load.parquet", "load.csv"}


@pytest.mark.parametrize("program", MADE_BY)
def test_the_command_of_a_run_can_be_typed_again(program: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.environment.write_text(json.dumps({"command": [program, "--seed", "3"]}))
    assert made_by(Source("", "", "run", None, None, run)) == MADE_BY[program]
