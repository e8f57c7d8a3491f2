"""Common parts of figures: matplotlib without a display, one style, bands over seeds, maps, legends, files."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rkdo_dist.studies.palette import GREY, Style, style
from rkdo_dist.studies.sheets import mean_sd

_ALIKE = 1.3  # sizes that differ by less are made the same
_PER_INCH = 11  # letters of a title
_LETTERS, _KEY = 72, 9  # of a line of a legend; that the key of an entry takes
_STYLE = {
    "figure.max_open_warning": 0,
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


def title(figure: Any, *lines: str) -> None:
    """A title over all panels, each line of it broken where the figure ends."""
    letters = int(_PER_INCH * figure.get_figwidth())
    figure.suptitle("\n".join("\n".join(textwrap.wrap(line, letters)) for line in lines))


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


def clouds(panel: Any, plane: Any, groups: Any, name: Callable[[int], str], size: float = 14) -> list[Any]:
    """Points of a map by group, each group with a colour and a marker of its own; -1 is none, in grey.

    Args:
        plane: (n, 2).
        groups: (n,) whole numbers.
        name: of a group.

    Returns:
        The middle of every group with its name, for `named`.
    """
    middles = []
    for one in sorted(set(groups.tolist())):
        here = plane[groups == one]
        look = Style(GREY, ".", "-") if one < 0 else style(one)
        options = {"color": look.colour, "marker": look.marker, "label": "no label" if one < 0 else name(one)}
        panel.scatter(here[:, 0], here[:, 1], s=size, linewidths=0, **options)
        middles += [] if one < 0 else [(np.median(here, axis=0), name(one))]
    return middles


def band(panel: Any, values: Mapping[Any, Sequence[float]], look: Style, label: str) -> None:
    """The mean over seeds as a line, one standard deviation as a band; no band where there is one seed.

    Args:
        values: by position, one for each seed that has one there.
    """
    found = sorted((x, *mean_sd(some)) for x, some in values.items() if len(some))
    if not found:
        return
    x, means, sds = (list(column) for column in zip(*found, strict=True))
    every = max(1, len(x) // 12)  # markers tell lines apart, and do not hide them
    panel.plot(x, means, **look.curve, markevery=every, label=label or "_nolegend_")
    if any(sd == sd for sd in sds):
        low, high = ([m + sign * (0 if s != s else s) for m, s in zip(means, sds, strict=True)] for sign in (-1, 1))
        panel.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0)


def whole_numbers(*axes: Any) -> None:
    """Ticks at whole steps or epochs only; a single one stands between its neighbours."""
    for panel in axes:
        panel.xaxis.get_major_locator().set_params(integer=True)
        low, high = panel.dataLim.intervalx
        if low == high:
            panel.set_xlim(low - 1, high + 1)


def widened(low: float, high: float, least: float = 0.1) -> tuple[float, float]:
    """A range that spans `least` of its largest value or more, so that what hardly differs looks as if it did so."""
    missing = max(0.0, least * max(abs(low), abs(high)) - (high - low))
    return low - missing / 2, high + missing / 2


def calm(*axes: Any, along: str = "y") -> None:
    """Axes of such a range."""
    for panel in axes:
        getattr(panel, f"set_{along}lim")(*widened(*getattr(panel, f"get_{along}lim")()))


def legend_below(figure: Any) -> None:
    """One legend for all panels, each label once, below them; as many in a line as a narrow screen has room for."""
    entries: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = max(1, min(len(entries), _LETTERS // (_KEY + max(map(len, entries)))))
        shown = {"ncols": columns, "frameon": False, "handlelength": 3.2}
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", **shown)


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


def pieces(figure: Any, kind: str) -> list[tuple[str, bytes]]:
    """Each panel, and the legend, as the bytes of a file of its own: a page arranges them by its width. Closed.

    Returns:
        (title, bytes) by panel; the legend's title is "legend".
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    parts = [(panel.get_title(loc="left"), panel) for panel in figure.axes] + [("legend", it) for it in figure.legends]
    inches = figure.dpi_scale_trans.inverted()
    boxes = [part.get_tightbbox().padded(5).transformed(inches) for _, part in parts]
    named = [box for box, (title, _) in zip(boxes, parts, strict=True) if title not in ("", "legend")]
    sizes = [(box.width, box.height) for box in named]
    made = []
    for (title, part), box in zip(parts, boxes, strict=True):
        for _, other in parts:
            other.set_visible(other is part)
        if title not in ("", "legend"):  # panels of about one size have one, and stand in line
            wide = max(w for w, _ in sizes if w <= _ALIKE * box.width)
            high = max(h for _, h in sizes if h <= _ALIKE * box.height)
            box.x0, box.y1 = box.x1 - wide, box.y0 + high
        made.append((title, _file(figure, kind, bbox_inches=box)))
    pyplot().close(figure)
    return made


def check_kind(path: Path) -> None:
    """Whether the name's ending is a kind of picture.

    Raises:
        ValueError: naming those there are.
    """
    known = pyplot().Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"{path} does not end in a kind of picture: choose .png or .svg (or {', '.join(known)})")


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Save as PNG and SVG (the same bytes for the same figure) and close."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    for path in paths:
        path.write_bytes(_file(figure, path.suffix[1:]))
    pyplot().close(figure)
    return paths


def _file(figure: Any, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    options |= {"metadata": {"Date": None}} if kind == "svg" else {}
    figure.savefig(out, format=kind, dpi=150, **options)
    return out.getvalue()


def seeds(count: int) -> str:
    """ "1 seed", "5 seeds"."""
    return f"{count} seed" if count == 1 else f"{count} seeds"


def over(counts: Sequence[int]) -> str:
    """What points and bands are, of these numbers of seeds: one seed has no spread."""
    low, high = min(counts), max(counts)
    if high == 1:
        return "one seed: no spread is known"
    return f"mean ± sd over {seeds(high) if low == high else f'{low} to {high} seeds'}"


def sentence(words: str) -> str:
    """These words with a capital and a full stop."""
    return f"{words[0].upper()}{words[1:]}."
