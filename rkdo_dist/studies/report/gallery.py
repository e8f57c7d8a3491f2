"""The page's pictures of each configuration: embedding map, nearest neighbours, and its field."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rkdo_dist import parts
from rkdo_dist.studies import field_figure
from rkdo_dist.studies.report import charts, pictures
from rkdo_dist.studies.report.html import Element, figure, image, joined, section, tag
from rkdo_dist.studies.report.runs import Group, Run

_PICTURED = 4  # groups with pictures, at most


def sections(groups: Sequence[Group], progress: Callable[[str], None]) -> list[Element]:
    """A section of pictures for each of the first groups; where they cannot be made, it says why."""
    made = []
    for group in groups[:_PICTURED]:
        run = group.runs[0]
        progress(f"pictures of {group.label}")
        title, name = f"Pictures: {group.label}", f"pictures-{group.number}"
        try:
            seen = pictures.look(run)
        except (ValueError, OSError) as error:
            text = f"No pictures: they need the newest checkpoint and the shards. {error}"
            made.append(section(title, name, tag("p", text, class_="remark")))
            continue
        about = f"Seed {run.seed}, checkpoint of step {seen.step}, the first {len(seen.images)} test images."
        drawn = [
            figure(
                pictures.embedding_map(seen),
                "svg+xml",
                "Embedding map",
                f"{about} For the eye: distances in t-SNE mean little.",
            ),
            _sheet(pictures.neighbour_sheet(seen)),
        ]
        if run.config.field.recursion == "in_batch":
            objective = parts.make_objective(run.config, 1.0)
            text = (
                f"The field of {len(seen.u)} test pairs ordered by class, rows against columns, logarithmic colours: "
                "supervisory rows p, then learned rows q, by level."
            )
            drawn.append(figure(pictures.field_maps(seen, objective), "png", "Field heat maps", text))
        else:
            drawn.append(_rows(run))
        made.append(section(title, name, *drawn))
    return made


def _rows(run: Run) -> Element:
    """How rows of a persistent field have evolved (test samples have none, so there are no heat maps)."""
    try:
        shown = field_figure.evolution(run.path)
    except (ValueError, OSError) as error:
        return tag("p", f"No picture of the rows: {error}", class_="remark")
    text = (
        f"Rows of the persistent field, seed {run.seed}: what they are made of at every step, and some training "
        "samples with their nearest stored neighbours at checkpoints (probabilities below; green: the same class)."
    )
    return figure(charts.saved(field_figure.field_figure(shown, ""), "png"), "png", "Rows of the field", text)


def _sheet(sheet: list[list[pictures.Neighbour]]) -> Element:
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
