"""Stop requests. A signal sets a flag, and the loop acts on it at the end of a step, together with all ranks; where
nothing has to be finished first, the request ends what is going on at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130  # Ctrl-C, as shells report it
PATIENCE = 3.0  # seconds in which a repeated Ctrl-C is taken for an echo of the first
PREEMPTED = 75  # EX_TEMPFAIL: "try again later", for schedulers that requeue
GRACE = 5.0  # seconds after which a process that stays inside a library's call is ended from outside

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

    A second SIGINT raises the usual KeyboardInterrupt, for users who cannot wait for the end of the step; but not at
    once, because a launcher passes on the SIGINT that the terminal has already sent to the whole process group.

    Outside the main thread, which alone gets signals, nothing happens.

    Attributes:
        code: of the request, 0 for none.
        last_words: called with the code when the process must be ended from outside (`at_once`).
    """

    def __init__(self) -> None:
        self.code = 0
        self.last_words: Callable[[int], None] = lambda code: None
        self._at_once = False
        self._patient_until = 0.0
        self._before: dict[int, object] = {}
        self._watch = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in _CODES:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        self._watch.enter_context(self._watched())
        _current.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._watch.close()
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
        self._at_once = True
        try:
            if self.code:
                raise Stopped(self.code)
            yield
        finally:
            self._at_once = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT and time.monotonic() > self._patient_until:
            raise KeyboardInterrupt
        if not self.code:
            self._patient_until = time.monotonic() + PATIENCE
        self.code = max(self.code, _CODES[number])
        if self._at_once:
            self._at_once = False
            raise Stopped(self.code)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """A thread that sees signals also while the main thread is inside a library, where Python cannot handle them.

        The interpreter writes each signal's number into a socket as it arrives.
        """
        reads, writes = socket.socketpair()
        writes.setblocking(False)
        before = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)

        def watch() -> None:
            with reads:
                while number := reads.recv(1):
                    code = _CODES.get(number[0])
                    if code is None:
                        continue
                    time.sleep(GRACE)
                    if self._at_once and not self.code:
                        with contextlib.suppress(Exception):
                            self.last_words(code)
                        os._exit(code)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            writes.close()  # ends the thread
