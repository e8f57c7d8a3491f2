"""Warnings of all ranks, printed once by rank zero; those of other ranks carry their number.

Python warnings and log records of level WARNING and above arrive here. Rank zero shows its own at once. Other ranks
hold theirs until the end of the step, when its facts (`training.facts`) tell that some rank has any; so a warning
that every rank has is one line, and nothing writes across the progress display. A rank that leaves because of an error
shows what it still holds itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from rkdo_dist.addresses import said
from rkdo_dist.diagnostics import logger, show_diagnostics
from rkdo_dist.exchange import group

_MOST = 100  # held at a time: a warning that differs at every step must not eat the memory
_DIVERTED = ("rkdo_dist", "DeepSpeed")  # loggers with handlers of their own, which would print on every rank


class Messages:
    """Warnings of this rank for the user.

    Args:
        rank: of this process.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._process = os.getpid()
        self._known: set[str] = set()
        self._held: list[str] = []

    def add(self, text: str) -> None:
        """One warning of this rank; a text that was added before is dropped."""
        text = said(" ".join(text.split()))
        if text in self._known:
            return
        self._known.add(text)
        if self._rank == 0 or os.getpid() != self._process:  # a loader worker takes part in no collective
            _show(self._rank, text)
        elif len(self._held) < _MOST:
            self._held.append(text)

    def take(self) -> list[str]:
        """The texts that are held, to be sent to rank zero; they are held no longer."""
        held, self._held = self._held, []
        return held

    def show(self, by_rank: Sequence[Sequence[str]]) -> None:
        """Show what other ranks have sent, each text once (rank zero; nothing on others)."""
        if self._rank != 0:
            return
        for rank, texts in enumerate(by_rank):
            for text in texts:
                if text not in self._known:
                    self._known.add(text)
                    _show(rank, text)

    def exchange(self) -> None:
        """`take` and `show` where no other collective is at hand (collective)."""
        everyone: list[Any] = group.gather_objects(self.take())
        self.show(everyone)

    @property
    def waiting(self) -> bool:
        """Whether this rank holds any."""
        return bool(self._held)

    def flush(self) -> None:
        """Show the warnings that are held, without any other rank."""
        for text in self.take():
            _show(self._rank, text)


_current: Messages | None = None


def current() -> Messages:
    """The messages of the job that is running; outside `collected` an object that nothing is added to."""
    return _current if _current is not None else Messages(0)


@contextlib.contextmanager
def collected(rank: int) -> Iterator[Messages]:
    """While entered, warnings and log records of this process go through a `Messages`."""
    global _current
    messages = Messages(rank)
    before, show = _current, warnings.showwarning
    handler = _Handler(messages)

    def receive(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        messages.add(_sentence(str(message), category))

    _current, warnings.showwarning = messages, receive
    logging.getLogger().addHandler(handler)
    show_diagnostics()
    for name in _DIVERTED:
        logging.getLogger(name).addFilter(handler.divert)
    try:
        yield messages
    finally:
        messages.flush()
        for name in _DIVERTED:
            logging.getLogger(name).removeFilter(handler.divert)
        logging.getLogger().removeHandler(handler)
        _current, warnings.showwarning = before, show


def warn_once(text: str) -> None:
    """A warning that every rank has, shown by rank zero."""
    if group.rank() == 0:
        logger.warning("%s", text)


class _Handler(logging.Handler):
    def __init__(self, messages: Messages) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "rank"):  # collected already, and on its way to people
            return
        with contextlib.suppress(Exception):  # a log record must not end the training
            name = "" if record.name == logger.name else f" ({record.name})"
            self._messages.add(record.getMessage() + name)

    def divert(self, record: logging.LogRecord) -> bool:
        """A filter that keeps records from a logger's own handlers; warnings come here instead."""
        if record.levelno >= self.level:
            self.emit(record)
        return hasattr(record, "rank") or (record.name == logger.name and record.levelno < self.level)


def _sentence(text: str, category: type[Warning]) -> str:
    ours = category.__module__.startswith("rkdo_dist") or category is UserWarning
    return text if ours else f"{text} ({category.__name__})"


def _show(rank: int, text: str) -> None:
    logger.warning("%s", text, extra={"rank": rank})
