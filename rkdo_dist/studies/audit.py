"""An audit of supervisors (`rkdo audit`) for people: a table, a figure, and what may be expected of such rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rkdo_dist import documents
from rkdo_dist.studies import plots
from rkdo_dist.studies.palette import GREY, style
from rkdo_dist.studies.sheets import Sheet, number

FILE = "audit.json"
# Measured (docs/audit.md): change of k-NN accuracy for each unit of a row's precision, where errors are random; the
# precision at which such rows break even, on a weaker and on a stronger base; what a teacher's own errors cost more.
SLOPE, BREAK_EVEN, OWN_ERRORS = 0.07, (0.26, 0.5), 0.021
_SHARE = documents.maybe(documents.NUMBER)
_KIND = documents.shape(
    group=documents.TEXT, view=documents.TEXT, precision=_SHARE, error=_SHARE, rows=documents.NUMBER,
    **{f"{name}_": documents.NUMBER for name in ("temperature", "k", "steps", "visits")}, mean_=documents.TEXT,
)  # fmt: skip
_NEEDED = {"view": ("temperature",), "memory": ("mean", "visits"), "walk": ("steps", "k")}  # by group; else k


def _row(value: Any, place: str) -> str:
    """A kind of rows, with what its group's name is made of."""
    if wrong := _KIND(value, place):
        return wrong
    if value["group"] not in _GROUPS:
        return f"{place}.group is {value['group']!r:.20}, none of {', '.join(_GROUPS)}"
    missing = [key for key in _NEEDED.get(value["group"], ("k",)) if key not in value]
    return f"{place}.{missing[0]} is missing" if missing else ""


def _best(value: Any, place: str) -> str:
    return _row(value, place) or documents.NUMBER(value["precision"], f"{place}.precision")


_WHOLE = documents.shape(
    **dict.fromkeys(("step", "samples", "of", "seed", "batch"), documents.COUNT),
    split=documents.TEXT,
    temperature=documents.NUMBER,
    base=documents.maybe(documents.NUMBER),
    student=_SHARE,
    kept=documents.SHARE,
    best=documents.maybe(_best),
    rows=documents.list_of(_row),
    unlabelled=documents.shape(
        mutual=documents.object_of(documents.NUMBER), overlap=documents.object_of(documents.NUMBER)
    ),
)
_GROUPS = {
    "view": "all samples",
    "neighbours": "nearest",
    "mutual": "mutual nearest",
    "walk": "walk",
    "memory": "memory",
}


def _form(value: Any, place: str) -> str:
    """An audit; where rows are graded there is a grade of uniform ones too."""
    wrong = _WHOLE(value, place)
    return wrong or ("" if value["best"] is None else documents.NUMBER(value["base"], "base"))


def find(run: Path) -> dict[str, Any] | None:
    """The audit that lies in a run directory, RUN/audit/audit.json or RUN/audit.json; None if there is none.

    Raises:
        ValueError: if it cannot be read.
    """
    for path in (run / "audit" / FILE, run / FILE):
        if path.exists():
            return documents.read(path, _form, "audit the run again")
    return None


def name(row: dict[str, Any]) -> str:
    """What distinguishes a kind of row, in words."""
    if row["group"] == "view":
        return f"tau {row['temperature']:g}"
    if row["group"] == "memory":
        return f"{row['mean']}, {row['visits']} visits"
    return f"{row['steps']} steps, k {row['k']}" if row["group"] == "walk" else f"k {row['k']}"


def table(audit: dict[str, Any]) -> Sheet:
    """All kinds of rows, within 80 columns."""
    rows = [
        [
            _GROUPS[row["group"]],
            row["view"],
            name(row),
            number(row["precision"], 3),
            number(row["error"], 3),
            f"{row['rows']:.0%}",
        ]
        for row in audit["rows"]
    ]
    title = f"Supervisors at step {audit['step']}: mass on a sample's own class"
    return Sheet("audit", title, ("row over", "view", "kind", "share", "s.e.", "samples"), "", rows, names=3)


def sentences(audit: dict[str, Any]) -> list[str]:
    """What the audit says, and the limits of what it can say."""
    mutual = ", ".join(f"{share:.2f} (k {k})" for k, share in audit["unlabelled"]["mutual"].items())
    overlap = ", ".join(f"{share:.2f} ({view})" for view, share in audit["unlabelled"]["overlap"].items())
    said = [
        f"{audit['samples']:,} of {audit['of']:,} samples of {audit['split']}, seed {audit['seed']}; rows over these "
        "alone, of which fewer make poorer neighbours.",
        f"Without labels: share of mutual neighbours {mutual}; overlap of the rows of two views {overlap}.",
        f"Dilution: restricted to a batch of {audit['batch']}, a row keeps {audit['kept']:.2%} of its relational mass, "
        f"so a row that is half relation is {1 / (1 + audit['kept']):.1%} identity.",
    ]
    if audit["best"] is None:
        return [*said, "The samples have no labels, so the rows cannot be graded."]
    best = audit["best"]
    low, high = BREAK_EVEN
    view = f"{_GROUPS[best['group']]}, {best['view']} view, {name(best)}"
    said.append(
        f"Best rows: {best['precision']:.3f} ({view}); uniform rows have {audit['base']:.3f}, the student's own rows "
        f"{number(audit['student'], 3)}, and a relation transfers the difference to the latter."
    )
    verdict = "no gain is to be expected" if best["precision"] < high else "a gain is possible, not certain"
    said.append(
        f"Worth: {verdict}. In our measurements (docs/audit.md: photographs, ResNet-8, 15 epochs) rows with random "
        f"errors changed k-NN accuracy by {SLOPE:+.2f} per unit above a precision of {low} (on a stronger base they "
        f"broke even near {high}): {SLOPE * (best['precision'] - low):+.3f} here; a teacher's own errors cost "
        f"another {OWN_ERRORS}. One data set, one length, few seeds: an indication, not a prediction."
    )
    return said


def figure(audit: dict[str, Any]) -> Any:
    """A matplotlib figure: precision by view and temperature, and of all other kinds of rows; None without labels."""
    if audit["best"] is None:
        return None
    drawn, (left, right) = plots.panels(1, 2, (10.5, 4.6))
    looks = {view: style(n) for n, view in enumerate(("plain", "strong", "weak"))}
    for view, look in looks.items():
        line = [row for row in audit["rows"] if row["group"] == "view" and row["view"] == view]
        size = {"markersize": 9 - 2 * list(looks).index(view), "fillstyle": "none"}  # lines that coincide are all seen
        points = [row["temperature"] for row in line], [row["precision"] for row in line]
        left.plot(*points, **{**look.curve, **size}, label=view)
    left.set_xscale("log")
    ticks = sorted({row["temperature"] for row in audit["rows"] if row["group"] == "view"})
    left.set_xticks(ticks, [f"{tau:g}" for tau in ticks], minor=False)
    left.minorticks_off()
    left.set_xlabel("temperature of the teacher")
    left.set_ylabel("mass on the sample's own class")
    left.set_title("Rows over all samples, by view")
    others = [row for row in audit["rows"] if row["group"] != "view"]
    places = range(len(others))
    for place, row in zip(places, others, strict=True):
        width, error = (row[key] or 0 for key in ("precision", "error"))
        right.barh(place, width, xerr=error, height=0.7, error_kw={"elinewidth": 0.8}, **looks[row["view"]].bar)
    right.set_yticks(places, [f"{_GROUPS[row['group']]}, {name(row)} ({row['view']})" for row in others])
    right.invert_yaxis()
    right.set_title(f"Other rows (temperature {audit['temperature']:g})")
    right.set_xlabel("mass on the sample's own class")
    left.axhline(audit["base"], color=GREY, linestyle=":", label="uniform rows")
    right.axvline(audit["base"], color=GREY, linestyle=":")
    top = max(row["precision"] for row in audit["rows"] if row["precision"] is not None)
    if not math.isclose(top, 0):
        left.set_ylim(0, 1.1 * top)
    plots.legend_below(drawn)
    return drawn
