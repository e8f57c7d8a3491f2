"""Remote shards: fetched whole over http(s) or from an object store into a cache on disk.

The cache is addressed by content: a shard's file is named by its SHA-256, appears there only when its
bytes are right, and is never changed. So any number of jobs and ranks can share one directory; a lock file
for each shard makes one of them fetch while the others wait.

A URL may carry a secret (a token in its query, a password before its host). Messages never show those
parts, and they are sent to no other host.
"""

from __future__ import annotations

import base64
import errno
import http.client
import os
import re
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from rkdo_dist import addresses, web
from rkdo_dist.data.errors import DataError, Unreachable
from rkdo_dist.diagnostics import logger
from rkdo_dist.files import sha256_of, sync_file
from rkdo_dist.lock import wait_for_lock

HTTP = ("http", "https")
OBJECT_STORES = ("s3", "gs", "hf")  # through fsspec, where it is installed
CACHE_VARIABLE = "RKDO_CACHE"
TRIES = 5
FIRST_DELAY = 0.5  # seconds before the second try; doubled before each further one
MAX_SHARD_BYTES = 64 << 30  # of a shard that has no index yet
_PIECE = 1 << 20
_BLOCK = 4 << 20  # what drivers of object stores ask for at a time


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether this names something elsewhere (scheme://...) rather than a file."""
    return isinstance(text, str) and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", text) is not None and not Path(text).exists()


def default_cache() -> Path:
    """$RKDO_CACHE, else `rkdo` in the user's cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rkdo"


@dataclass(frozen=True)
class Address:
    """A URL whose secret parts stay out of sight.

    Attributes:
        url: with everything, only for the request itself; what was given without its secret parts gets them from the
            environment (`rkdo_dist.addresses`).
        shown: scheme, host and path, for messages.

    Raises:
        DataError: for a scheme that is not allowed, or nothing after it.
    """

    url: str = field(repr=False)
    shown: str = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in (*HTTP, *OBJECT_STORES):
            raise DataError(
                f"addresses that begin with {parts.scheme}: are not supported, only "
                f"{', '.join((*HTTP, *OBJECT_STORES))}"
            )
        if not parts.netloc:
            raise DataError(f"{addresses.said(self.url)} names no place after {parts.scheme}://")
        object.__setattr__(self, "url", addresses.whole(self.url))
        object.__setattr__(self, "shown", addresses.shown(self.url))

    @property
    def base(self) -> str:
        """The directory without any secret part, with a / at its end: what may be stored."""
        return self.shown.rpartition("/")[0] + "/"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return unquote(urlsplit(self.url).path.rpartition("/")[2])

    def below(self, name: str) -> Address:
        """The address of a file in the directory that this is the address of."""
        parts = urlsplit(self.url)
        return Address(urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/"))).beside(name)

    def beside(self, name: str) -> Address:
        """The address of a file in the same directory (the query, which may be a key to it, is kept)."""
        parts = urlsplit(self.url)
        path = parts.path.rpartition("/")[0] + "/" + quote(name)
        return Address(urlunsplit(parts._replace(path=path, fragment="")))


class _Temporary(Exception):
    """Worth another try."""


class _Wrong(_Temporary):
    """Complete, but with the wrong content."""


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirections over http(s) only, never from https to http; passwords stay with the first
    host."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        there = urlsplit(newurl)
        if there.scheme not in HTTP or (req.type == "https" and there.scheme != "https"):
            raise DataError(f"{Address(req.full_url).shown} redirects to {there.scheme}:, which is refused")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and there.netloc != urlsplit(req.full_url).netloc:
            request.remove_header("Authorization")
        return request


@contextmanager
def _open(address: Address, start: int) -> Iterator[tuple[IO[bytes], int]]:
    """The bytes at `address` from `start` on, or from 0 if the server has no ranges; and where they begin."""
    parts = urlsplit(address.url)
    if parts.scheme not in HTTP:
        with _open_object(address, start) as stream:
            yield stream, start
        return
    login, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host, fragment="")))
    request.add_header("Accept-Encoding", "identity")
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(unquote(login).encode()).decode())
    if start:
        request.add_header("Range", f"bytes={start}-")
    with web.opener(address.shown, _SameHost()).open(request, timeout=web.TIMEOUT) as response:
        partial = response.status == 206 and str(response.headers.get("Content-Range", "")).startswith(
            f"bytes {start}-"
        )
        yield response, start if partial else 0


@contextmanager
def _open_object(address: Address, start: int) -> Iterator[Any]:
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(
            f"{address.shown} needs fsspec and its driver: pip install 'rkdo_dist[object-stores]'"
        ) from None

    def opened() -> Any:
        store, path = fsspec.core.url_to_fs(address.url)
        stream = store.open(path, "rb", block_size=_BLOCK)
        stream.seek(start)
        return stream

    with _answered(opened, web.TIMEOUT) as stream:
        yield _Answering(stream)


class _Answering:
    """A file of an object store whose driver must answer in time: drivers try again by themselves, for long."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, count: int) -> bytes:
        """At most `count` bytes.

        Raises:
            TimeoutError: when they come at less than the least rate.
        """
        return _answered(lambda: self._stream.read(count), web.TIMEOUT + _BLOCK / web.LEAST_RATE)


def _answered(call: Callable[[], Any], seconds: float) -> Any:
    """What `call` returns; one that takes longer is left alone in its thread."""
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # whatever a driver raises belongs to the caller
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer in {seconds:g} s") from None


def read_all(address: Address, limit: int) -> bytes:
    """The content of a small file.

    Raises:
        DataError: not there, not allowed, or more than `limit` bytes.
    """
    content = bytearray()

    def once() -> None:
        content.clear()
        with _open(address, 0) as (stream, _):
            expected = getattr(stream, "length", None)
            while piece := stream.read(min(_PIECE, limit + 1 - len(content))):
                content.extend(piece)
        if expected is not None and len(content) < min(expected, limit):
            raise _Temporary(f"it ended after {len(content)} of {expected} bytes")

    _again_and_again(address, once)
    if len(content) > limit:
        raise DataError(f"{address.shown} has more than {limit} bytes")
    return bytes(content)


def _again_and_again(address: Address, once: Callable[[], None]) -> None:
    """Call `once` until it succeeds, with growing pauses after errors that may pass.

    Raises:
        DataError: it is not there, or its content is wrong at every try.
        Unreachable: any other error, at once if it is of the kind that stays (such as 403). No text and no
            cause contains the secret parts of the address.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(FIRST_DELAY * 2 ** (attempt - 1))
        kind: type[DataError] = Unreachable
        try:
            return once()
        except DataError:
            raise
        except urllib.error.HTTPError as error:
            reason = f"HTTP status {error.code}"
            passing = error.code in (408, 425, 429) or error.code >= 500
            kind = DataError if error.code in (404, 410) else Unreachable
            error.close()
        except _Temporary as error:
            reason, passing = str(error), True
            kind = DataError if isinstance(error, _Wrong) else Unreachable
        except (FileNotFoundError, PermissionError) as error:  # of an object store
            reason, passing = type(error).__name__, False
            kind = DataError if isinstance(error, FileNotFoundError) else Unreachable
        except (OSError, http.client.HTTPException) as error:
            reason, passing = _reason(error), True
        except Exception as error:  # drivers of object stores have kinds of their own
            if urlsplit(address.url).scheme in HTTP:
                raise
            reason, passing = type(error).__name__, False
        if not passing:
            raise kind(f"cannot read {address.shown}: {reason}") from None
        if attempt + 1 < TRIES:
            logger.info("%s: %s; trying again", address.shown, reason)
    raise kind(f"cannot read {address.shown} after {TRIES} tries: {reason}") from None


def _reason(error: Exception) -> str:
    """Reason of a failure, in words that cannot contain an address."""
    inner = getattr(error, "reason", error)
    if isinstance(inner, TimeoutError) and not inner.strerror:
        return f"no answer in {web.TIMEOUT:g} s"
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return type(inner if isinstance(inner, BaseException) else error).__name__


def adopt(address: Address, cache: Path) -> Path:
    """Fetch a shard that has no index yet into the cache; its file is named by its SHA-256.

    Raises:
        DataError, OSError: as `fetch`.
    """
    cache.mkdir(parents=True, exist_ok=True)
    temporary = cache / f".new.{secrets.token_hex(8)}.tmp"
    try:
        _again_and_again(address, lambda: _transfer(address, None, MAX_SHARD_BYTES, temporary))
        digest = sha256_of(temporary)
        target = cache / digest[:2] / f"{digest}.tar"
        target.parent.mkdir(exist_ok=True)
        sync_file(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def fetch(address: Address, sha256: str, length: int, cache: Path) -> Path:
    """The local file of a shard: from the cache, or fetched into it.

    The bytes are checked against length and SHA-256 before the file appears under its name. An interrupted
    transfer continues where it stopped, if the server supports it.

    Args:
        address: of the shard itself.
        sha256, length: of its content, from the index.
        cache: a directory, shared with any number of other processes; made if needed.

    Raises:
        DataError: it cannot be read, or is not what the index says.
        OSError: from the file system of the cache.
    """
    folder = cache / sha256[:2]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{sha256}.tar"
    if target.exists():
        return target
    with open(folder / f"{sha256}.lock", "a+") as lock:
        wait_for_lock(lock.fileno(), folder / f"{sha256}.lock", f"fetches {address.shown}")
        if not target.exists():
            temporary = folder / f".{sha256}.{secrets.token_hex(4)}.tmp"
            try:
                _again_and_again(address, lambda: _transfer(address, sha256, length, temporary))
                sync_file(temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
    return target


def _transfer(address: Address, sha256: str | None, length: int, temporary: Path) -> None:
    """Continue or begin the transfer into `temporary`; `length` is exact if the SHA-256 is known, else a
    limit."""
    with open(temporary, "ab") as file, _open(address, file.tell()) as (stream, start):
        file.truncate(start)
        rest = getattr(stream, "length", None)  # what an http response says it will deliver
        whole = start + rest if rest is not None else length if sha256 else None
        while piece := stream.read(min(_PIECE, length + 1 - start)):
            file.write(piece)
            start += len(piece)
    if whole is not None and start < min(whole, length):
        raise _Temporary(f"it ended after {start} of {whole} bytes")
    if sha256 is None:
        if start > length:
            raise DataError(f"{address.shown} has more than {length} bytes; this is not a shard")
    elif start != length or sha256_of(temporary) != sha256:
        with open(temporary, "rb") as written:
            head = written.read(512).lstrip()[:16].lower()
        temporary.unlink()
        if head.startswith((b"<!doctype", b"<html", b"<?xml")):
            raise DataError(f"{address.shown} is a web page, not the shard that the index lists")
        raise _Wrong(f"its bytes are not those that the index lists ({start} of {length} bytes, SHA-256)")
