"""Shards elsewhere: fetched once, verified, retried, shared between jobs; secrets stay secret; foreign
shards indexed."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import multiprocessing
import shutil
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from rkdo_dist import web
from rkdo_dist.data import remote
from rkdo_dist.data.errors import Unreachable
from rkdo_dist.data.foreign import index_shards
from rkdo_dist.data.index import DataError, ShardIndex, load_index
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.remote import Address
from rkdo_dist.data.stream import lane_stream
from tests.pictures import image_folder

PLAN: dict[str, Any] = {"seed": 3, "all_lanes": 4, "micro_batch": 5, "window": 16}


class Server:
    """A directory over http; `rule(handler, request number of this path)` may answer instead and return
    True."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.rule: Callable[[Any, int], bool] = lambda handler, number: False
        self.ranges = True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                server.requests[path] += 1
                server.seen.append((self.path, dict(self.headers)))
                if server.rule(self, server.requests[path]):
                    return
                file = server.folder / path.lstrip("/")
                if not file.is_file():
                    self.send_error(404)
                    return
                self.send_body(file.read_bytes())

            def send_body(self, body: bytes, cut: int | None = None) -> None:
                start = 0
                wanted = self.headers.get("Range")
                if wanted and server.ranges:
                    start = int(wanted.removeprefix("bytes=").rstrip("-"))
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                self.wfile.write(body[start:cut])

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    prepare("imagefolder", root / "s", image_folder(root / "f", train=125, test=30), shard_size=17)
    return root


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("RKDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    made = Server(folder)
    yield made
    made.http.shutdown()
    made.http.server_close()


def flat(index: ShardIndex, workers: int = 0) -> list[Any]:
    return [
        (m.keys, m.images.numpy().tobytes())
        for b in lane_stream(index, "train", **PLAN, workers=workers)
        for m in b.lanes
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_url_is_as_good_as_a_directory(server: Server, folder: Path, workers: int) -> None:
    local = load_index(folder / "s")
    for url in (f"{server.url}/s", f"{server.url}/s/", f"{server.url}/s/index.json"):
        index = load_index(url)
        assert index.digest() == local.digest()
        assert flat(index, workers) == flat(local)
    assert all(server.requests[f"/s/train-0000{k}.tar"] == 1 for k in range(8))  # from the cache afterwards
    assert server.requests["/s/test-00000.tar"] == 0


def broken_off(handler: Any, number: int) -> bool:
    """Every transfer of a shard ends after a third of it, two times."""
    if not handler.path.endswith(".tar") or number > 2:
        return False
    body = (handler.server_folder / handler.path.lstrip("/")).read_bytes()
    handler.send_body(body, cut=number * len(body) // 3)
    return True


@pytest.mark.parametrize("ranges", [True, False])
def test_broken_transfers_go_on_where_they_stopped(server: Server, folder: Path, ranges: bool) -> None:
    def rule(handler: Any, number: int) -> bool:
        handler.server_folder = folder
        return broken_off(handler, number)

    server.rule, server.ranges = rule, ranges
    assert flat(load_index(f"{server.url}/s")) == flat(load_index(folder / "s"))
    starts = [headers.get("Range") for path, headers in server.seen if path == "/s/train-00000.tar"]
    assert len(starts) == 3
    assert starts[0] is None
    assert starts[1] is not None


@pytest.mark.parametrize("part", ["header", "body"])
def test_a_server_that_drips_does_not_hold_a_job(server: Server, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setattr(web, "TIMEOUT", 0.4)
    monkeypatch.setattr(remote, "TRIES", 2)
    sent: list[int] = []

    def drip(handler: Any, number: int) -> bool:
        if part == "body":
            handler.send_response(200)
            handler.send_header("Content-Length", "100000")
            handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(400):  # each byte in time, the whole after hours
                handler.wfile.write(b"x")
                handler.wfile.flush()
                sent.append(1)
                time.sleep(0.05)
        return True

    server.rule = drip
    with pytest.raises(DataError, match=r"index.json after 2 tries: it sent \d+ bytes in 0.4 s, fewer than 16384"):
        load_index(server.url)
    assert len(sent) < 400  # of 800 that it would have sent


def test_servers_that_are_busy_are_asked_again(server: Server, folder: Path) -> None:
    def rule(handler: Any, number: int) -> bool:
        if number <= 3:
            handler.send_error((503, 429, 500)[number - 1])
        return number <= 3

    server.rule = rule
    assert flat(load_index(f"{server.url}/s")) == flat(load_index(folder / "s"))
    assert server.requests["/s/index.json"] == 4


@pytest.mark.parametrize(
    ("answer", "message", "tries"),
    [
        (lambda h: h.send_error(404), "HTTP status 404", 1),
        (lambda h: h.send_error(403), "HTTP status 403", 1),
        (lambda h: h.send_error(502), "after 5 tries: HTTP status 502", 5),
        (lambda h: h.send_body(b"<!DOCTYPE html><p>please log in"), "is a web page", 1),
        (lambda h: h.send_body(b"\0" * 50_000), "after 5 tries: its bytes are not those", 5),
        (lambda h: h.send_body(b"\0" * 50_000, cut=9), "after 5 tries: it ended after 9 of 50000", 5),
        (lambda h: h.connection.close(), "after 5 tries", 5),
    ],
)
def test_what_cannot_be_fetched_is_named(
    server: Server, answer: Callable[[Any], None], message: str, tries: int
) -> None:
    def rule(handler: Any, number: int) -> bool:
        if handler.path.endswith(".tar"):
            answer(handler)
            return True
        return False

    server.rule = rule
    with pytest.raises(DataError, match=rf"127\.0\.0\.1:\d+/s/train-0000\d\.tar.*{message}"):
        flat(load_index(f"{server.url}/s"))
    assert max(server.requests.values()) == tries
    assert not list(Path(remote.default_cache()).rglob("*.t*"))  # nothing half-done stays


@pytest.mark.parametrize(("status", "skipped"), [(404, True), (403, False), (503, False)])
def test_only_what_is_missing_for_everybody_is_skipped(server: Server, status: int, skipped: bool) -> None:
    def rule(handler: Any, number: int) -> bool:
        if handler.path.endswith("train-00003.tar"):
            handler.send_error(status)
            return True
        return False

    server.rule = rule
    stream = lane_stream(load_index(f"{server.url}/s"), "train", **PLAN, on_corrupt="skip")
    if skipped:
        assert sum(micro.skipped for batch in stream for micro in batch.lanes) > 5
    else:
        with pytest.raises(Unreachable, match=f"HTTP status {status}"):
            list(stream)


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(server: Server, folder: Path) -> None:
    index = load_index(f"{server.url}/s")
    want = flat(index)
    for path in remote.default_cache().rglob("*.tar"):
        path.write_bytes(b"?" * path.stat().st_size)
    assert flat(index) == want
    assert server.requests["/s/train-00003.tar"] == 2


def _job(url: str, results: Any) -> None:
    index = load_index(url)
    results.put([m.keys for b in lane_stream(index, "train", **PLAN) for m in b.lanes])


def test_jobs_share_a_cache_without_collisions(server: Server, folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    jobs = [
        context.Process(target=_job_in, args=(str(tmp_path / "cache"), f"{server.url}/s", results)) for _ in range(3)
    ]
    for job in jobs:
        job.start()
    answers = [results.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join(30)
    assert answers[0] == answers[1] == answers[2] == [keys for keys, _ in flat(load_index(folder / "s"))]
    assert all(server.requests[f"/s/train-0000{k}.tar"] == 1 for k in range(8))


def _job_in(cache: str, url: str, results: Any) -> None:
    import os

    os.environ["RKDO_CACHE"] = cache
    _job(url, results)


def test_secrets_appear_nowhere(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    host = server.url.removeprefix("http://")
    address = f"http://me:hunter2@{host}/s/index.json?token=hunter2#hunter2"
    index = load_index(address)
    texts = [repr(index), str(index), index.place, repr(Address(address)), json.dumps(index.digest())]
    stream = lane_stream(index, "train", **PLAN, workers=1)
    next(stream)
    family = psutil.Process().children(recursive=True)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # others' children of this process end when they like
            texts.append(" ".join(process.cmdline()))
    stream.close()
    assert all("token=hunter2" in path for path, _ in server.seen)  # it is used
    assert all(headers["Authorization"].startswith("Basic ") for _, headers in server.seen)
    shutil.rmtree(remote.default_cache())
    for status in (401, 503):
        server.rule = lambda handler, number, status=status: (
            handler.path.count(".tar") and (handler.send_error(status) or True)
        )
        with pytest.raises(DataError) as caught:
            flat(index)
        texts += traceback.format_exception(caught.value)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(DataError) as caught:
        load_index(address)
    texts += traceback.format_exception(caught.value)
    texts += [caplog.text, *capfd.readouterr()]
    texts += [str(path) for path in remote.default_cache().rglob("*")]
    assert not [text for text in texts if "hunter2" in text]


def test_redirections_keep_passwords_and_stay_on_the_web(server: Server, folder: Path, tmp_path: Path) -> None:
    other = Server(folder)

    def rule(handler: Any, number: int) -> bool:
        there = {"/s/test-00000.tar": f"file://{folder}/s/test-00000.tar"}.get(handler.path, other.url + handler.path)
        handler.send_response(302)
        handler.send_header("Location", there.replace("127.0.0.1", "localhost") if "http" in there else there)
        handler.end_headers()
        return True

    server.rule = rule
    host = server.url.removeprefix("http://")
    index = load_index(f"http://me:hunter2@{host}/s")
    assert flat(index) == flat(load_index(folder / "s"))
    assert all("Authorization" in headers for _, headers in server.seen)
    assert not any("Authorization" in headers for _, headers in other.seen)
    with pytest.raises(DataError, match="HTTP status 302"):
        index.file_of(index.split("test").shards[0])
    other.http.shutdown()
    other.http.server_close()


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "file:///etc/passwd", "ftp://host/x", "data:text/plain,x"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(DataError, match="are not supported, only http, https, s3"):
        load_index(url)
    with pytest.raises(DataError, match="are not supported, only http, https, s3"):
        index_shards([url], out="unused")
    assert not Path("unused").exists()


def test_object_stores_go_through_fsspec(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("RKDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(remote, "OBJECT_STORES", ("s3", "memory"))
    store = fsspec.filesystem("memory")
    for path in (folder / "s").iterdir():
        store.pipe(f"/bucket/s/{path.name}", path.read_bytes())
    assert flat(load_index("memory://bucket/s")) == flat(load_index(folder / "s"))
    store.rm("/bucket/s/test-00000.tar")
    index = load_index("memory://bucket/s")
    with pytest.raises(DataError, match=r"memory://bucket/s/test-00000\.tar: FileNotFoundError"):
        index.file_of(index.split("test").shards[0])
    store.rm("/bucket", recursive=True)


def test_urls_can_be_indexed_and_are_followed_only_where_allowed(server: Server, tmp_path: Path, folder: Path) -> None:
    host = server.url.removeprefix("http://")
    urls = [f"http://me:hunter2@{host}/s/train-0000{k}.tar?token=hunter2" for k in range(8)]
    with pytest.raises(DataError, match="say where with --out"):
        index_shards(urls)
    index_shards(urls, out=tmp_path / "i", classes=["cat", "dog"])
    assert "hunter2" not in (tmp_path / "i" / "index.json").read_text()
    with pytest.raises(DataError, match="only where that is allowed expressly"):
        load_index(tmp_path / "i")
    index = load_index(tmp_path / "i", allow_remote=True)
    assert index.split("train") == load_index(folder / "s").split("train")
    assert flat(index) == flat(load_index(folder / "s"))
    assert max(server.requests.values()) == 1  # the cache has them since they were indexed


def test_a_bucket_of_s3(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto.server", reason="needs moto[server] and s3fs")
    s3fs = pytest.importorskip("s3fs", reason="needs moto[server] and s3fs")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in (
            ("AWS_ENDPOINT_URL", endpoint), ("AWS_ACCESS_KEY_ID", "hunter2"), ("AWS_SECRET_ACCESS_KEY", "hunter2"),
            ("AWS_DEFAULT_REGION", "us-east-1"), ("RKDO_CACHE", str(tmp_path / "cache")),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote, "FIRST_DELAY", 0.0)
        store = s3fs.S3FileSystem()
        store.mkdir("bucket")
        store.put(str(folder / "s"), "bucket/s", recursive=True)
        index = load_index("s3://bucket/s")
        assert flat(index) == flat(load_index(folder / "s"))
        with pytest.raises(DataError, match=r"cannot read s3://bucket/none/index\.json"):
            load_index("s3://bucket/none")
    finally:
        server.stop()
