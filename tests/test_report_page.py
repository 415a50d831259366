"""report.html without a browser: structure, words, escaping, size."""

import base64
import gzip
import html
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from analysis_folders import HOSTILE, write_analysis

from moe_emergence.analysis.report import print_findings, write_report

pytestmark = pytest.mark.slow


def payload(page: str) -> dict[str, object]:
    packed = re.search(r'id="payload-gz">([^<]+)<', page)
    assert packed
    values: dict[str, object] = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    return values


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(write_analysis(tmp_path_factory.mktemp("a"))).read_text(encoding="utf-8")


def test_page_holds_everything_and_loads_nothing(page: str) -> None:
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    assert '<link rel="stylesheet"' not in page
    assert len(page.encode()) < 5_000_000
    data = payload(page)
    heatmaps = {"expert_domain", "expert_token_type", "knockout", "similarity"}
    assert set(data["heatmaps"]) == heatmaps  # type: ignore[call-overload]
    curves = {"loss", "churn", "trajectory", "largest"}
    assert set(data["curves"]) == curves  # type: ignore[call-overload]


def test_text_of_documents_and_names_is_escaped(page: str) -> None:
    assert HOSTILE not in page
    assert "run-0 &lt;b&gt;&amp;" in page
    assert page.count("<script") == 3  # Plotly, the numbers, the page's own


def test_text_that_was_read_is_shown_with_its_warning(page: str) -> None:
    assert page.index("What was read") < page.index('<p class="warning">tables</p>')
    assert page.count('<pre class="sample"') == 2
    assert page.count('<p class="warning">') == 1


def test_summary_says_what_is_shown_and_what_is_not(page: str) -> None:
    assert "experts follow domains more than random routers do" in page
    assert "no more than random routers: no evidence of learned specialisation" in page
    assert "0.300 to 0.500" in page


def test_it_opens_with_the_sentence_that_the_terminal_gets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_report(write_analysis(tmp_path, runs=1))
    page = path.read_text(encoding="utf-8")
    opening = re.search(r'<h1 class="headline">([^<]+)</h1>', page)
    assert opening
    sentence = html.unescape(opening[1])
    assert sentence == (
        "The experts of layer 0 tell 0.40 of 1.58 bits of a token's domain; a random router's tell "
        "0.10 (p 0.01); those of layer 1 know the domain no better than a random router's would: "
        "0.40 of 1.58 bits, a random router's 0.30 (p 0.20)."
    )
    assert page.index('class="headline"') < page.index("Meet the experts") < page.index("<table")
    print_findings(tmp_path, path)
    printed = capsys.readouterr().out
    assert f"run-0 <b>&: {sentence}" in printed
    assert f"report: {path}" in printed
    assert "lm_loss 4.5000 nats per token over 100 tokens; training logged 4.0000" in printed
    assert "first 32 blocks of each domain (--eval-blocks)" in page
    first = next(line for line in printed.splitlines() if "space" in line)
    assert "90%" in first


def test_figures_are_linked(tmp_path: Path) -> None:
    folder = write_analysis(tmp_path)
    (folder / "figures").mkdir()
    for name in ("load.png", "load.svg", "trajectory.gif"):
        (folder / "figures" / name).touch()
    page = write_report(folder).read_text(encoding="utf-8")
    assert re.findall(r'href="figures/([^"]+)"', page) == ["load.png", "trajectory.gif"]


def test_one_domain_has_nothing_to_tell(tmp_path: Path) -> None:
    page = write_report(write_analysis(tmp_path, domains=["only <i>"])).read_text(encoding="utf-8")
    assert "All text is only &lt;i&gt;: of one domain there is nothing" in page


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    folder = write_analysis(tmp_path)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_missing_tables_leave_their_sections_out(tmp_path: Path) -> None:
    folder = write_analysis(tmp_path)
    for path in (folder / "tables").glob("*"):
        path.unlink()
    (folder / "explorer.json").unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    assert 'id="heat"' not in page
    assert 'id="ex-tokens"' not in page
    assert "no record of training" in page


def test_many_experts_stay_below_the_size(tmp_path: Path) -> None:
    folder = write_analysis(tmp_path, runs=3, layers=16, experts=64)
    assert write_report(folder).stat().st_size < 5_000_000


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    folder = write_analysis(tmp_path)
    (folder / "tables/routing.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"routing\.parquet"):
        write_report(folder)


def test_heatmaps_are_the_tables(page: str, tmp_path: Path) -> None:
    table = pd.read_parquet(write_analysis(tmp_path) / "tables/similarity.parquet")
    views = payload(page)["heatmaps"]["similarity"]["views"]  # type: ignore[index,call-overload]
    view = next(v for v in views if v["layer"] == 1 and v["panel"] == "kind: outputs")
    own = table[(table["run"] == view["run"]) & (table["layer"] == 1)]
    own = own[own["kind"] == "outputs"].set_index(["expert", "other_expert"])["cosine"]
    for a, row in zip(view["rows"], view["z"], strict=True):
        for b, value in zip(view["columns"], row, strict=True):
            if a == b:  # always 1: it would take the whole scale
                assert value is None
                continue
            assert value == pytest.approx(own[int(a), int(b)], abs=1e-4)
