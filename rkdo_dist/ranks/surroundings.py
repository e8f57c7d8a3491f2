"""Context of a job: its peers, its messages to people, and its status in the run directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from rkdo_dist.ranks import messages
from rkdo_dist.ranks.messages import Messages
from rkdo_dist.ranks.peers import Peers
from rkdo_dist.ranks.signals import INTERRUPTED, PREEMPTED
from rkdo_dist.rundir import RunDirectory

_WORDS = {0: "complete", PREEMPTED: "preempted", INTERRUPTED: "interrupted"}


class Surroundings:
    """Attributes: `peers`, `messages`. A run whose directory is `claimed` gets a status file, kept by rank zero."""

    def __init__(self, others: Peers, said: Messages) -> None:
        self.peers, self.messages = others, said
        self._run: RunDirectory | None = None
        self._step: Callable[[], int] = lambda: 0

    def claimed(self, run: RunDirectory | None, step: Callable[[], int]) -> None:
        """From now on `run` is this job's, and its status is "running".

        Args:
            run: None on ranks other than zero.
            step: returns the number of steps done.
        """
        self._run, self._step = run, step
        self._write("running")

    def ended(self, code: int) -> None:
        """Write how the job ended: "complete", "preempted" or "interrupted"."""
        self._write(_WORDS[code])

    def failed(self, error: BaseException) -> None:
        """Write "failed", or "interrupted" for a second Ctrl-C, with the error's text."""
        with contextlib.suppress(OSError):  # the disk may be the very reason
            self._write("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", str(error))

    def _write(self, word: str, message: str = "") -> None:
        if self._run is not None:
            self._run.write_status(word, self._step(), message)


@contextlib.contextmanager
def entered(timeout: int) -> Iterator[Surroundings]:
    """Enter before joining the process group.

    Args:
        timeout: `run.timeout`.

    Raises:
        PeerLostError: if a collective fails because another process is gone.
    """
    with messages.collected(int(os.environ.get("RANK", "0"))) as said:
        around = Surroundings(Peers(timeout), said)
        try:
            with around.peers.explained():
                yield around
        except BaseException as error:
            around.failed(error)
            raise
