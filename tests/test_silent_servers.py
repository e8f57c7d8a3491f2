"""Whatever is fetched, a server that says nothing, or hardly anything, ends the wait with one line that names it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

from rkdo_dist import web
from rkdo_dist.data import remote
from rkdo_dist.data.foreign import index_shards
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.remote import Address, fetch
from rkdo_dist.data.source import open_source
from rkdo_dist.encoders import Encoder
from tests.jobs import wait_for

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
MODES = ("silent", "headers", "trickle")


class Server:
    """Accepts every connection; then nothing, or headers and nothing, or headers and a byte now and then."""

    def __init__(self, mode: str) -> None:
        self.mode, self.connections = mode, 0
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=50)
        self._over = threading.Event()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed at the end
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if self.mode != "silent":
                connection.recv(1 << 16)
                connection.sendall(HEAD)
            while not self._over.wait(0.05):
                if self.mode == "trickle":
                    connection.sendall(b"x")

    def close(self) -> None:
        self._over.set()
        self._socket.close()


@pytest.fixture(params=MODES)
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    made = Server(request.param)
    monkeypatch.setattr(web, "TIMEOUT", 0.4)
    monkeypatch.setattr(web, "LEAST_RATE", 16 << 20)
    monkeypatch.setattr(remote, "TRIES", 2)
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("RKDO_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy"):  # what has its address in a library goes there as well
        monkeypatch.setenv(name, made.url)
        monkeypatch.setenv(name.upper(), made.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR10, "url", f"{made.url}/cifar-10-python.tar.gz")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, value in {"ENDPOINT_URL": made.url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield made
    made.close()


def index_at_an_address(url: str, folder: Path) -> None:
    open_source(f"{url}/shards")


def shard(url: str, folder: Path) -> None:
    fetch(Address(f"{url}/train-00000.tar"), "0" * 64, 100_000, folder)


def shard_without_index(url: str, folder: Path) -> None:
    index_shards([f"{url}/train-00000.tar"], out=str(folder / "index"))


def object_store(url: str, folder: Path) -> None:
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # which knows another server
    open_source("s3://bucket/shards")


def preparation(url: str, folder: Path) -> None:
    prepare("cifar10", folder / "out")


def data_set_of_torchvision(url: str, folder: Path) -> None:
    open_source(f"torchvision://CIFAR10?root={folder}&download=true")


def weights_of_torchvision(url: str, folder: Path) -> None:
    Encoder("resnet18", weights="DEFAULT")


NO_WORD = "after 2 tries: (no answer in|it sent)"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (index_at_an_address, rf"cannot read http://127.0.0.1:\d+/shards/index.json {NO_WORD}"),
        (shard, rf"cannot read http://127.0.0.1:\d+/train-00000.tar {NO_WORD}"),
        (shard_without_index, rf"cannot read http://127.0.0.1:\d+/train-00000.tar {NO_WORD}"),
        (object_store, rf"cannot read s3://bucket/shards/index.json {NO_WORD}"),
        (preparation, r"cannot download cifar10 to .*"),
        (data_set_of_torchvision, r"torchvision://CIFAR10 cannot be opened: "),
        (weights_of_torchvision, r"weights=DEFAULT: cannot get the weights of resnet18: "),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_wait_has_an_end_and_names_what_it_was_for(
    server: Server, place: Callable[[str, Path], None], message: str, tmp_path: Path
) -> None:
    ended: list[BaseException | None] = []

    def wait() -> None:
        try:
            place(server.url, tmp_path)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(120)
    assert ended, "it waits for ever"
    assert isinstance(ended[0], ValueError), ended
    with pytest.raises(ValueError, match=message):
        raise ended[0]
    assert "\n" not in str(ended[0])
    wait_for(lambda: server.connections > 0)


def test_a_library_that_fetches_for_long_is_spoken_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(web, "TIMEOUT", 0.05)
    caplog.set_level(logging.INFO, "rkdo_dist")
    with web.waiting("the data set a/b of the Hugging Face hub"):
        wait_for(lambda: "still waiting for the data set a/b of the Hugging Face hub" in caplog.text)
    assert socket.getdefaulttimeout() is None
