"""A table in three forms: for the terminal (rich), for programs (CSV) and for documents (Markdown)."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rkdo_dist.files import write_atomic

_WIDTH = 150  # of a table where there is no terminal to fit


@dataclass
class Sheet:
    """A table.

    Attributes:
        name: of its files, without ending.
        title, caption: above and below.
        columns: headings.
        rows: for people, cells of one or more lines.
        data: for programs, a mapping per row; the first one's keys are the columns.
    """

    name: str
    title: str
    columns: Sequence[str]
    caption: str = ""
    rows: list[list[str]] = field(default_factory=list)
    data: list[Mapping[str, Any]] = field(default_factory=list)

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(
            title=escape(self.title), caption=escape(self.caption), title_justify="left", caption_justify="left"
        )
        if any("\n" in cell for row in self.rows for cell in row):
            table.show_lines = True
        else:  # narrow, so that many columns fit a terminal
            table.box, table.pad_edge = box.SIMPLE_HEAD, False
            table.padding = (0, 1, 0, 0)
        for number, column in enumerate(self.columns):
            table.add_column(escape(column), justify="left" if number == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def csv(self) -> str:
        """For programs; full precision, empty cells for what there is not."""
        text = io.StringIO()
        if self.data:
            writer = csv.DictWriter(text, list(self.data[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: "" if v != v else v for k, v in row.items()} for row in self.data)
        return text.getvalue()

    def markdown(self) -> str:
        """For documents."""
        lines = [f"**{self.title}**", "", _line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", *([self.caption, ""] if self.caption else [])]) + "\n"

    def save(self, folder: Path) -> None:
        """Write `name`.csv and `name`.md into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{self.name}.csv", self.csv())
        write_atomic(folder / f"{self.name}.md", self.markdown())


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"


def console() -> Console:
    """Standard output; wide enough for our tables where it is not a terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=_WIDTH)


def show(console: Console, sheets: Sequence[Sheet]) -> None:
    """Print the tables that have rows."""
    for sheet in sheets:
        if sheet.rows:
            console.print(sheet.rich())


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, NaN where there are too few values."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def number(value: float | None, digits: int = 4) -> str:
    """A number, with an exponent where no digit would show; a dash for None and NaN."""
    if value is None or value != value:
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 10**-digits / 2 else f"{value:.{digits}f}"


def spread(mean: float, sd: float, digits: int = 4) -> str:
    """mean ± sd; the mean alone if there is no spread, a dash if there is nothing."""
    return number(mean, digits) if sd != sd else f"{number(mean, digits)} ± {number(sd, digits)}"


def of_values(values: Sequence[float | None], digits: int = 4, percent: bool = False) -> str:
    """mean ± sd of the values that there are."""
    mean, sd = mean_sd([(100 if percent else 1) * value for value in values if value is not None])
    return spread(mean, sd, digits) + (" %" if percent and mean == mean else "")
