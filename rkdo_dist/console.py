"""Progress display."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from rkdo_dist.printable import printable


class Terminal(Console):
    """A console whose texts steer nothing: of a name that holds control characters they are seen, not obeyed."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich renders it; only rich's own control codes stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def say(console: Console, text: str, style: str = "") -> None:
    """One line for people, in one piece and as it stands: a path in it may be called `[/red]`."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def progress_bar(console: Console, **options: Any) -> Progress:
    """The project's one kind of progress display."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        **options,
    )


def training_bar(console: Console, **options: Any) -> Progress:
    """The display of a training run: what is told beside it gets the room, at 80 columns too."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),  # gives way to the others
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        **options,
    )


@contextlib.contextmanager
def counting(console: Console | None, title: str, transient: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on a terminal, and the function that moves it: (done, total, note). None shows nothing."""
    if console is None:
        yield lambda done, total, note: None
        return
    with progress_bar(console, disable=not console.is_terminal, transient=transient) as bar:
        task = bar.add_task(title, total=None, note="")

        def progress(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield progress


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table whose first column is text and whose others are numbers; nothing in it is read as markup."""
    made = Table(title=Text(title))
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made
