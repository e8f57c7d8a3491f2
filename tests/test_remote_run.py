"""A whole run on shards behind http, with a token in the URL that nothing may show."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import command, fingerprint, metrics, run_of

TOKEN = "s3cr3t-t0k3n"


class _Guarded(http.server.SimpleHTTPRequestHandler):
    """Serves a directory to those who bring the token in the query."""

    def do_GET(self) -> None:
        if f"token={TOKEN}" not in self.path:
            self.send_error(403)
            return
        self.path = self.path.partition("?")[0]
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url(digits: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Guarded, directory=str(digits)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_the_same_run_from_http_and_no_token_left_behind(
    small: list[str], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKDO_CACHE", str(tmp_path / "cache"))
    run = run_of(small)
    assert command(small)[0] == 0
    far = run.with_name("far")
    arguments = [*small, f"data.shards={url}?token={TOKEN}", f"run.dir={far}"]
    code, text = command(arguments)
    assert code == 0, text
    assert fingerprint(far, 6) == fingerprint(run, 6)
    assert metrics(far) == metrics(run)
    assert TOKEN not in text
    for path in [*far.rglob("*"), *(tmp_path / "cache").rglob("*")]:
        assert TOKEN not in str(path)
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    code, text = command(["evaluate", str(far), f"data.shards={url}?token={TOKEN}"])
    assert code == 0, text
    assert TOKEN not in text


def test_a_refusal_names_the_place_and_not_the_token(small: list[str], url: str) -> None:
    code, text = command([*small, f"data.shards={url}?password=hunter2"])
    assert code == 2
    assert "127.0.0.1" in text
    assert "hunter2" not in text
    assert "Traceback" not in text


def test_shards_cannot_be_a_command(small: list[str], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for place in (f"pipe:touch {canary}", f"file://{tmp_path}", "ftp://127.0.0.1/x"):
        code, text = command([*small, f"data.shards='{place}'"])
        assert code == 2, text
    assert not canary.exists()
