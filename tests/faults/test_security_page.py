"""report.html takes no text of documents, and no name, for markup: parsed, and in Chromium."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from analysis_folders import write_analysis

from moe_emergence.analysis.report import write_report
from moe_emergence.analysis.tidy import read_tables, write_tables

pytestmark = pytest.mark.slow

HOSTILE = (
    '</script></textarea></title></style>--><img src=x onerror="document.title=1">'
    "<svg onload=probe()>"
    "<a href='javascript:document.title=2'>a</a>\"'` {{ 7*7 }} <b>bold</b> &lt;"
)
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def hostile(value: Any, domains: list[str]) -> Any:
    """Every text in it that is not a word of ours gets the hostile one behind it."""
    if isinstance(value, dict):
        return {key: hostile(one, domains) for key, one in value.items()}
    if isinstance(value, list):
        return [hostile(one, domains) for one in value]
    changes = isinstance(value, str) and (value in domains or value.startswith(("run-", "<script")))
    return f"{value}{HOSTILE}" if changes else value


def write_hostile(folder: Path) -> Path:
    """An analysis folder whose runs, domains, tokens, passages and figures are named hostilely."""
    write_analysis(folder)
    domains = ["code", "math", "prose"]
    for name in ("analysis.json", "explorer.json"):
        values = json.loads((folder / name).read_text())
        values = {key: hostile(one, domains) for key, one in values.items()}
        if name == "analysis.json":
            values |= {"command": HOSTILE, "data": HOSTILE}
            values["read"] = {f"{key}{HOSTILE}": one for key, one in values.get("read", {}).items()}
            for run in values["runs"]:
                run |= {"source": HOSTILE, "made_by": HOSTILE, "model_type": HOSTILE}
                by = run.get("lm_loss_by_domain") or {}
                run["lm_loss_by_domain"] = {f"{key}{HOSTILE}": one for key, one in by.items()}
            for one in values["read"].values():
                one |= {"samples": [HOSTILE], "warning": HOSTILE}
        else:
            for text in (text for run in values["runs"] for text in run["texts"]):
                text["tokens"] = [f"{HOSTILE}{place}" for place in range(len(text["tokens"]))]
        (folder / name).write_text(json.dumps(values))
    tables = {}
    for name, table in read_tables(folder).items():
        changed = table.copy()
        for column in table.select_dtypes(exclude="number"):
            if column in ("run", "domain", "token", "text"):
                changed[column] = table[column].map(lambda text: hostile(text, domains))
            if column in ("token", "text"):
                changed[column] = table[column].astype(str) + HOSTILE
        tables[name] = pd.DataFrame(changed)
    write_tables(folder, tables)
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "a\"><img src=x onerror='document.title=3'>.png").write_bytes(b"")
    return write_report(folder)


class Elements(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.handlers: list[str] = []
        self.links: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hostile(tmp_path_factory.mktemp("hostile"))


def test_the_page_has_the_elements_of_a_harmless_one(page: Path, tmp_path: Path) -> None:
    found, harmless = Elements(page), Elements(write_report(write_analysis(tmp_path)))
    assert found.handlers == harmless.handlers == []
    for tag in ("script", "style", "svg", "b", "title", "textarea"):
        assert found.tags[tag] == harmless.tags[tag], tag
    assert not [link for link in found.links if link.startswith(("javascript:", "data:", "http"))]
    assert "7*7" in page.read_text(encoding="utf-8")
    assert "{{ 49" not in page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    found = next((path for path in map(shutil.which, CHROMIUM) if path), None)
    with playwright.sync_playwright() as driver:
        try:
            started = driver.chromium.launch(
                executable_path=found, args=["--no-sandbox", "--disable-gpu", "--no-first-run"]
            )
        except playwright.Error as error:
            pytest.skip(f"no Chromium to look at the page with ({str(error).splitlines()[0]})")
        yield started
        started.close()


def test_in_a_browser_nothing_of_it_acts(browser: Any, page: Path) -> None:
    """All charts drawn, all choices of every list made: no element of theirs is there."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: wrong.append(request.url))
    opened.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    opened.goto(page.as_uri(), wait_until="commit")
    ready = "document.documentElement.dataset.ready === 'true'"
    opened.wait_for_function(ready, timeout=20_000)
    title = opened.title()
    for choice in opened.query_selector_all("select"):
        for place in range(len(choice.query_selector_all("option"))):
            choice.evaluate(
                "(e, i) => { e.selectedIndex = i; e.dispatchEvent(new Event('change')); }", place
            )
    opened.wait_for_timeout(300)
    assert opened.title() == title
    probes = "img[onerror], svg[onload], a[href^='javascript']"
    assert opened.eval_on_selector_all(probes, "all => all.map((e) => e.outerHTML)") == []
    shown = opened.inner_text("body") + "".join(opened.locator("svg text").all_text_contents())
    assert "<img src=x" in shown
    assert not [
        one for one in wrong if not one.startswith(("blob:", "data:", page.parent.as_uri()))
    ]
    context.close()
