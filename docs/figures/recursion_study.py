"""The figure of the recursion study: differences from InfoNCE with their 95 % margins, read from the page's own tables.

python docs/figures/recursion_study.py        writes docs/figures/recursion_study.svg
"""

from __future__ import annotations

import re
from pathlib import Path

from rkdo_dist.studies.palette import BAD, DARK, style
from rkdo_dist.studies.plots import encoded, panels

PAGE = Path(__file__).resolve().parent.parent / "recursion-study.md"
CELL = re.compile(r"([+-]?\d\.\d+) ± (\d\.\d+)")


def studies(text: str) -> dict[str, list[tuple[str, list[tuple[float, float]]]]]:
    """By heading: (supervisor, (difference, margin) of each score), without the row of InfoNCE itself."""
    found = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        rows = []
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            values = [CELL.fullmatch(cell) for cell in cells[1:]]
            if line.startswith("|") and values and all(values) and cells[0] != "InfoNCE":
                rows.append((cells[0], [(float(v[1]), float(v[2])) for v in values if v]))
        if rows:
            found[section.splitlines()[0]] = rows
    return found


def main() -> None:
    """One panel for each score, one line for each supervisor and study."""
    found = studies(PAGE.read_text(encoding="utf-8"))
    scores = ["k-NN (embedding)", "linear (embedding)", "linear (backbone)"]
    figure, axes = panels(1, 3, (10, 5.2), sharex=True, sharey=True)
    place, ticks, labels = 0.0, [], []
    for title, rows in found.items():
        ticks.append(place)
        labels.append(title.upper())
        place += 1
        for name, values in rows:
            for axis, (difference, margin) in zip(axes, values, strict=True):
                clear = abs(difference) > margin
                look = {"color": BAD, "fmt": "D"} if clear else {"color": style(0).colour, "fmt": "o", "mfc": "white"}
                axis.errorbar(difference, place, xerr=margin, ms=5, **look)
            ticks.append(place)
            labels.append(name)
            place += 1
    for axis, score in zip(axes, scores, strict=True):
        axis.axvline(0, color=DARK, lw=1)
        axis.set(title=score, xlabel="accuracy minus InfoNCE's")
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(ticks, labels)
    axes[0].invert_yaxis()
    Path(__file__).with_suffix(".svg").write_bytes(encoded(figure, "svg"))


if __name__ == "__main__":
    main()
