"""Stop requests: a signal sets a flag, and the loop acts on it at the end of a step, together with all ranks."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

INTERRUPTED = 130  # Ctrl-C, as shells report it
PATIENCE = 3.0  # seconds in which a repeated Ctrl-C is taken for an echo of the first
PREEMPTED = 75  # EX_TEMPFAIL: "try again later", for schedulers that requeue

_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED}


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `code` instead of ending the process.

    A second SIGINT raises the usual KeyboardInterrupt, for users who cannot wait for the end of the step; but not at
    once, because a launcher passes on the SIGINT that the terminal has already sent to the whole process group.
    """

    def __init__(self) -> None:
        self.code = 0
        self._patient_until = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():  # Python gives signals to that one alone
            return self
        for number in _CODES:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT and time.monotonic() > self._patient_until:
            raise KeyboardInterrupt
        if not self.code:
            self._patient_until = time.monotonic() + PATIENCE
        self.code = max(self.code, _CODES[signal.Signals(number)])
