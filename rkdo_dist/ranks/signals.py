"""Stop requests. A signal sets a flag, and the loop acts on it at the end of a step, together with all ranks; where
nothing has to be finished first, the request ends what is going on at once."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from rkdo_dist.diagnostics import logger

INTERRUPTED = 130  # Ctrl-C, as shells report it
PATIENCE = 3.0  # seconds in which a repeated Ctrl-C is taken for an echo of the first
PREEMPTED = 75  # EX_TEMPFAIL: "try again later", for schedulers that requeue
GRACE = 5.0  # seconds after which a process that stays inside a library's call is ended from outside
HASTE = 2.0  # the same after a second Ctrl-C

_CODES: dict[int, int] = {
    signal.SIGINT: INTERRUPTED,
    signal.SIGTERM: PREEMPTED,
    signal.SIGUSR1: PREEMPTED,
    signal.SIGHUP: PREEMPTED,  # the terminal is gone
}


class Stopped(BaseException):  # not an Exception: it is no failure of what it ends, and no rank reports it as one
    """A stop request, raised where nothing has to be finished first.

    Args:
        code: the exit code.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped by a signal (exit code {code})")
        self.code = code


_current: list[StopRequest] = []


def _forget() -> None:
    """In a forked child, which would write the signals that it gets into its parent's socket."""
    if _current and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)


def current() -> StopRequest:
    """The request that is entered; outside, one that never comes."""
    return _current[-1] if _current else StopRequest()


class StopRequest:
    """While entered, SIGINT, SIGTERM, SIGUSR1 and SIGHUP (unless it was ignored: nohup) set `code` instead of ending
    the process.

    A second SIGINT raises KeyboardInterrupt, for users who cannot wait for the end of the step; but only if it arrives
    PATIENCE after the first request, because a launcher may pass on the SIGINT that the terminal has already sent to
    the whole process group. torchrun, whose ranks are out of the terminal's reach, passes the second Ctrl-C on as
    SIGTERM, so that counts after a SIGINT too. A main thread that a library keeps for longer than HASTE after it cannot
    raise anything: it says its `last_words`, and the process is ended.

    Outside the main thread, which alone gets signals, nothing happens.

    Attributes:
        code: of the request, 0 for none.
        last_words: called with the code when the process must be ended from outside.
    """

    def __init__(self) -> None:
        self.code = 0
        self.last_words: Callable[[int], None] = lambda code: None
        self._at_once = False
        self._insisted = False  # a second Ctrl-C has come, and the main thread does not know yet
        self._before: dict[int, object] = {}
        self._watching = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in _CODES:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        self._watching.enter_context(self._watched())
        _current.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._watching.close()
        if self in _current:
            _current.remove(self)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While entered, a request raises `Stopped` wherever the main thread is. Must not be around collectives whose
        other ranks would wait.

        A main thread that a library keeps for longer than GRACE (a lost peer, a fit) says its `last_words`, and the
        process is ended.

        Raises:
            Stopped: also at once, for a request that is there already.
        """
        if self.code:
            raise Stopped(self.code)
        around, self._at_once = self._at_once, True
        try:
            yield
        finally:
            self._at_once = around and not self.code

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._insisted:
            self._insisted = False
            raise KeyboardInterrupt
        self.code = max(self.code, _CODES[number])
        if self._at_once:
            self._at_once = False
            raise Stopped(self.code)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """A thread that sees signals as they arrive, also while the main thread is inside a library, where Python
        handles them only afterwards, and several as one.

        The interpreter writes each signal's number into a socket as it arrives.
        """
        reads, writes = socket.socketpair()
        writes.setblocking(False)
        before = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(reads, threading.get_ident()), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            writes.close()  # ends the thread

    def _watch(self, reads: socket.socket, main: int) -> None:
        code, patient_until, until = 0, math.inf, math.inf
        with reads:
            while True:
                now = time.monotonic()
                if now >= until:
                    if self._insisted or (self._at_once and not self.code):
                        self._end(code)
                    until = math.inf
                reads.settimeout(None if until == math.inf else until - now)
                try:
                    number = reads.recv(1)
                except TimeoutError:
                    continue
                if not number:
                    return
                if number[0] not in _CODES:
                    continue
                now = time.monotonic()
                again = number[0] == signal.SIGINT or (number[0] == signal.SIGTERM and code == INTERRUPTED)
                code = max(code, _CODES[number[0]])
                if again and now > patient_until:
                    self._insisted, patient_until, until = True, now + PATIENCE, min(until, now + HASTE)
                    signal.pthread_kill(main, signal.SIGINT)  # it may have handled the one that came, and wait again
                elif patient_until == math.inf:
                    patient_until, until = now + PATIENCE, now + GRACE

    def _end(self, code: int) -> None:
        """End the process from a thread, however the main thread and those who read its output are."""

        def say() -> None:
            with contextlib.suppress(Exception):
                self.last_words(code)
            logger.warning(
                "ended inside a library's call; a run goes on from its last checkpoint (train with run.resume=auto)"
            )

        saying = threading.Thread(target=say, daemon=True)
        saying.start()
        saying.join(HASTE)
        os._exit(code)
