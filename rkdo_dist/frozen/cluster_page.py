"""The page of a clustering: scores beside k-means, a map of the samples, sizes and examples of the clusters."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.source import open_source
from rkdo_dist.frozen.features import Features
from rkdo_dist.frozen.mapping import tsne
from rkdo_dist.studies import html, plots
from rkdo_dist.studies.field_figure import pictures_of
from rkdo_dist.studies.html import Element, figure, image, section, tag
from rkdo_dist.studies.sheets import number

MAPPED = 500  # samples of the map, evenly spaced
SHOWN, EXAMPLES = 40, 8  # clusters with examples, the largest; examples of each

Array = NDArray[Any]


@dataclass(frozen=True)
class Clustering:
    """A finished clustering.

    Attributes:
        data: what was clustered.
        values: (n, f), as they were used.
        assignments: (n,) clusters by falling size.
        phi: (n, C) probabilities of the clusters.
        result: the content of clusters.json.
    """

    data: Features
    values: Array
    assignments: Array
    phi: Array
    result: dict[str, Any]


def write_page(out: Path, found: Clustering, images: str | None = None) -> None:
    """Write clusters.html, clusters.png and clusters.svg into `out`.

    Args:
        images: as data.source, for pictures of the examples.

    Raises:
        ValueError: if the pictures cannot be read or are not those of the features.
    """
    drawn = map_figure(found)
    shown = None
    if drawn is not None:
        plots.save(drawn, out, "clusters")
        caption = f"{min(MAPPED, len(found.values)):,} samples, t-SNE, for illustration only."
        shown = section("Map", "map", figure(plots.pieces(drawn, "png"), "png", "Map of clusters", caption))
    result = found.result
    scope = f"{result['samples']:,} samples, {result['width']:,} features, seed {result['seed']}."
    html.write(
        out / "clusters.html",
        "clusters - rkdo",
        tag("header", tag("h1", f"{result['clusters']} clusters"), tag("p", scope, class_="scope")),
        section("Agreement with the labels", "scores", *_scores(result)),
        shown,
        section("Examples", "examples", *_examples(found, images)),
        section("Settings", "settings", html.table(("setting", "value"), _settings(result), "text")),
    )


def map_figure(found: Clustering) -> Any:
    """A matplotlib figure: samples coloured by cluster, and by label where labels are known; None for a few samples."""
    chosen = np.unique(np.linspace(0, len(found.values) - 1, MAPPED).astype(int))
    if len(chosen) < 8:
        return None
    plane = tsne(found.values[chosen])
    if not np.isfinite(plane).all():
        return None
    parts = [("cluster", found.assignments[chosen])]
    if len(found.data.known()):
        parts.append(("label", found.data.labels[chosen]))  # type: ignore[index]
    drawn, axes = plots.panels(1, len(parts), (5.2 * len(parts), 5.0))
    for panel, (name, groups) in zip(axes, parts, strict=True):
        panel.set_title(f"by {name}")
        plots.bare(panel)
        called = partial(_class_name, found.data) if name == "label" else str
        for place, text in plots.clouds(panel, plane, groups, called):
            plots.named(panel, place, text)
    return drawn


def _class_name(data: Features, label: int) -> str:
    return data.classes[label] if label < len(data.classes) else str(label)


def _scores(result: dict[str, Any]) -> list[Element]:
    both = (("heads", result), ("k-means", result["kmeans"]))
    rows = [[name, *(number(some[key]) for key in ("accuracy", "nmi", "ari"))] for name, some in both]
    if not result["labelled"]:
        said = tag("p", "No labels are known, so there is nothing to compare with.")
    else:
        said = html.table(("", "accuracy (Hungarian)", "NMI", "ARI"), rows)
    balance = result["balance"]
    sizes = (
        f"Clusters hold {balance['smallest']:,} to {balance['largest']:,} samples, {balance['empty']} are empty; the "
        f"entropy of their sizes is {balance['entropy']:.3f} of the largest possible. Loss against p(0) "
        f"{result['loss']:.4f}, the smallest of {len(result['losses'])} heads."
    )
    control = tag("p", "Control: neighbours are random samples; this is no evidence.", class_="remark")
    return [said, tag("p", sizes, class_="note"), *([control] if result["request"]["control"] != "none" else [])]


def _settings(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, "default" if value is None else str(value)) for name, value in result["request"].items()]
    rows += [(name, str(value)) for name, value in result["machine"].items()]
    return rows + [(f"seconds: {name}", str(value)) for name, value in result["seconds"].items()]


def _examples(found: Clustering, images: str | None) -> list[Element]:
    """For each of the largest clusters its most probable samples: pictures where there are any, else names."""
    clusters = [c for c in range(min(SHOWN, found.phi.shape[1])) if (found.assignments == c).any()]
    chosen = {}
    for c in clusters:
        members = np.flatnonzero(found.assignments == c)
        chosen[c] = members[np.argsort(-found.phi[members, c], kind="stable")][:EXAMPLES].tolist()
    pictures = _pictures(found.data, sorted({k for some in chosen.values() for k in some}), images)
    rows = []
    for c, some in chosen.items():
        size = int((found.assignments == c).sum())
        head = tag("td", tag("span", f"cluster {c}"), tag("span", f"{size:,} samples"), class_="query")
        rows.append(tag("tr", head, *(_cell(found, k, c, pictures.get(k)) for k in some)))
    text = f"The {EXAMPLES} most probable samples of each cluster, with their names, labels and probabilities."
    if len(clusters) < found.phi.shape[1]:
        text += f" The {len(clusters)} largest of {found.phi.shape[1]} clusters."
    return [
        tag("div", tag("table", tag("tbody", *rows), class_="sheet"), class_="wide"),
        tag("p", text, class_="note"),
    ]


def _cell(found: Clustering, sample: int, cluster: int, picture: Array | None) -> Element:
    data = found.data
    words = [str(data.keys[sample]) if data.keys is not None else str(sample)]
    if len(data.known()) and data.labels[sample] >= 0:  # type: ignore[index]
        words.append(f"label {_class_name(data, int(data.labels[sample]))}")  # type: ignore[index]
    words.append(f"p {found.phi[sample, cluster]:.2f}")
    shown = image(_png(picture), "png", words[0], width=56) if picture is not None else None
    return tag("td", shown, *(tag("span", word) for word in words))


def _pictures(data: Features, samples: list[int], images: str | None) -> dict[int, Array]:
    """Pictures (H, W) or (H, W, 3) uint8 by sample."""
    if images is None:
        return {} if data.pictures is None else {k: data.pictures[k] for k in samples}
    index, splits = source_of(data, images), np.asarray(data.splits)
    found: dict[int, Array] = {}
    for name in dict.fromkeys(splits[samples].tolist()):
        positions = np.flatnonzero(splits == name)
        wanted = [k for k in samples if splits[k] == name]
        places = np.searchsorted(positions, wanted).tolist()
        seen = pictures_of(index, name, None, places)
        found |= {k: seen[place].image for k, place in zip(wanted, places, strict=True)}
    return found


def source_of(data: Features, images: str) -> ShardIndex:
    """The index of the samples' pictures.

    Raises:
        ValueError: if there are no such pictures, or not as many as there are features of a split.
    """
    if data.splits is None:
        raise ValueError("--images needs features with `splits`, as `rkdo embed` writes them")
    index = open_source(images, workers=False)
    for name, count in zip(*np.unique(data.splits, return_counts=True), strict=True):
        if index.split(str(name)).samples != count:
            raise ValueError(
                f"--images {images} has {index.split(str(name)).samples} samples in split {name}, the features have "
                f"{count}: they are not of these pictures"
            )
    return index


def _png(picture: Array) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()
