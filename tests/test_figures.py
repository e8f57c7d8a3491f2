"""Every figure and table: nothing cut, covered or told by colour alone, sizes that can be read; controls that fail."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colors
from rich.cells import cell_len
from rich.console import Console

from examples.theory import results as theory
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.presets import PRESETS
from rkdo_dist.frozen import clustering, mapping
from rkdo_dist.measure import scaling
from rkdo_dist.studies import (
    audit,
    field_figure,
    grid,
    palette,
    paper_figures,
    paper_tables,
    plots,
    scaling_tables,
    sweep,
)
from rkdo_dist.studies.palette import COLOURS, PAGE, style
from rkdo_dist.studies.report import charts, pictures
from rkdo_dist.studies.report.groups import overview
from rkdo_dist.studies.report.page import _levels
from rkdo_dist.studies.sheets import Sheet
from rkdo_dist.studies.sweep_figures import _curve, _maps
from tests.figures import (
    SMALLEST,
    alike,
    audited,
    compared,
    covered,
    crowded,
    cut,
    evolution,
    reproduction,
    seen,
    strange,
    swept,
    texts,
    ticks,
)
from tests.test_scaling import made_results

ROOT = Path(__file__).resolve().parent.parent
TITLE = "Sweep of a key whose name is long and of another one, under many changed settings"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every kind of figure of the project, each laid out once; "one ..." are those of one seed."""
    out = tmp_path_factory.mktemp("figures")
    found: dict[str, Any] = {"theory": theory.figure(), "scaling": scaling_tables.figure(scaling.study(made_results()))}
    found |= {f"field {n}": one for n, one in enumerate(field_figure.parts(evolution()))}
    found["audit"] = audit.figure(audited())
    steps = [{"coupling": x, "kl": 1.5, "own_loss": 1.4, "trustworthiness": 0.95 + x / 1e3} for x in (0, 0.01, 0.1)]
    found["couplings"] = mapping.couplings_figure(steps)
    found["map"] = mapping.map_figure(seen().embeddings[:, :2], seen().labels, seen().classes)
    found["embeddings"] = pictures.embedding_map(seen())
    found["heat"] = pictures.field_maps(seen(), Objective.rkdo())
    for name, seeds in (("one", 1), ("two", 2)):
        study = reproduction(out / f"paper-{name}", seeds)
        made = (paper_figures._improvement, paper_figures._losses, paper_figures._early_learning)
        made += (paper_figures._improvement_by_epoch, paper_figures._early_against_late) if seeds == 1 else ()
        found |= {f"{name} paper {n}": one(study) for n, one in enumerate(made)}
        groups = compared(out / f"report-{name}", seeds)
        found |= {f"{name} loss": charts.loss_chart(groups), f"{name} scores": charts.score_chart(groups)}
        found[f"{name} resources"] = charts.resource_chart(groups, {0: 2.5e8, 1: 2.5e8}, "linear_accuracy")
    close, names = grid.axis("field.coupling=0,0.01,0.05,0.5"), grid.axis("field.supervisor_grad=flow,stop")
    for name, axes, seeds in (("one", (close,), (1,)), ("two", (names,), (1, 2)), ("map", (close, names), (1, 2))):
        wanted, rows = swept(out / f"sweep-{name}", seeds, *axes)
        two = len(axes) > 1
        made = _maps(wanted, rows, ["nmi"], (0, 1), TITLE) if two else _curve(wanted, rows, ["nmi"], TITLE)
        found[f"{name} sweep"] = made
    for figure in found.values():
        figure.draw_without_rendering()
    return found


def test_nothing_is_cut_crowded_or_covered_and_everything_can_be_read(drawn: dict[str, Any]) -> None:
    for name, figure in drawn.items():
        assert not crowded(figure), name
        assert not cut(figure), name
        assert not covered(figure), name
        small = [one.get_text() for one in texts(figure) if one.get_fontsize() < SMALLEST]
        assert not small, name


def test_colours_are_the_palettes_and_never_the_only_sign(drawn: dict[str, Any]) -> None:
    for name, figure in drawn.items():
        assert not strange(figure), name
        assert not alike(figure), name
    assert len({style(n) for n in range(64)}) == 64
    assert len({(palette.of_objective(name)) for name in PRESETS}) == len(PRESETS)


def test_one_seed_shows_no_spread_and_several_say_how_many(drawn: dict[str, Any]) -> None:
    for name, figure in drawn.items():
        shown = " ".join(one.get_text() for one in texts(figure))
        if name.startswith("one"):
            assert "±" not in shown, name
            bands = [one for panel in figure.axes for one in panel.collections if "Fill" in type(one).__name__]
            assert not bands, name
        if "paper" in name or "sweep" in name:
            assert ("one seed: no spread is known" if name.startswith("one") else "± sd over 2 seeds") in shown, name


def test_steps_are_whole_and_noise_is_no_cliff(drawn: dict[str, Any]) -> None:
    """One evaluation at step 6: no axis from 5.7 to 6.3; accuracies from 0.8134 to 0.8162 are near each other."""
    figure = drawn["one scores"]
    accuracy = figure.axes[0]
    assert [float(one.get_text()) for one in ticks(accuracy.xaxis)] == [5, 6, 7]
    assert np.ptp(accuracy.get_ylim()) > 0.08
    assert np.ptp(drawn["one sweep"].axes[0].get_ylim()) > 0.08
    assert "MFLOPs" not in drawn["one resources"].axes[1].get_xlabel()


def test_what_a_score_took_is_asked_where_scores_lie_apart(tmp_path: Path) -> None:
    levels, said = _levels(compared(tmp_path / "one", 1))
    assert not levels
    assert "One seed" in said
    levels, said = _levels(compared(tmp_path / "two", 2))
    assert not levels or min(b - a for a, b in itertools.pairwise(levels)) >= 2 * 0.0007


def test_the_controls_fail() -> None:
    """What was there before: each of these would be noticed."""
    figure, (left, right) = plots.panels(1, 2, (4.0, 2.0), layout="none")
    for colour in ("tab:blue", "tab:orange"):
        left.plot([0, 1], [1, 1], color=colour, label=colour)
    left.legend(loc="center")
    left.set_title("a title that is longer than the panel and the figure are wide, so that it is cut off", fontsize=7)
    right.set_xticks([0, 1e-4, 2e-4, 3e-4], ["0.000000", "0.000250", "0.000500", "0.000750"])
    figure.draw_without_rendering()
    assert crowded(figure)
    assert cut(figure)
    assert covered(figure)
    assert len(strange(figure)) == 2
    assert alike(figure) == ["tab:blue, tab:orange"]
    assert min(one.get_fontsize() for one in texts(figure)) < SMALLEST
    plots.pyplot().close(figure)


# --- the palette ------------------------------------------------------------------------------------------------------

# Machado et al. 2009, severity 1: what is left without red, green or blue cones, on linear RGB.
BLIND = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> Any:
    c = np.array(colors.to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(light: Any) -> Any:
    x = XYZ @ np.clip(light, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def nearest(chosen: tuple[str, ...]) -> float:
    """The smallest distance (CIELAB) of two colours, for any eyes."""
    seen = [[lab(np.array(eyes) @ linear(one)) for one in chosen] for eyes in BLIND.values()]
    return min(float(np.linalg.norm(a - b)) for some in seen for a, b in itertools.combinations(some, 2))


def contrast(one: str, other: str) -> float:
    """Of WCAG 2, 1 to 21."""
    light = sorted(float(XYZ[1] @ linear(c)) + 0.05 for c in (one, other))
    return light[1] / light[0]


def test_the_palette_is_told_apart_by_any_eyes_and_stands_out() -> None:
    assert nearest(COLOURS) > 12
    assert min(contrast(one, "white") for one in COLOURS) > 2.95
    for page in PAGE.values():
        assert all(contrast(page[name], page["paper"]) > 4.5 for name in ("ink", "soft", "accent", "good", "bad"))
    former = ("#1f5fa8", "#c8541e", "#4a8c3f", "#7b4fa3", "#b8860b", "#4d4d4d", "#b0305c", "#2b8f8f")
    assert nearest(former) < 8, "the control: the palette before"


def test_colours_stand_in_one_module() -> None:
    """Hexadecimal colours; those of rich (a red word in the terminal) are the terminal's."""
    places = [*(ROOT / "rkdo_dist").rglob("*.py"), *(ROOT / "docs").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    found = {path.name for path in places if re.search(r"#[0-9a-fA-F]{6}\b|\b(tab|xkcd):", path.read_text())}
    assert found == {"palette.py"}


# --- tables -----------------------------------------------------------------------------------------------------------


CLUSTERED = {
    **dict.fromkeys(("accuracy", "nmi", "ari", "loss"), 0.12345),
    "kmeans": dict.fromkeys(("accuracy", "nmi", "ari"), None),
    "balance": {"smallest": 1, "largest": 1_000_000},
    "request": {"control": "random"},
    "losses": [0.1] * 10,
    **dict.fromkeys(("samples", "clusters"), 1_000_000),
    "labelled": 999_999,
}


def printed(sheet: Sheet, width: int = 80) -> list[str]:
    """Lines of a table in a pipe."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as caught:
        console.print(sheet.rich(width))
    return caught.get().splitlines()


def test_tables_have_80_columns_and_break_no_cell(tmp_path: Path) -> None:
    study = reproduction(tmp_path / "paper", 2)
    axes = (grid.axis("field.depth=1,3"), grid.axis("field.coupling=0.1,0.5"))
    found = [*paper_tables.all_tables(study), sweep.table(*swept(tmp_path / "sweep", (1, 2), *axes))]
    found += [
        overview(compared(tmp_path / "report", 2)),
        audit.table(audited()),
        *scaling_tables.tables(scaling.study(made_results())),
        mapping.table([{"coupling": 0.1, "kl": 12.3456, "own_loss": 1.2, "trustworthiness": 0.98765}]),
        clustering.table(CLUSTERED),
    ]
    for sheet in found:
        lines = printed(sheet)
        assert max(map(cell_len, lines)) <= 80, sheet.name
        assert "…" not in "".join(lines), sheet.name
        for row in sheet.rows:
            for cell in row:
                assert any(cell in line for line in lines), (sheet.name, cell)
        for column in sheet.columns:
            assert all(word in " ".join(lines) for word in column.split()), (sheet.name, column)
    narrow = printed(dataclasses.replace(found[0], names=2), 60)
    assert max(map(cell_len, narrow)) <= 60
    long = Sheet("long", "Long", ["", "verdict"], rows=[["a", "word " * 40]])
    assert max(map(cell_len, printed(long))) <= 80, "more words than a line has room for go on below"


def test_a_table_of_one_seed_claims_nothing(tmp_path: Path) -> None:
    wanted, rows = swept(tmp_path / "sweep", (1,), grid.axis("field.depth=1,3"))
    sheet = sweep.table(wanted, rows)
    lines = printed(sheet)
    assert "±" not in "".join(lines)
    assert "minus the first row" not in sheet.columns
    assert "no spread is known" in " ".join(lines)
    assert "±" not in "".join(printed(overview(compared(tmp_path / "report", 1))))
