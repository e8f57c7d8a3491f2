"""Figure of a persistent field's rows: nearest stored neighbours as images, and the composition of rows by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.order import Window
from rkdo_dist.data.samples import Cursor, Reading
from rkdo_dist.parts import open_index
from rkdo_dist.rundir import RunDirectory, RunError
from rkdo_dist.studies import plots
from rkdo_dist.studies.palette import DARK, GOOD, GREY, style
from rkdo_dist.studies.plots import pyplot, save, whole_numbers

SHOWN_ROWS, SHOWN_STEPS, SHOWN_NEIGHBOURS = 3, 5, 6
SAME_CLASS = "\u2713 and a thick frame: the same class"
_BLOCK, _LINE = 4.6, 0.92  # inches of a sample's block and of a snapshot in it
CURVES = {
    "row_positive": "mass on the sample itself",
    "p_positive": "the same, restricted to the batch",
    "row_stored": "share of the mass stored entry by entry",
    "row_mass": "mass in the batch (m)",
    "row_drift": "drift: total variation in a visit",
}

Array = NDArray[Any]


@dataclass(frozen=True)
class Picture:
    """An image (H, W, 3) uint8 and its label, -1 for none."""

    image: Array
    label: int


@dataclass(frozen=True)
class Evolution:
    """Data of a run for the figure.

    Attributes:
        steps: of the snapshots shown, rising.
        rows: for each watched sample shown, the rows of those snapshots (`rows/<step>.json`).
        pictures: by sample.
        curves: for each key of `CURVES` and "row_entropy", (step, value) of every step that has it.
    """

    steps: list[int]
    rows: list[list[dict[str, Any]]]
    pictures: dict[int, Picture]
    curves: dict[str, tuple[list[int], list[float]]]


def evolution(path: Path) -> Evolution:
    """Read a run's snapshots, its journal, and the images of the samples in them.

    Raises:
        ValueError: if the run has no persistent field, or its shards cannot be read.
    """
    run = RunDirectory(path)
    history, snapshots = run.history(), run.rows()
    if not snapshots:
        raise RunError(f"{path} has no snapshots of rows: they are written at every checkpoint of a persistent field")
    shown = [snapshots[k] for k in _spread(len(snapshots), SHOWN_STEPS)]
    which = _spread(len(shown[0]["rows"]), SHOWN_ROWS)
    rows = [[snapshot["rows"][k] for snapshot in shown] for k in which]
    wanted = {row["sample"] for watched in rows for row in watched}
    wanted |= {sample for watched in rows for row in watched for sample, _ in neighbours(row)}
    config = history.config
    pictures = pictures_of(open_index(config), config.data.split, config.data.image_size, sorted(wanted))
    curves = {key: history.curve(key) for key in (*CURVES, "row_entropy")}
    drawn = {key: (list(curve), list(curve.values())) for key, curve in curves.items()}
    return Evolution([snapshot["step"] for snapshot in shown], rows, pictures, drawn)


def neighbours(row: dict[str, Any]) -> list[tuple[int, float]]:
    """The largest stored entries of a row of a snapshot apart from the sample itself, as (sample, probability)."""
    others = [(sample, p) for sample, p in row["nearest"] if sample != row["sample"]]
    return others[:SHOWN_NEIGHBOURS]


def pictures_of(index: ShardIndex, split: str, size: int | None, samples: Sequence[int]) -> dict[int, Picture]:
    """Images of a split by sample number; each shard is opened once if the samples rise."""
    found, ends = index.split(split), np.cumsum(index.split(split).counts)
    windows = []
    for sample in samples:
        shard = int(np.searchsorted(ends, sample, side="right"))
        place = sample - int(ends[shard]) + found.counts[shard]
        windows.append(Window(shard, place, place + 1))
    cursor = Cursor(Reading(index, found, size))
    try:
        read = list(cursor.samples(windows))
    finally:
        cursor.close()
    return {
        sample: Picture(np.asarray(one.image).transpose(1, 2, 0), one.label)
        for sample, one in zip(samples, read, strict=True)
    }


def field_figure(shown: Evolution, title: str) -> Any:
    """A matplotlib figure: curves above; below, a block per sample with a line of neighbours for each snapshot."""
    plt = pyplot()
    wide, high = len(shown.rows), len(shown.steps)
    figure = plt.figure(figsize=(_BLOCK * wide, 3.6 + _LINE * high), layout="constrained")
    plots.title(figure, title)
    above, below = figure.subfigures(2, 1, height_ratios=[3.6, _LINE * high])
    _draw_curves(above, shown, columns=3)
    for block, rows in zip(np.atleast_1d(below.subfigures(1, wide, wspace=0.03)), shown.rows, strict=True):
        _draw_rows(block, shown, rows)
    return figure


def parts(shown: Evolution) -> list[Any]:
    """The same as one figure for the curves and one for each sample, for a page that arranges them by its width."""
    plt = pyplot()
    figures = [plt.figure(figsize=(8.4, 3.6), layout="constrained")]
    _draw_curves(figures[0], shown, columns=1)
    for rows in shown.rows:
        figures.append(plt.figure(figsize=(_BLOCK, 0.4 + _LINE * len(shown.steps)), layout="constrained"))
        _draw_rows(figures[-1], shown, rows)
    return figures


def write_figure(path: Path, out: Path) -> list[Path]:
    """Draw a run's rows into `out` as field.png and field.svg."""
    shown = evolution(path)
    name = f"{path.resolve().name}: rows of the persistent field ({SAME_CLASS})"
    return save(field_figure(shown, name), out, "field")


def _draw_curves(figure: Any, shown: Evolution, columns: int) -> None:
    left, right = figure.subplots(1, 2)
    for number, (key, label) in enumerate(CURVES.items()):
        every = max(1, len(shown.curves[key][0]) // 12)
        left.plot(*shown.curves[key], **style(number).curve, markevery=every, label=label)
    left.set(xlabel="step", ylabel="share", ylim=(-0.02, 1.02), title="Rows of the batch, means")
    below = {"loc": "outside lower left", "ncols": columns, "frameon": False, "handlelength": 3}
    figure.legend(*left.get_legend_handles_labels(), **below)  # hides no curve
    right.plot(*shown.curves["row_entropy"], **{**style(0).curve, "marker": "None"})
    right.set(xlabel="step", ylabel="nats", title="Entropy of the rows, mean")
    whole_numbers(left, right)


def _draw_rows(block: Any, shown: Evolution, rows: list[dict[str, Any]]) -> None:
    """A sample's rows: a line for each snapshot, which says so where there is nothing new in it."""
    own = shown.pictures[rows[0]["sample"]]
    block.suptitle(f"sample {rows[0]['sample']}", fontsize=9.5)
    panels = block.subplots(len(rows), SHOWN_NEIGHBOURS + 1, squeeze=False, gridspec_kw={"wspace": 0.05})
    before: dict[str, Any] = {}
    for line, row, step in zip(panels, rows, shown.steps, strict=True):
        _draw_image(line[0], own, f"{row['positive']:.2f}", None)
        same = bool(before) and (row["nearest"], row["positive"]) == (before["nearest"], before["positive"])
        line[0].set_ylabel(f"step {step}" + ("\nas before" if same else ""), fontsize=8)
        listed, before = neighbours(row), row
        for k, panel in enumerate(line[1:]):
            if k < len(listed):
                sample, p = listed[k]
                _draw_image(panel, shown.pictures[sample], f"{p:.2g}", own.label)
            else:
                panel.axis("off")
        if not listed:
            said = line[1].text(0, 0.5, "the sample alone: no neighbour is stored", fontsize=8, va="center")
            said.set_in_layout(False)  # lies over the empty places


def _draw_image(panel: Any, picture: Picture, text: str, label: int | None) -> None:
    """An image with a number below it; one of class `label` has a tick before the number and another frame."""
    panel.imshow(picture.image, interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    panel.grid(False)
    same = label is not None and picture.label == label and label >= 0
    panel.set_xlabel(f"\u2713 {text}" if same else text, fontsize=8, labelpad=3)
    frame = DARK if label is None else GOOD if same else GREY
    for spine in panel.spines.values():
        spine.set(visible=True, color=frame, linewidth=2.2 if same else 1.0)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly spread, first and last among them."""
    return sorted({round(k * (count - 1) / max(1, most - 1)) for k in range(most)})
