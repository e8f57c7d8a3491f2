"""Canaries: a server that asks for a password and a token, and a look at everything where they must not be."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

PASSWORD, TOKEN = "p4ssw0rd-canary", "t0ken-canary"
LOGIN = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
CANARIES = (PASSWORD, TOKEN, LOGIN)


class _Guarded(http.server.SimpleHTTPRequestHandler):
    """Serves a directory to those who bring both the password and the token."""

    def do_GET(self) -> None:
        if f"token={TOKEN}" not in self.path or self.headers.get("Authorization") != f"Basic {LOGIN}":
            self.send_error(403)
            return
        self.path = self.path.partition("?")[0]
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[str]:
    """The address of a server that gives the files of `folder` to those who bring password and token."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Guarded, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://user:{PASSWORD}@127.0.0.1:{server.server_port}/?token={TOKEN}"
    server.shutdown()
    server.server_close()


class Arguments:
    """While entered, what stands among the arguments of every process that this one starts."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._end.wait(0.02):
            for child in psutil.Process().children(recursive=True):
                try:
                    self.seen.add(" ".join(child.cmdline()))
                except psutil.Error:
                    continue

    def __enter__(self) -> Arguments:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()


def assert_silent(text: str, *folders: Path) -> None:
    """No canary in what was printed, broken over lines or not, in the name of any file, or in one."""
    for canary in CANARIES:
        assert canary not in "".join(text.split())
        for path in (path for folder in folders for path in [folder, *folder.rglob("*")]):
            assert canary not in str(path)
            assert not path.is_file() or canary.encode() not in path.read_bytes(), path
