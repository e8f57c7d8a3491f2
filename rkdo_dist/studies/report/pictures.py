"""Pictures of each configuration: embedding map, nearest neighbours, and its field, from the newest checkpoint."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rkdo_dist import checkpoint, parts
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.stream import evaluation_stream
from rkdo_dist.evaluate import common_metrics, maps, scores
from rkdo_dist.field.objectives import Objective, rows_of
from rkdo_dist.history import History
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies import field_figure
from rkdo_dist.studies.field_figure import SAME_CLASS
from rkdo_dist.studies.html import Element, figure, image, joined, section, tag
from rkdo_dist.studies.palette import FIELD
from rkdo_dist.studies.plots import clouds, encoded, legend_below, panels, pieces, pyplot
from rkdo_dist.studies.report.groups import Group

PICTURED = 4  # groups with pictures, at most
SAMPLES = 600  # of the test split
FIELD_ROWS = 32
QUERIES, NEIGHBOURS = 8, 6

Array = NDArray[Any]


@dataclass(frozen=True)
class Seen:
    """Data for the pictures.

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


def sections(groups: Sequence[Group], progress: Callable[[str], None]) -> list[Element]:
    """A section of pictures for each of the first groups; where they cannot be made, it says why."""
    made = []
    for group in groups[:PICTURED]:
        run = group.runs[0]
        progress(f"pictures of {group.label}")
        title, name = f"Pictures: {group.label}", f"pictures-{group.number}"
        try:
            seen = look(run)
        except (ValueError, OSError) as error:
            text = f"No pictures: they need the newest checkpoint and the shards. {error}"
            made.append(section(title, name, tag("p", text, class_="remark")))
            continue
        about = f"Seed {run.seed}, checkpoint of step {seen.step}, the first {len(seen.images)} test images."
        drawn = [
            figure(
                pieces(embedding_map(seen), "svg"),
                "svg",
                "Embedding map",
                f"{about} For illustration: distances in t-SNE mean little.",
            ),
            _sheet(neighbour_sheet(seen)),
        ]
        if run.config.field.recursion != "persistent":
            last = run.records[-1] if run.records else {}
            objective = parts.as_recorded(run.config, parts.make_objective(run.config, 1.0), last)
            text = (
                f"The field of {len(seen.u)} test pairs ordered by class, rows against columns, logarithmic colours "
                "that are the same for all runs: supervisory rows p, then learned rows q, by level."
            )
            shown = pieces(field_maps(seen, objective), "png")
            drawn.append(figure(shown, "png", "Field heat maps", text, "panels small"))
        else:
            drawn += _rows(run)
        made.append(section(title, name, *drawn))
    return made


def _rows(run: History) -> list[Element]:
    """How rows of a persistent field have evolved (test samples have none, so there are no heat maps)."""
    try:
        shown = field_figure.evolution(run.path)
    except (ValueError, OSError) as error:
        return [tag("p", f"No picture of the rows: {error}", class_="remark")]
    curves, *samples = field_figure.parts(shown)
    text = f"Rows of the persistent field, seed {run.seed}: their composition at every step."
    words = f"Some training samples, their nearest stored neighbours at checkpoints and probabilities ({SAME_CLASS})."
    rows = [("", encoded(one, "png")) for one in samples]
    return [
        figure(pieces(curves, "svg"), "svg", "Composition of the rows", text),
        figure(rows, "png", "Rows of the field", words, "panels large"),
    ]


def _sheet(sheet: list[list[Neighbour]]) -> Element:
    rows = []
    for row in sheet:
        cells = []
        for n, one in enumerate(row):
            kind = "query" if n == 0 else "right" if one.right else "wrong"
            words_ = [one.name] if n == 0 else [one.name, f"{one.cosine:.2f}"]
            picture = image(one.png, "png", one.name, width=56, class_="pixels")
            label = tag("span", joined(words_, " "))
            cells.append(tag("td", picture, label, class_=kind))
        rows.append(tag("tr", *cells))
    text = "Left: test images. Right: their nearest test images by cosine similarity; a wrong class is marked."
    box = tag("div", tag("table", tag("tbody", *rows), class_="sheet"), class_="wide")
    return tag("figure", box, tag("figcaption", text))


def look(run: History) -> Seen:
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
                both = [views(few, ids, common_metrics.SEED, common_metrics.EPOCH, view) for view in (0, 1)]
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


def _blocks(run: History, index: ShardIndex) -> Iterator[tuple[int, Any]]:
    config = run.config
    split = config.evaluate.test_split
    return evaluation_stream(index, split, 200, limit=SAMPLES, size=config.data.image_size or _square(index))


def _square(index: ShardIndex) -> int | None:
    return None if index.image_size is None else index.image_size[0]


def embedding_map(seen: Seen) -> Any:
    """A figure of principal components and t-SNE side by side, coloured by class."""
    drawing, axes = panels(1, 2, (8.4, 5.0))
    plane, shares = maps.principal_components(seen.embeddings)
    drawn = [(plane, f"PCA: {shares[0]:.0%} and {shares[1]:.0%} of the variance")]
    if len(seen.embeddings) >= 8:
        drawn.append((maps.tsne(seen.embeddings), "t-SNE"))
    for panel, (points, title) in zip(axes, drawn, strict=False):
        clouds(panel, points, seen.labels, partial(_name, seen))
        panel.set(title=title, xticks=[], yticks=[])
    for panel in axes[len(drawn) :]:
        panel.remove()
    if len(np.unique(seen.labels)) <= 20:
        legend_below(drawing)
    return drawing


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


def field_maps(seen: Seen, objective: Objective) -> Any:
    """A figure of p(t) and q(t) of a small batch, samples ordered by class.

    Args:
        objective: of in-batch recursion or static; its first matrix of rows and columns is drawn.
    """
    order = torch.from_numpy(np.argsort(seen.labels[: len(seen.u)], kind="stable"))
    u, v, labels = seen.u[order].double(), seen.v[order].double(), torch.from_numpy(seen.labels)[order]
    found, _ = rows_of(objective, objective.slices[0], u, v, labels)
    learned = [log_q.exp() for log_q in found.log_q]
    return _heat(found.p, learned)


def _heat(supervisory: list[torch.Tensor], learned: list[torch.Tensor]) -> Any:
    """p above q, a column per level; side by side where there is one level."""
    depth, (rows, columns) = len(learned), learned[0].shape
    grid = (1, 2) if depth == 1 else (2, depth)
    drawing, axes = panels(*grid, (2.4 * grid[1] * columns / rows, 2.6 * grid[0] + 0.6))
    norm = pyplot().matplotlib.colors.LogNorm(vmin=0.1 / columns, vmax=1, clip=True)  # the same for all runs
    drawn = None
    named = [(f"{n}({t})", f) for n, fields in (("p", supervisory), ("q", learned)) for t, f in enumerate(fields, 1)]
    for panel, (name, field) in zip(axes, named, strict=True):
        drawn = panel.imshow(field.numpy(), norm=norm, cmap=FIELD, interpolation="nearest")
        panel.set(title=name, xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
        panel.grid(False)
    drawing.colorbar(drawn, ax=axes, location="bottom", aspect=30, label="probability")
    return drawing
