"""Progress display."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(console: Console, **options: Any) -> Progress:
    """The project's one kind of progress display."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
        **options,
    )


@contextlib.contextmanager
def counting(console: Console, title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on a terminal, and the function that moves it: (done, total, note)."""
    with progress_bar(console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, note="")

        def progress(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield progress
