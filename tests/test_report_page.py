"""report.html without a browser: structure, words, escaping, size."""

import base64
import gzip
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from analysis_folders import HOSTILE, write_analysis

from moe_emergence.analysis.report import write_report

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
    assert set(data["heatmaps"]) == {"expert_domain", "similarity"}  # type: ignore[call-overload]
    assert set(data["curves"]) == {"loss", "largest"}  # type: ignore[call-overload]


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
            assert value == pytest.approx(own[int(a), int(b)], abs=1e-4)
