"""Pictures from the newest checkpoint and test images: embedding map, nearest neighbours, the field of a batch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rkdo_dist import checkpoint, parts
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.stream import evaluation_stream
from rkdo_dist.evaluate import maps, scores, yardsticks
from rkdo_dist.field.objectives import Objective, rows_of
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies.report.charts import pyplot, saved
from rkdo_dist.studies.report.runs import Run

SAMPLES = 600  # of the test split
FIELD_ROWS = 32
QUERIES, NEIGHBOURS = 8, 6

Array = NDArray[Any]


@dataclass(frozen=True)
class Seen:
    """What the pictures are made from.

    Attributes:
        step: of the checkpoint.
        images: (n, 3, H, W) uint8; labels: (n,); embeddings: (n, d) of the images as they are.
        u, v: (m, d) embeddings of the two held-out views of the first samples, m = `FIELD_ROWS` or fewer.
        classes: names of the labels.
    """

    step: int
    images: Array
    labels: Array
    embeddings: Array
    u: torch.Tensor
    v: torch.Tensor
    classes: list[str]


def look(run: Run) -> Seen:
    """Embed test images by the newest whole checkpoint of a run.

    Raises:
        ValueError, OSError: if there is no checkpoint, or no shards where the run had them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", checkpoint.CheckpointWarning)
        found = checkpoint.load_latest(RunDirectory(run.path).checkpoints)
    if found is None:
        raise ValueError(f"{run.path} has no checkpoint yet")
    config = run.config
    index = parts.open_index(config)
    encoder = parts.make_encoder(config, pretrained=False, code=False)
    encoder.load_state_dict(found.model)
    encoder.eval()
    views = parts.make_views(config, index)
    images, labels, embeddings, pairs = [], [], [], []
    with torch.no_grad():
        for number, block in _blocks(run, index):
            images.append(block.images)
            labels.append(block.labels)
            embeddings.append(encoder(views.plain(block.images)))
            if number == 0:
                few, ids = block.images[:FIELD_ROWS], block.ids[:FIELD_ROWS]
                both = [views(few, ids, yardsticks.SEED, yardsticks.EPOCH, view) for view in (0, 1)]
                pairs = [encoder(view) for view in both]
    return Seen(
        step=found.step,
        images=torch.cat(images).numpy(),
        labels=torch.cat(labels).numpy(),
        embeddings=torch.cat(embeddings).numpy(),
        u=pairs[0],
        v=pairs[1],
        classes=list(index.classes),
    )


def _blocks(run: Run, index: ShardIndex) -> Iterator[tuple[int, Any]]:
    config = run.config
    split = config.evaluate.test_split
    return evaluation_stream(index, split, 200, limit=SAMPLES, size=config.data.image_size or _square(index))


def _square(index: ShardIndex) -> int | None:
    return None if index.image_size is None else index.image_size[0]


def embedding_map(seen: Seen) -> bytes:
    """Principal components and t-SNE side by side, coloured by class (SVG)."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 5.2), constrained_layout=True)
    plane, shares = maps.principal_components(seen.embeddings)
    drawn = [(plane, f"Principal components ({shares[0]:.0%} and {shares[1]:.0%} of the variance)")]
    if len(seen.embeddings) >= 8:
        drawn.append((maps.tsne(seen.embeddings), "t-SNE"))
    colours = plt.get_cmap("tab10" if seen.labels.max() < 10 else "turbo")
    for panel, (points, title) in zip(panels, drawn, strict=False):
        for label in np.unique(seen.labels):
            some = seen.labels == label
            colour = colours(label) if seen.labels.max() < 10 else colours(label / seen.labels.max())
            panel.scatter(*points[some].T, s=11, color=colour, label=_name(seen, label), linewidths=0, alpha=0.85)
        panel.set(title=title, xticks=[], yticks=[])
    if len(np.unique(seen.labels)) <= 20:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=10, frameon=False, markerscale=1.6)
    return saved(figure, "svg")


def _name(seen: Seen, label: int) -> str:
    if label < 0:
        return "no label"
    return seen.classes[label] if label < len(seen.classes) else str(label)


@dataclass(frozen=True)
class Neighbour:
    """One image of a sheet.

    Attributes:
        png: the image.
        name: of its class.
        right: whether that is the query's class.
        cosine: similarity to the query.
    """

    png: bytes
    name: str
    right: bool
    cosine: float


def neighbour_sheet(seen: Seen) -> list[list[Neighbour]]:
    """Rows of a query (first) and its nearest test images by cosine similarity, queries of different classes first."""
    _, firsts = np.unique(seen.labels, return_index=True)
    others = np.setdiff1d(np.arange(len(seen.labels)), firsts)
    queries = np.concatenate([np.sort(firsts), others])[:QUERIES]
    count = min(NEIGHBOURS, len(seen.labels) - 1)
    nearest, squared = scores.nearest(seen.embeddings, seen.embeddings, count, exclude_self=True)
    sheet = []
    for query in queries:
        row = [_neighbour(seen, query, query, 1.0)]
        for other, distance in zip(nearest[query], squared[query], strict=True):
            row.append(_neighbour(seen, query, other, 1 - distance / 2))  # unit rows
        sheet.append(row)
    return sheet


def _neighbour(seen: Seen, query: int, other: int, cosine: float) -> Neighbour:
    out = io.BytesIO()
    Image.fromarray(seen.images[other].transpose(1, 2, 0)).save(out, format="PNG")
    same = bool(seen.labels[query] == seen.labels[other])
    return Neighbour(out.getvalue(), _name(seen, int(seen.labels[other])), same, float(cosine))


def field_maps(seen: Seen, objective: Objective) -> bytes:
    """p(t) and q(t) of a small batch, samples ordered by class (PNG).

    Args:
        objective: of in-batch recursion or static; its first matrix of rows and columns is drawn.
    """
    order = torch.from_numpy(np.argsort(seen.labels[: len(seen.u)], kind="stable"))
    u, v, labels = seen.u[order].double(), seen.v[order].double(), torch.from_numpy(seen.labels)[order]
    found, _ = rows_of(objective, objective.slices[0], u, v, labels)
    learned = [log_q.exp() for log_q in found.log_q]
    return _heat(found.p, learned)


def _heat(supervisory: list[torch.Tensor], learned: list[torch.Tensor]) -> bytes:
    """p above q, a column per level; side by side where there is one level."""
    plt = pyplot()
    depth, (rows, columns) = len(learned), learned[0].shape
    grid = (1, 2) if depth == 1 else (2, depth)
    shape = (2.75 * grid[1] * columns / rows + 1.0, 2.95 * grid[0])
    figure, panels = plt.subplots(*grid, figsize=shape, constrained_layout=True, squeeze=False)
    top = max(float(q.max()) for q in [*supervisory, *learned])
    norm = plt.matplotlib.colors.LogNorm(vmin=0.1 / columns, vmax=max(top, 0.2 / columns), clip=True)
    drawn = None
    named = [(f"{n}({t})", f) for n, fields in (("p", supervisory), ("q", learned)) for t, f in enumerate(fields, 1)]
    for panel, (name, field) in zip(panels.flat, named, strict=True):
        drawn = panel.imshow(field.numpy(), norm=norm, cmap="magma", interpolation="nearest")
        panel.set(title=name, xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        panel.grid(False)
    figure.colorbar(drawn, ax=panels, shrink=0.85, label="probability")
    return saved(figure, "png")
