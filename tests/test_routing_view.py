"""The view of the routing on a terminal: what it draws, and that only a terminal gets it."""

import io
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from warm_commands import WarmCommand

from moe_emergence.training.routing_view import LEVELS, NOTHING, RoutingView, strip

CELLS = set(LEVELS + NOTHING)


def view_of(
    loads: dict[int, Sequence[float]], churn: dict[int, float] | None = None
) -> RoutingView:
    view = RoutingView([*loads], len(next(iter(loads.values()))))
    for n, shares in loads.items():
        view.read({f"router/layer_{n}_expert_{e}_frac": x for e, x in enumerate(shares)})
    view.read({"step": 4, **{f"eval/layer_{n}_churn": x for n, x in (churn or {}).items()}})
    return view


def drawn(view: RoutingView, width: int) -> list[str]:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(view)
    return console.export_text().splitlines()


def test_lines_are_these_for_these_loads() -> None:
    loads = {2: [0.25, 0.25, 0.25, 0.25], 11: [0.0, 0.01, 0.49, 0.5]}
    assert drawn(view_of(loads, {11: 0.034}), 80) == [
        "layer 2   ▅▅▅▅  most 25%",
        "layer 11  ·▁██  most 50%  churn 3.4%",
    ]


def test_rows_without_routing_leave_what_is_shown_and_before_any_nothing_is() -> None:
    view = RoutingView([1], 2)
    view.read({"step": 1, "train/lm_loss": 2.0})
    assert drawn(view, 80) == []
    view = view_of({1: [0.5, 0.5]})
    view.read({"step": 5, "train/lm_loss": 2.0})
    assert drawn(view, 80) == ["layer 1  ▅▅  most 50%"]


@given(
    st.integers(1, 128), st.integers(0, 999), st.integers(1, 3), st.integers(40, 200), st.booleans()
)
@settings(max_examples=150)
def test_every_expert_has_a_cell_whatever_the_width(
    experts: int, seed: int, layers: int, width: int, churns: bool
) -> None:
    rng = np.random.default_rng(seed)
    loads = (rng.dirichlet([0.5] * experts) * (rng.random(experts) > 0.2)).tolist()
    places = [3 * n for n in range(layers)]
    churn = dict.fromkeys(places, 0.5) if churns else {}
    lines = drawn(view_of(dict.fromkeys(places, loads), churn), width)
    assert max(map(len, lines)) <= width
    cells = "".join(c for c in "\n".join(lines) if c in CELLS)
    assert cells == layers * strip(loads, 1 / len(loads)).plain
    assert len(cells) == layers * experts
    assert sum("most" in line for line in lines) == layers
    assert sum("churn 50.0%" in line for line in lines) == layers * churns


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_more_is_higher_and_never_cooler(loads: list[float]) -> None:
    heights = " ·" + LEVELS
    warmth = ["blue", "cyan", "green", "yellow", "red"]
    text = strip(sorted(loads), 0.1)
    found = [heights.index(cell) for cell in text.plain]
    assert found == sorted(found)
    colours = [warmth.index(str(span.style)) for span in text.spans]
    assert colours == sorted(colours)
    for load, cell in zip(sorted(loads), text.plain, strict=True):
        assert (cell == NOTHING) == (load == 0)


# the command ------------------------------------------------------------------------------------


@pytest.fixture
def on_a_terminal(
    tmp_path: Path, tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """What `train` writes to a stderr that is a terminal."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are a POSIX feature")

    def run(*more: str) -> str:
        monkeypatch.setenv("TERM", "xterm-256color")
        ours, theirs = pty.openpty()
        seen: list[bytes] = []

        def look() -> None:
            while not seen or seen[-1]:
                try:
                    seen.append(os.read(ours, 65536))
                except OSError:  # nobody writes any more
                    seen.append(b"")

        reader = threading.Thread(target=look)
        reader.start()
        terminal = Path(os.ttyname(theirs))
        flags = ["-m", "moe_emergence.train", *tiny_flags, *more]
        command = WarmCommand(flags, tmp_path, tmp_path / "printed.txt", terminal)
        code = command.wait(120)
        os.close(theirs)  # of a terminal that nobody has open there is nothing to read
        reader.join(10)
        os.close(ours)
        text = b"".join(seen).decode("utf-8", errors="replace")
        assert code == 0, text[-3000:]
        return text

    return run


@pytest.mark.slow
def test_a_terminal_shows_stages_and_routing_and_keeps_no_bar(
    on_a_terminal: Callable[..., str], tmp_path: Path
) -> None:
    text = on_a_terminal("--tokenizer", "train", "--vocab-size", "301")
    plain = re.sub(r"\x1b\[[0-9;?]*\w", "", text)
    assert plain.strip().startswith("loading torch and transformers")
    said = ("preparing the text", "stage 1 of 2: dense base", "stage 2 of 2: mixture")
    places = [plain.index(part) for part in said]
    strips = [m.start() for m in re.finditer(f"layer 1  [{LEVELS}{NOTHING}]{{4}}  most", plain)]
    assert places == sorted(places)
    assert strips
    assert strips[0] > places[-1]  # a dense model has none
    assert re.search(r"most \d+%  churn \d+\.\d%", plain)
    # the line of a bar is erased after its last frame
    for bar in ("training a tokenizer", "tokens/s", "layer 1  "):
        assert "\x1b[2K" in text[text.rindex(bar) :], bar
    assert "Compute merges" not in plain
    assert "most" not in (tmp_path / "printed.txt").read_text("utf-8")


@pytest.mark.slow
def test_without_live_there_is_the_bar_alone(on_a_terminal: Callable[..., str]) -> None:
    text = on_a_terminal("--no-live")
    assert "tokens/s" in text
    assert not re.search(f"layer 1  .*[{LEVELS}]", text)


@pytest.mark.slow
def test_a_pipe_gets_neither_bar_nor_routing(tmp_path: Path, tiny_flags: list[str]) -> None:
    errors = tmp_path / "errors.txt"
    command = WarmCommand(
        ["-m", "moe_emergence.train", *tiny_flags], tmp_path, tmp_path / "printed.txt", errors
    )
    assert command.wait(120) == 0
    text = errors.read_text("utf-8")
    assert "stage 2 of 2" in text
    assert "eval lm_loss" in text
    assert not CELLS & set(text)
    assert not re.search("━|tokens/s|\x1b", text)
