"""Figures of an analysis: their numbers, labels and files; any number of layers and experts."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from analysis_folders import write_analysis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from moe_emergence.analysis.figure_file import lay_out, save
from moe_emergence.analysis.figures import FIGURES, write_figures
from moe_emergence.analysis.figures.subjects import (
    plot_collapse,
    plot_expert_domain,
    plot_expert_slots,
    plot_information,
    plot_similarity,
    plot_training,
)
from moe_emergence.analysis.tidy import read_tables, write_tables
from moe_emergence.errors import RunError

pytestmark = pytest.mark.slow


def test_heatmaps_show_the_tables_numbers(tmp_path: Path) -> None:
    table = read_tables(write_analysis(tmp_path, runs=1))["similarity"]
    figure = plot_similarity(table)
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 4  # 2 layers x 2 kinds
    first = table[(table["layer"] == 0) & (table["kind"] == "weights")]
    expected = first.pivot_table("cosine", "expert", "other_expert").to_numpy(copy=True)
    np.fill_diagonal(expected, np.nan)  # always 1: it would take the whole scale
    image = panels[0].images[0]
    np.testing.assert_allclose(np.ma.filled(image.get_array(), np.nan), expected)
    others = table[table["expert"] != table["other_expert"]]["cosine"]
    assert image.get_clim() == (others.min(), others.max())
    assert panels[0].get_xlabel() == "other expert"
    assert panels[0].texts[0].get_text() == f"{expected[0, 1]:.2f}"


def test_every_axis_has_a_unit(tmp_path: Path) -> None:
    tables = read_tables(write_analysis(tmp_path))
    figure = plot_information(tables["information"])
    assert figure.get_supylabel() == "I(expert; domain) (bits)"
    figure = plot_expert_domain(tables["expert_domain"])
    assert "(%)" in figure.axes[-1].get_ylabel()
    figure = plot_collapse(tables["collapse"])
    assert figure.get_supxlabel() == "training step"
    assert len([line for line in figure.axes[0].lines if len(line.get_xdata())]) == 2


def test_losses_of_any_domains_are_drawn(tmp_path: Path) -> None:
    tables = read_tables(write_analysis(tmp_path, domains=["law", "<b>"]))
    figure = plot_training(tables["training"])
    assert figure is not None
    assert {axis.get_title(loc="left") for axis in figure.axes} == {"all", "law"}


def test_slots_have_a_figure_only_where_there_are_several(tmp_path: Path) -> None:
    table = read_tables(write_analysis(tmp_path))["expert_domain"]
    assert plot_expert_slots(table) is None
    both = pd.concat([table.assign(slot=0), table.assign(slot=1)])
    figure = plot_expert_slots(both)
    assert figure is not None
    assert len(figure.axes[0].get_yticklabels()) == 6


@pytest.mark.parametrize(("layers", "experts"), [(1, 4), (9, 32)])
def test_all_figures_are_written_and_stale_ones_deleted(
    tmp_path: Path, layers: int, experts: int
) -> None:
    folder = write_analysis(tmp_path, runs=1, layers=layers, experts=experts)
    tables = read_tables(folder)
    few = {name: tables[name] for name in ("expert_domain", "information", "collapse")}
    share = few["expert_domain"][["run", "layer", "domain", "expert", "fraction"]]
    few["trajectory"] = pd.concat([share.assign(step=step) for step in (10, 20, 30)])
    write_tables(folder, few)
    (folder / "figures").mkdir()
    (folder / "figures/old.png").touch()
    written = {path.name for path in write_figures(folder)}
    assert {"expert_domain.png", "expert_domain.svg", "collapse.svg", "trajectory.gif"} <= written
    assert not (folder / "figures/old.png").exists()
    assert {path.name for path in (folder / "figures").iterdir()} == written
    with Image.open(folder / "figures/trajectory.gif") as film:
        assert film.n_frames == 3
    assert (folder / "figures/trajectory.gif").stat().st_size < 1_000_000


def test_the_same_numbers_give_the_same_files(tmp_path: Path) -> None:
    table = read_tables(write_analysis(tmp_path))["expert_domain"]
    for name in ("one", "other"):
        figure = plot_expert_domain(table)
        assert figure is not None
        (tmp_path / name).mkdir()
        save(figure, tmp_path / name / "a.png", tmp_path / name / "a.svg", dpi=50)
    for file in ("a.png", "a.svg"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"a.png", "a.svg"}
    with pytest.raises(RunError, match=r"one/a\.png"):  # a file, and no folder
        save(figure, tmp_path / "one" / "a.png" / "b.png")


def test_a_full_disk_keeps_the_figure_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = plot_expert_domain(read_tables(write_analysis(tmp_path))["expert_domain"])
    assert figure is not None
    path = tmp_path / "figures" / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"earlier")

    def full(canvas: FigureCanvasAgg, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    lay_out(figure)  # which draws too
    monkeypatch.setattr(FigureCanvasAgg, "print_png", full)
    with pytest.raises(RunError, match=r"a\.png"):
        save(figure, path)
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"earlier"]


def test_every_figure_names_its_table_and_says_what_it_shows() -> None:
    assert all(figure.caption.endswith(".") and figure.table for figure in FIGURES.values())
