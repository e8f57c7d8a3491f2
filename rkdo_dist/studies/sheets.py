"""A table in three forms: for the terminal (rich), for programs (CSV) and for documents (Markdown)."""

from __future__ import annotations

import csv
import io
import math
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rkdo_dist.console import Terminal
from rkdo_dist.files import write_atomic

WIDTH = 80  # of tables and sentences where there is no terminal to fit
_GAP = 2  # between columns


@dataclass
class Sheet:
    """A table.

    Attributes:
        name: of its files, without ending.
        title, caption: above and below.
        columns: headings; columns with the same words before a line break belong together.
        rows: for people.
        data: for programs, a mapping per row; the first one's keys are the columns.
        names: how many of the first columns name a row.
    """

    name: str
    title: str
    columns: Sequence[str]
    caption: str = ""
    rows: list[list[str]] = field(default_factory=list)
    data: list[Mapping[str, Any]] = field(default_factory=list)
    names: int = 1

    def rich(self, width: int = WIDTH) -> Group:
        """For the terminal: no cell is ever broken; what is wider than `width` goes on below, with the names again."""
        shown: list[RenderableType] = [Text(self.title, "bold"), Text()]
        for columns in self._parts(width):
            shown += [self._block(columns, width), Text()]
        return Group(*shown, *([Text(self.caption, "dim"), Text()] if self.caption else []))

    def _head(self, column: int) -> str:
        """A heading, broken between words where its cells are narrower."""
        room = max([10, *(cell_len(row[column]) for row in self.rows)])
        lines = (textwrap.wrap(line, room, break_long_words=False) for line in self.columns[column].split("\n"))
        return "\n".join(part for line in lines for part in line)

    def _width(self, column: int) -> int:
        return max(cell_len(text) for text in (*self._head(column).split("\n"), *(r[column] for r in self.rows)))

    def _parts(self, width: int) -> Iterator[list[int]]:
        """Columns that stand side by side, the names among them."""
        names = list(range(self.names))
        left = room = width - sum(self._width(c) + _GAP for c in names) + _GAP
        part: list[int] = []
        rest = range(self.names, len(self.columns))
        for _, together in groupby(rest, lambda c: self.columns[c].partition("\n")[0]):
            some = list(together)
            need = sum(self._width(c) + _GAP for c in some)
            pieces = [some] if need <= room else [[c] for c in some]
            for piece in pieces:
                need = sum(self._width(c) + _GAP for c in piece)
                if part and need > left:
                    yield names + part
                    part, left = [], room
                part, left = part + piece, left - need
        yield names + part

    def _block(self, columns: Sequence[int], width: int) -> Table:
        """Some columns; only a single one that has more words than a line has room for is broken, between words."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
        fits = sum(self._width(c) + _GAP for c in columns) - _GAP <= width
        for c in columns:
            cells = [row[c] for row in self.rows]
            numbers = c >= self.names and any(cell.lstrip("+-")[:1].isdigit() for cell in cells)
            kept = fits or c < self.names
            table.add_column(Text(self._head(c)), justify="right" if numbers else "left", no_wrap=kept)
        for row in self.rows:
            table.add_row(*(Text(row[c]) for c in columns))
        return table

    def csv(self) -> str:
        """For programs; full precision, empty cells for what there is not."""
        return as_csv([{k: "" if v != v else v for k, v in row.items()} for row in self.data])

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


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys with a line of their names; empty if there are none."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def console() -> Console:
    """Standard output: as wide as the terminal, 80 columns where there is none."""
    found = Terminal()
    return found if found.is_terminal else Terminal(width=WIDTH)


def show(console: Console, sheets: Sequence[Sheet]) -> None:
    """Print the tables that have rows."""
    for sheet in sheets:
        if sheet.rows:
            console.print(sheet.rich(console.width))


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
    shown = number(mean, digits)
    return shown if sd != sd else f"{shown} ± {sd:.1e}" if "e" in shown else f"{shown} ± {sd:.{digits}f}"


def of_values(values: Sequence[float | None], digits: int = 4, percent: bool = False) -> str:
    """mean ± sd of the values that there are."""
    mean, sd = mean_sd([(100 if percent else 1) * value for value in values if value is not None])
    if percent and mean == mean:
        return f"{mean:z.{digits}f} %" if sd != sd else f"{mean:z.{digits}f} ± {sd:.{digits}f} %"
    return spread(mean, sd, digits)
