"""Waits for machines elsewhere: http keeps a least rate, and what other libraries fetch gets a voice."""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from rkdo_dist.diagnostics import logger

TIMEOUT = 30.0  # seconds without a byte
LEAST_RATE = 16 << 10  # bytes a second, over each TIMEOUT: a server that drips must not hold a job for days


class Paced(io.RawIOBase):
    """The bytes of a connection, headers included, as long as they come at `LEAST_RATE`; a line now and then meanwhile.

    Args:
        shown: the address in that line; empty: none is said.

    Raises:
        TimeoutError: from reads, when they come more slowly.
    """

    def __init__(self, raw: io.RawIOBase, shown: str) -> None:
        self._raw, self._shown = raw, shown
        self._received, self._began = 0, time.monotonic()
        self._window = self._began, 0

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        try:
            read = self._raw.readinto(into) or 0
        except TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, f"it sent nothing for {TIMEOUT:g} s") from None
        self._received += read
        since, before = self._window
        if time.monotonic() - since >= TIMEOUT and read:
            if self._received - before < LEAST_RATE * TIMEOUT:
                slow = f"it sent {self._received - before} bytes in {TIMEOUT:g} s, fewer than {LEAST_RATE} a second"
                raise TimeoutError(errno.ETIMEDOUT, slow)
            self._window = time.monotonic(), self._received
            seconds = time.monotonic() - self._began
            if self._shown:
                logger.info("%s: %.1f MB after %.0f s, still reading", self._shown, self._received / 1e6, seconds)
        return read

    def close(self) -> None:
        self._raw.close()
        super().close()


def opener(shown: str, redirections: urllib.request.HTTPRedirectHandler) -> urllib.request.OpenerDirector:
    """Handlers for http and https alone, `Paced`: the usual opener would also read file: and ftp:."""

    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
            super().__init__(sock, *arguments, **options)
            self.fp.close()
            self.fp = io.BufferedReader(Paced(sock.makefile("rb", buffering=0), shown))

    class Plain(http.client.HTTPConnection):
        response_class = Response

    class Secure(http.client.HTTPSConnection):
        response_class = Response

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Plain, request)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Secure, request)

    director = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        PlainHandler(),
        SecureHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        redirections,
    ):
        director.add_handler(handler)
    return director


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """While entered, another library fetches `what`: a line every `TIMEOUT` seconds says so.

    What it fetches through the standard library ends with TimeoutError as `Paced` does; other libraries have limits of
    their own. For one thread at a time.
    """
    arrived, began = threading.Event(), time.monotonic()

    def say() -> None:
        while not arrived.wait(TIMEOUT):
            logger.info("still waiting for %s, %.0f s now", what, time.monotonic() - began)

    before = socket.getdefaulttimeout()
    threading.Thread(target=say, daemon=True).start()
    socket.setdefaulttimeout(TIMEOUT)
    urllib.request.install_opener(opener("", urllib.request.HTTPRedirectHandler()))
    try:
        yield
    finally:
        urllib.request.install_opener(None)  # the usual one, as at first
        socket.setdefaulttimeout(before)
        arrived.set()
