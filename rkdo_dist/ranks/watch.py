"""Watch over the peers of a job whose collectives run on a device, and the note that a failing rank leaves for others.

NCCL raises nothing in the main thread when a peer dies or fails: the thread waits in a synchronisation until the
watchdog of the group aborts the process, without a message, a status or an exit code. So two threads of every rank look
after that, on the host. Ranks form a ring: each hears the next one in the control group, and knows at once when it is
gone; and each looks for a note once a beat. The first note is everyone's, so all give the same reason.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from rkdo_dist.exchange import group

BEAT = 1.0  # seconds
GRACE = 3.0  # seconds that the main thread has to learn it by itself, and to leave
_TAG = 7  # keeps these messages apart from others of the control group
_KEY = "why"


class Note:
    """Why the job cannot go on, by the first rank that knows: in the store through which the ranks have met.

    Args:
        name: of the job, the same on every rank and another for every job of a process.
    """

    def __init__(self, name: str) -> None:
        store = distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"rkdo_dist {name}", store.clone())  # a connection of its own
        self._unanswered: threading.Thread | None = None

    def leave(self, text: str) -> str:
        """Leave `text` for all ranks, unless there is a note already; what it says now."""
        return self._ask(lambda: self._store.compare_set(_KEY, "", text).decode()) or text

    def read(self, patience: float = 0.0) -> str:
        """What it says; empty if there is none in `patience` seconds."""
        until = time.monotonic() + patience
        while not (said := self._ask(self._said)) and time.monotonic() < until:
            time.sleep(0.05)
        return said

    def _said(self) -> str:
        return self._store.get(_KEY).decode() if self._store.check([_KEY]) else ""

    def _ask(self, question: Callable[[], str]) -> str:
        """The store's answer; empty if it is gone, or silent: its client waits without a limit for a machine or network
        that is down, so it is asked in a thread."""
        if self._unanswered is not None and self._unanswered.is_alive():
            return ""
        answers: list[str] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone with the process that held it
                answers.append(question())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(GRACE)
        if asking.is_alive():
            self._unanswered = asking
        return answers[0] if answers else ""


class Watch:
    """Threads that end this process, with a reason, when the main thread cannot.

    Args:
        note: of the job.
        explain: from the error of a lost connection to the reason; called with the rank that was lost.
        last_words: called with the reason before the process is ended with code 1.
    """

    def __init__(
        self, note: Note, explain: Callable[[BaseException, int], str], last_words: Callable[[str], None]
    ) -> None:
        self._note, self._explain, self._last_words = note, explain, last_words
        self._before, self._next = ((group.rank() + step) % group.world_size() for step in (-1, 1))
        self._left, self._once = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=x, daemon=True) for x in (self._hear, self._look)]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """End the watch: this rank has done its part, and its connection will close."""
        self._left.set()
        hear, look = self._threads
        look.join()
        self._send(1)
        hear.join(GRACE)

    def failing(self) -> None:
        """The main thread leaves with a reason of its own; should it not get out, the process is ended."""
        self._last_words = lambda reason: None
        threading.Thread(target=self._end, args=("",), daemon=True).start()

    def _hear(self) -> None:
        """Hear the next rank until it leaves."""
        heard = torch.zeros(1, dtype=torch.int32, device="cpu")
        try:
            while not int(heard):
                dist.recv(heard, src=self._next, group=group.control(), tag=_TAG)
        except RuntimeError as error:
            if not self._left.is_set():
                self._end(self._note.leave(self._explain(error, self._next)))

    def _look(self) -> None:
        while not self._left.wait(BEAT):
            self._send(0)
            if reason := self._note.read():
                self._end(reason)

    def _send(self, leaving: int) -> None:
        with contextlib.suppress(RuntimeError):  # the one before is gone: somebody else hears that
            word = torch.tensor([leaving], dtype=torch.int32, device="cpu")
            dist.send(word, dst=self._before, group=group.control(), tag=_TAG)

    def _end(self, reason: str) -> None:
        if not self._once.acquire(blocking=False) or self._left.wait(GRACE):
            return
        with contextlib.suppress(Exception):
            self._last_words(reason)
        os._exit(1)
