"""Diagnostics: the logger `rkdo_dist`, whose records become lines on standard error. Results go to standard output.

A long run must not end because nobody reads its lines any more: `lasting_output` drops what cannot be written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from rkdo_dist.addresses import said
from rkdo_dist.printable import printable

logger = logging.getLogger("rkdo_dist")
_LEVELS = {logging.WARNING: "warning: ", logging.ERROR: "error: "}


class Lines(logging.Handler):
    """Diagnostics as lines on standard error, without secrets, with the process's rank unless that is zero.

    A record's attribute `rank` (`extra={"rank": 1}`) says that it speaks for another rank.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, whatever the message holds."""
        rank = getattr(record, "rank", os.environ.get("RANK", "0"))
        prefix = "rkdo" if str(rank) == "0" else f"rkdo [rank {rank}]"
        text = printable(said(" ".join(record.getMessage().split())))
        print(f"{prefix}: {_LEVELS.get(record.levelno, '')}{text}", file=sys.stderr, flush=True)


def show_diagnostics() -> None:
    """From now on the logger's records of level INFO and above are lines on standard error."""
    if not any(isinstance(handler, Lines) for handler in logger.handlers):
        logger.addHandler(Lines())
        logger.setLevel(logging.INFO)


class Lasting:
    """A stream of text that drops what cannot be written, because a pipe is closed or a disk is full.

    Attributes:
        lost: why the first text was dropped; empty if none was.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream, self.lost = stream, ""

    def write(self, text: str) -> int:
        """All of `text`, or nothing from the first failure on."""
        if self._stream is not None and not self.lost:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: it was closed
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        if self._stream is not None and not self.lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.__stdout__ if self._stream is None else self._stream, name)

    def isatty(self) -> bool:
        """Whether it is a terminal that is still there."""
        return self._stream is not None and not self.lost and self._stream.isatty()

    def _lose(self, error: Exception) -> None:
        assert self._stream is not None
        self.lost = getattr(error, "strerror", None) or str(error)
        with contextlib.suppress(OSError, ValueError):  # what its buffer holds would fail again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[tuple[Lasting, Lasting]]:
    """While entered, standard output and standard error are `Lasting`."""
    before = sys.stdout, sys.stderr
    streams = Lasting(sys.stdout), Lasting(sys.stderr)
    sys.stdout, sys.stderr = streams
    try:
        yield streams
    finally:
        sys.stdout, sys.stderr = before
