"""Common parts of figures: matplotlib without a display, one style, one set of colours, bands over seeds, files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rkdo_dist.studies.sheets import mean_sd

# For things without a colour of their own; objectives have theirs in `field.presets`.
PALETTE = ("#1f5fa8", "#c8541e", "#4a8c3f", "#7b4fa3", "#b8860b", "#4d4d4d", "#b0305c", "#2b8f8f")
DARK, GREY, GOOD, BAD = "#222222", "#9aa5b1", "#4a8c3f", "#b5473c"
_STYLE = {
    "svg.hashsalt": "rkdo",  # the same file for the same figure
    "font.size": 9.5,
    "figure.titlesize": 11,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.fontsize": 8.5,
}


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files only."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(_STYLE)
    return plt


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, list[Any]]:
    """A figure of equal panels, `size` inches in all, and the panels row by row."""
    options = {"layout": "constrained", "squeeze": False, **options}
    figure, axes = pyplot().subplots(rows, columns, figsize=size, **options)
    return figure, list(axes.flat)


def colour(number: int) -> str:
    """The colour of the n-th item of a figure."""
    return PALETTE[number % len(PALETTE)]


def marker(number: int) -> str:
    """A marker that tells the n-th item from an earlier one of the same colour."""
    return "osD^vP"[number // len(PALETTE) % 6]


def named(panel: Any, place: Sequence[float], text: str) -> None:
    """A name over a group of points."""
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.75, "linewidth": 0}
    panel.annotate(text, tuple(place), ha="center", va="center", fontsize=9, fontweight="bold", bbox=box)


def bare(panel: Any) -> None:
    """A map: no axes, one unit in both directions."""
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_aspect("equal", "datalim")
    panel.spines[:].set_visible(False)


def band(panel: Any, values: Mapping[Any, Sequence[float]], colour: str, label: str, line: str = "-") -> None:
    """The mean over seeds as a line, one standard deviation as a band.

    Args:
        values: by position, one for each seed that has one there.
    """
    found = sorted((x, *mean_sd(some)) for x, some in values.items() if len(some))
    if not found:
        return
    x, means, sds = (list(column) for column in zip(*found, strict=True))
    panel.plot(
        x, means, line, marker="o" if len(x) < 25 else None, markersize=3.5, color=colour, label=label or "_nolegend_"
    )
    low, high = ([m + sign * (0 if s != s else s) for m, s in zip(means, sds, strict=True)] for sign in (-1, 1))
    panel.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def whole_numbers(*axes: Any) -> None:
    """Ticks at whole steps or epochs only."""
    for panel in axes:
        panel.xaxis.get_major_locator().set_params(integer=True)


def legend_below(figure: Any, columns: int = 4) -> None:
    """One legend for all panels, each label once, below them."""
    entries: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


def encoded(figure: Any, kind: str) -> bytes:
    """The figure as the bytes of a file, closed.

    Args:
        kind: an ending that matplotlib knows, such as "png" or "svg".

    Raises:
        ValueError: for one that it does not know.
    """
    try:
        return _file(figure, kind)
    finally:
        pyplot().close(figure)


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Save as PNG and SVG (the same bytes for the same figure) and close."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        path.write_bytes(_file(figure, path.suffix[1:]))
    pyplot().close(figure)
    return paths


def _file(figure: Any, kind: str) -> bytes:
    out = io.BytesIO()
    options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
    figure.savefig(out, format=kind, dpi=150, **options)
    return out.getvalue()


def seeds(count: int) -> str:
    """ "1 seed", "5 seeds"."""
    return f"{count} seed" if count == 1 else f"{count} seeds"
