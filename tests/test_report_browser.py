"""report.html in headless Chromium: what is seen, pressed and walked through with keys."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from analysis_folders import HOSTILE, write_analysis

from moe_emergence.analysis.report import write_report

pytestmark = pytest.mark.slow

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"no Chromium to look at the page with ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_analysis(tmp_path_factory.mktemp("a"), runs=2, layers=3))


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    yield from opened(browser, report, width=1100)


def opened(browser: Any, report: Path, width: int, scheme: str = "light") -> Iterator[Any]:
    """The page when all is drawn; no request and no console message may have happened."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url))
    page.goto(report.as_uri(), wait_until="commit")
    page.wait_for_function("document.documentElement.dataset.ready === 'true'", timeout=20_000)
    yield page
    assert [entry for entry in wrong if not entry.startswith(("file:", "blob:", "data:"))] == []
    context.close()


def test_the_text_can_be_read_long_before_the_charts_are_drawn(page: Any) -> None:
    """In the page's own clock, as shares: seconds would be about what else the machine does."""
    names = page.evaluate("performance.getEntriesByType('mark').map((mark) => mark.name)")
    times = page.evaluate("performance.getEntriesByType('mark').map((mark) => mark.startTime)")
    at = dict(zip(names, times, strict=True))
    assert at["text"] < at["charts"] / 2


def test_charts_are_drawn_and_follow_the_controls(page: Any) -> None:
    assert page.locator("#heat .hm").count() >= 1
    assert page.locator("#curves .scatterlayer .trace").count() == 4
    page.locator("#heat-details summary").click()
    before = page.locator("#heat-table").inner_text()
    page.select_option("#heat-metric", "similarity")
    assert page.locator("#heat-table").inner_text() != before
    at_first = page.locator("#heat-table").inner_text()
    page.locator("#heat-layer").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#heat-layer-out").inner_text() == "1"
    assert page.locator("#heat-table").inner_text() != at_first
    page.select_option("#curve", "largest")
    assert page.locator("#curve-file").inner_text() == "tables/collapse.csv"


def test_hovering_a_heatmap_shows_its_value(page: Any) -> None:
    box = page.locator("#heat").bounding_box()
    page.locator("#heat").scroll_into_view_if_needed()
    page.locator("#heat").hover(position={"x": box["width"] / 2, "y": box["height"] / 2})
    page.wait_for_selector("#heat .hoverlayer .hovertext")
    assert "share of the domain" in page.locator("#heat .hoverlayer").text_content()


def test_slider_recolours_the_text(page: Any) -> None:
    experts = "Array.from(document.querySelectorAll('.tok'), (t) => t.dataset.expert).join()"
    before = page.evaluate(experts)
    page.locator("#ex-layer").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#ex-layer-out").inner_text() == "1"
    assert page.evaluate(experts) != before
    slot = page.evaluate(experts)
    page.select_option("#ex-slot", "1")
    assert page.evaluate(experts) != slot


def test_hover_and_keys_show_probabilities(page: Any) -> None:
    page.locator(".tok").nth(1).hover()
    shown = page.locator("#ex-info").inner_text()
    assert '" x"' in shown
    assert "70.0%" in shown
    assert "20.0%" in shown
    page.locator(".tok").first.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert "token 3," in page.locator("#ex-info").inner_text()
    page.keyboard.press("Enter")
    assert page.locator('#ex-legend button[aria-pressed="true"]').count() == 1


def test_pressing_an_expert_shows_where_it_fires(page: Any) -> None:
    expert = page.locator(".tok").first.get_attribute("data-expert")
    page.locator(f'#ex-legend button[data-expert="{expert}"]').click()
    assert 0 < page.locator(".tok.hit").count() < page.locator(".tok").count()
    assert f"top·of·{expert}" in page.locator("#ex-top").inner_text()
    page.locator(f'#ex-legend button[data-expert="{expert}"]').click()
    assert page.locator(".tok.dim").count() == 0


def test_hostile_text_is_shown_and_does_not_run(page: Any) -> None:
    assert page.locator(".tok").nth(2).inner_text() == HOSTILE
    assert page.title() != "run"


def test_names_are_shown_as_they_are_in_charts_and_tables(page: Any) -> None:
    assert page.locator("#curves .legendtext").first.text_content() == "run-0 <b>&, code"
    page.locator("#curve-details summary").click()
    assert "run-0 <b>&, all" in page.locator("#curve-table").inner_text()


def test_charts_fit_their_frames(page: Any) -> None:
    for chart in ("#heat", "#curves"):
        frame = page.locator(chart).bounding_box()
        drawn = page.locator(f"{chart} .main-svg").first.bounding_box()
        assert drawn["height"] <= frame["height"]
        assert drawn["width"] <= frame["width"]
        title = page.locator(f"{chart} .xtitle").bounding_box()
        assert title["y"] + title["height"] <= frame["y"] + frame["height"] - 1


def test_theme_changes_with_the_button(page: Any) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.locator("#theme").click()
    assert page.evaluate(colour) != before
    assert page.locator("#theme").inner_text() == "Switch to light"
    page.locator("#theme").click()
    assert page.locator("#theme").inner_text() == "Switch to dark"
    assert page.evaluate(colour) == before


def test_cards_say_what_experts_read(page: Any) -> None:
    card = page.locator("#expert-0")
    text = card.inner_text()
    assert "space 90%" in text
    assert f"{HOSTILE} read by 0" in text.replace("·", " ")
    assert "most on prose: +0.300" in text
    assert card.locator(".passage mark").count() == 2
    assert page.locator("#me-cards .card").count() == 8
    card.get_by_role("button").click()
    assert (
        page.locator('#ex-legend button[aria-pressed="true"]').get_attribute("data-expert") == "0"
    )
    nearest = card.locator("a")
    assert page.locator(nearest.get_attribute("href")).count() == 1


def test_every_control_is_reached_with_tab_and_seen(page: Any) -> None:
    """From the top, until focus comes back; what is focused has an outline."""
    wanted = page.evaluate(
        """[...document.querySelectorAll('a[href], select, input, button, summary, .tok')]
        .filter((n) => n.checkVisibility() && (!n.matches('.tok') || n.tabIndex === 0)).length"""
    )
    controls = "document.activeElement.matches('a[href], select, input, button, summary, .tok')"
    outlined = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
    reached = 0
    for _ in range(3 * wanted):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        assert page.evaluate(outlined)
        reached += page.evaluate(controls)
    assert reached == wanted


@pytest.mark.parametrize(
    ("domains", "experts", "scheme"), [(1, 2, "light"), (3, 8, "dark"), (12, 64, "light")]
)
def test_a_phone_shows_all_of_any_domains(
    browser: Any, tmp_path: Path, domains: int, experts: int, scheme: str
) -> None:
    """Arbitrary names are whole, nothing scrolls sideways, no label leaves its chart."""
    names = [f"<b>{'domain ' * 3}& {i}</b>" for i in range(domains)]
    folder = write_analysis(tmp_path, runs=1, experts=experts, domains=names)
    for page in opened(browser, write_report(folder), width=400, scheme=scheme):
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        assert page.locator("#me-legend li").all_inner_texts() == names
        colours = "getComputedStyle(node.querySelector('.dot')).backgroundColor"
        legend = page.locator("#me-legend li").evaluate_all(f"all => all.map(node => {colours})")
        assert len(set(legend)) == domains
        buttons = page.locator("#ex-legend button").evaluate_all(
            "all => all.map(node => node.style.getPropertyValue('--swatch'))"
        )
        assert len(set(buttons)) == experts
        page.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
        for metric in page.locator("#heat-metric option").evaluate_all(
            "all => all.map(o => o.value)"
        ):
            page.select_option("#heat-metric", metric)
            assert page.evaluate(BEYOND, "#heat") == []
        for curve in page.locator("#curve option").evaluate_all("all => all.map(o => o.value)"):
            page.select_option("#curve", curve)
            assert page.evaluate(BEYOND, "#curves") == []
        assert page.evaluate(SIDEWAYS) == []


BEYOND = """(chart) => {
  const frame = document.querySelector(chart).getBoundingClientRect();
  const texts = document.querySelectorAll(`${chart} .xtick text, ${chart} .ytick text, `
    + `${chart} .xtitle, ${chart} .ytitle, ${chart} .colorbar text`);
  return [...texts].filter((node) => {
    const box = node.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map((node) => node.textContent);
}"""
SIDEWAYS = """[...document.querySelectorAll('html, body *:not(svg *)')]
  .filter((node) => node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 0
    && (node === document.documentElement || /auto|scroll/.test(getComputedStyle(node).overflowX)))
  .map((node) => node.id || node.className || node.tagName)"""
