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
from rkdo_dist.studies.palette import DARK, GOOD, GREY, style
from rkdo_dist.studies.plots import pyplot, save

SHOWN_ROWS, SHOWN_STEPS, SHOWN_NEIGHBOURS = 3, 5, 6
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
    figure = plt.figure(figsize=(4.6 * wide, 3.2 + 0.82 * high), layout="constrained")
    figure.suptitle(title)
    above, below = figure.subfigures(2, 1, height_ratios=[2.6, 0.82 * high])
    _draw_curves(above.subplots(1, 2), shown)
    blocks = np.atleast_1d(below.subfigures(1, wide, wspace=0.03))
    for block, rows in zip(blocks, shown.rows, strict=True):
        own = shown.pictures[rows[0]["sample"]]
        block.suptitle(f"sample {rows[0]['sample']}", fontsize=9)
        panels = block.subplots(high, SHOWN_NEIGHBOURS + 1, squeeze=False, gridspec_kw={"wspace": 0.05})
        for line, row, step in zip(panels, rows, shown.steps, strict=True):
            _draw_image(line[0], own, f"{row['positive']:.2f}", None)
            line[0].set_ylabel(f"step {step}", fontsize=7)
            listed = neighbours(row)
            for k, panel in enumerate(line[1:]):
                if k < len(listed):
                    sample, p = listed[k]
                    _draw_image(panel, shown.pictures[sample], f"{p:.2g}", own.label)
                else:
                    panel.axis("off")
    return figure


def write_figure(path: Path, out: Path) -> list[Path]:
    """Draw a run's rows into `out` as field.png and field.svg."""
    shown = evolution(path)
    name = f"{path.resolve().name}: rows of the persistent field (green: same class)"
    return save(field_figure(shown, name), out, "field")


def _draw_curves(panels: Any, shown: Evolution) -> None:
    left, right = panels
    for number, (key, label) in enumerate(CURVES.items()):
        every = max(1, len(shown.curves[key][0]) // 12)
        left.plot(*shown.curves[key], **style(number).curve, markevery=every, label=label)
    left.set(xlabel="step", ylim=(-0.02, 1.02), title="rows of the batch, means")
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, frameon=False)  # hides no curve
    right.plot(*shown.curves["row_entropy"], color=DARK, linewidth=1.2)
    right.set(xlabel="step", title="entropy of the rows (nats)")


def _draw_image(panel: Any, picture: Picture, text: str, label: int | None) -> None:
    """An image with a number below it, framed by whether its class is `label`."""
    panel.imshow(picture.image, interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    panel.grid(False)
    panel.set_xlabel(text, fontsize=6, labelpad=1)
    frame = DARK if label is None else GOOD if picture.label == label and label >= 0 else GREY
    for spine in panel.spines.values():
        spine.set(visible=True, color=frame, linewidth=1.8)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly spread, first and last among them."""
    return sorted({round(k * (count - 1) / max(1, most - 1)) for k in range(most)})
