"""The project's one palette. Colours differ for colour-blind eyes too, and none is ever the only sign.

Every pair of colours is told apart with red, green or blue cones missing, and every one stands out from white paper
(`tests/test_figures.py` computes both). What has a number has a colour, a marker and a line.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rkdo_dist.field.presets import PRESETS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c25b94", "#333333", "#3f9bdc", "#7a4b00", "#5b2a86")
MARKERS = "os^DvPX*"
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo", "||")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (4, 1.2, 1, 1.2)), (0, (2, 1)))
DARK, GREY = "#222222", "#76808a"  # what is compared with; what is aside
GOOD, BAD = COLOURS[2], COLOURS[1]
FIELD = "magma"  # of maps of numbers, dark for little
PAGE = {  # of pages, by `prefers-color-scheme`; figures stay on white paper
    "light": {"paper": "#ffffff", "ink": "#1d2326", "soft": "#5b6468", "line": "#d9dee0", "accent": "#00639a"}
    | {"good": "#007a59", "bad": "#b84f00"},
    "dark": {"paper": "#16191b", "ink": "#e6e9ea", "soft": "#a7b0b4", "line": "#3a4145", "accent": "#63b3e4"}
    | {"good": "#3fc79e", "bad": "#f08c45"},
}
_FIRST = ("rkdo", "icon", "infonce")  # objectives that are seen together most


class Style(NamedTuple):
    """How one item of a figure is drawn."""

    colour: str
    marker: str
    line: Any

    @property
    def points(self) -> dict[str, Any]:
        """Options of points, for `plot` and `errorbar`."""
        return {"color": self.colour, "marker": self.marker}

    @property
    def curve(self) -> dict[str, Any]:
        """Options of points with a line through them."""
        return {**self.points, "linestyle": self.line, "markersize": 4.5}

    @property
    def bar(self) -> dict[str, Any]:
        """Options of bars."""
        hatch = HATCHES[COLOURS.index(self.colour)]
        return {"color": self.colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.6}


def style(number: int) -> Style:
    """Of the n-th item of a figure: no two of the first 64 are alike."""
    turn, place = divmod(number, len(COLOURS))
    return Style(COLOURS[place], MARKERS[(place + turn) % len(MARKERS)], LINES[(place + turn) % len(LINES)])


def of_objective(name: str) -> Style:
    """Of an objective, the same in every figure.

    Args:
        name: a key of `field.presets.PRESETS`.
    """
    return style([*_FIRST, *(other for other in PRESETS if other not in _FIRST)].index(name))
