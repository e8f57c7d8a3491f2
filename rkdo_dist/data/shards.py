"""Writing and reading of one shard: the same bytes every time, read only after verification.

Reading goes by position: the whole file is hashed once, its headers are scanned once, and samples are then
fetched from their offsets through the open file. So no shuffle buffer holds encoded images, a seek inside
a shard costs nothing, and an error knows its offset.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
from webdataset.writer import TarWriter

from rkdo_dist.data.archive import PIECE, Table, checksums, locate, scan
from rkdo_dist.data.errors import Unreachable
from rkdo_dist.data.images import decode, parse_label
from rkdo_dist.data.index import DataError, OpenSamples, Shard, ShardIndex
from rkdo_dist.exchange import group
from rkdo_dist.files import TEMPORARY, sync_directory
from rkdo_dist.lock import wait_for_lock

_THOROUGH = 2 << 30  # bytes of a split up to which `check_shards` hashes it
_cached_samples = 1 << 18  # tables of so many samples are kept in a process, about 40 MB


class ShardWriter:
    """Writes one shard: temporary name, fixed metadata, hashed on the way, flushed and renamed by `finish`.

    Args:
        path: the final name; the file does not appear there before `finish`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self.samples = 0
        self._digest = hashlib.sha256()
        self._temporary = path.with_name(f".{path.name}{TEMPORARY}")
        self._file: IO[bytes] = open(self._temporary, "wb")  # noqa: SIM115
        self._tar = TarWriter(self, user="", group="", mode=0o644, encoder=False, compress=False, mtime=0)

    def write(self, data: bytes) -> int:
        """Called by the tar writer: bytes of the archive."""
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append a sample: `members` by extension."""
        self._tar.write({"__key__": key, **members})
        self.samples += 1

    def finish(self) -> Shard:
        """Complete the archive and give it its name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        checks = _read_back(self._temporary, self.samples)
        os.replace(self._temporary, self.path)
        sync_directory(self.path.parent)
        return Shard(self.path.name, self.samples, self._digest.hexdigest(), self.bytes, checks)

    def abandon(self) -> None:
        """Remove what was written so far (nothing after `finish`)."""
        if not self._file.closed:
            with suppress(OSError):
                self._tar.close()
            with suppress(OSError):
                self._file.close()
        self._temporary.unlink(missing_ok=True)


def _read_back(path: Path, samples: int) -> str:
    descriptor = open_plain(path, str(path))
    try:
        table = scan(descriptor, str(path))
        assert len(table.keys) == samples
        return checksums(descriptor, table)
    finally:
        os.close(descriptor)


class OpenShard:
    """A verified shard that is open for reading.

    Attributes:
        name: for messages.
        table: where its samples are.
    """

    def __init__(self, name: str, descriptor: int, table: Table) -> None:
        self.name = name
        self.table = table
        self._descriptor = descriptor
        self._identity = _identity(os.fstat(descriptor))

    @property
    def keys(self) -> tuple[str, ...]:
        """Sample keys in the order of the shard."""
        return self.table.keys

    def pixels(self, position: int, size: int | None) -> np.ndarray:
        """The decoded image of a sample, see `images.decode`."""
        return decode(self.image(position), self.where(position), size)

    def image(self, position: int) -> bytes:
        """The encoded image of a sample."""
        offset, size = self.table.images[position]
        return self._fetch(offset, size, position)

    def label(self, position: int) -> bytes | None:
        """The text of a sample's `.cls` member, or None where there is none."""
        offset, size = self.table.labels[position]
        return None if offset < 0 else self._fetch(offset, size, position)

    def where(self, position: int) -> str:
        """Name of a sample in errors: shard, key, offset."""
        return f"{self.name}: sample {self.table.keys[position]!r} at offset {self.table.images[position][0]}"

    def check_unchanged(self) -> None:
        """Check that the file is still the one that was verified.

        Raises:
            DataError: if it was written to since.
        """
        if _identity(os.fstat(self._descriptor)) != self._identity:
            raise DataError(f"{self.name} was changed while it was being read")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _fetch(self, offset: int, size: int, position: int) -> bytes:
        try:
            data = os.pread(self._descriptor, int(size), int(offset))
        except OSError as error:
            raise Unreachable(f"{self.where(position)} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise DataError(f"{self.where(position)} ends after {len(data)} of {size} bytes")
        return data


_verified: OrderedDict[tuple, Table] = OrderedDict()


def keep_tables(samples: int) -> None:
    """Keep tables of at least so many samples in this process, for those who read all shards at once."""
    global _cached_samples
    _cached_samples = max(_cached_samples, samples)


def open_shard(index: ShardIndex, shard: Shard) -> OpenSamples:
    """Open a shard after checking its length, SHA-256 and sample count against the index.

    A file that this process has verified before, and that nobody has written to since (same inode, length,
    times of modification and of status change), is not hashed again. A file of the cache that has been
    damaged there is fetched again.

    Raises:
        DataError: missing, changed, truncated or damaged; the message names the shard.
    """
    if shard.content is not None:
        return shard.content.open(index.name_of(shard))
    path, name = index.file_of(shard), index.name_of(shard)
    try:
        return _open_verified(path, name, shard, index.verified)
    except DataError as error:
        if index.address is None or isinstance(error, Unreachable):
            raise
        path.unlink(missing_ok=True)
        return _open_verified(index.file_of(shard), name, shard, index.verified)


def _open_verified(path: Path, name: str, shard: Shard, notes: Path | None) -> OpenShard:
    descriptor = open_plain(path, name)
    try:
        status = os.fstat(descriptor)
        if status.st_size != shard.bytes:
            raise DataError(
                f"{name} has {status.st_size} bytes, the index says {shard.bytes}"
                f"{_first_damage(descriptor, shard)}: {_guess(descriptor)}"
            )
        key = (shard, _identity(status))
        table = _verified.get(key)
        if table is None:
            with _once(notes, key, name) as known:
                if not known:
                    _verify(descriptor, name, shard)
            table = _table(descriptor, name, shard)
            _verified[key] = table
            while len(_verified) > 1 and sum(len(t.keys) for t in _verified.values()) > _cached_samples:
                _verified.popitem(last=False)
        else:
            _verified.move_to_end(key)
        return OpenShard(name, descriptor, table)
    except BaseException:
        os.close(descriptor)
        raise


def open_plain(path: Path, name: str) -> int:
    """A descriptor of a shard's file, nothing verified; the caller closes it.

    Raises:
        DataError: missing, unreadable, or not an ordinary file.
    """
    try:
        # A pipe under a shard's name must not block the reader: it is refused as soon as it is open.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise DataError(f"{name} is missing, but the index lists it; prepare the shards again") from None
    except OSError as error:
        raise Unreachable(f"cannot open {name}: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{name} is not an ordinary file")
    return descriptor


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def verified_once(index: ShardIndex) -> Iterator[ShardIndex]:
    """The index, of whose shards the processes of a node verify each once, all of them together (collective).

    What has been verified is noted in a directory of the machine that nobody else can write to, by the file's identity
    (inode, length, times), and removed with this context.
    """
    token = group.from_rank_zero(secrets.token_hex(16))
    notes = Path(tempfile.gettempdir()) / f"rkdo-{socket.gethostname()}-{token}"

    def make() -> None:
        notes.mkdir(mode=0o700, exist_ok=True)
        if notes.lstat().st_uid != os.geteuid():
            raise DataError(f"{notes} belongs to somebody else")

    group.together(make, "making a directory for what is verified")
    try:
        yield replace(index, verified=notes)
    finally:
        shutil.rmtree(notes, ignore_errors=True)


@contextmanager
def _once(notes: Path | None, key: tuple, shown: str) -> Iterator[bool]:
    """Whether another process of the node has done what is to be done here; noted as done if this context ends well.

    While one does it, the others wait.
    """
    note = -1
    if notes is not None:
        with suppress(OSError):  # where no note can be kept, everybody does it
            path = notes / hashlib.sha256(repr(key).encode()).hexdigest()
            note = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            wait_for_lock(note, path, f"verifies {shown}", signed=False)
    try:
        yield note >= 0 and os.fstat(note).st_size > 0
        with suppress(OSError):
            if note >= 0:
                os.pwrite(note, b"1", 0)
    finally:
        if note >= 0:
            os.close(note)


def _verify(descriptor: int, name: str, shard: Shard) -> None:
    digest, offset = hashlib.sha256(), 0
    try:
        while piece := os.pread(descriptor, PIECE, offset):
            digest.update(piece)
            offset += len(piece)
    except OSError as error:
        raise Unreachable(f"{name} cannot be read at offset {offset}: {error.strerror}") from error
    if digest.hexdigest() != shard.sha256:
        raise DataError(
            f"{name} is damaged{_first_damage(descriptor, shard)}: its SHA-256 is {digest.hexdigest()[:16]}..., "
            f"the index says {shard.sha256[:16]}...; {_guess(descriptor)}"
        )


def _table(descriptor: int, name: str, shard: Shard) -> Table:
    table = scan(descriptor, name)
    if len(table.keys) != shard.samples:
        raise DataError(f"{name} holds {len(table.keys)} samples, the index says {shard.samples}")
    return table


def _first_damage(descriptor: int, shard: Shard) -> str:
    try:
        place = locate(descriptor, shard.checks if isinstance(shard.checks, str) else shard.checks.read())
    except OSError:
        place = ""
    return f" (first in {place})" if place else ""


def _guess(descriptor: int) -> str:
    head = os.pread(descriptor, 512, 0).lstrip()[:200].lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, perhaps of a failed download; fetch it again"
    if not head.strip(b"\0"):
        return "it begins with zeros; copy it again"
    return "copy it again from where it came from, or prepare the shards again with --force"


def check_shards(index: ShardIndex, split: str) -> None:
    """Check that the shards of a split are there and match the index, before training starts.

    Lengths are always compared, SHA-256 too if the split has no more than 2 GiB (the stream verifies each shard that
    this process, or one of its node, has not verified yet). Shards that lie elsewhere are not fetched for this. The
    ranks of a node check a share each: call it on all, and share the verdict.

    Raises:
        DataError: naming the first shard that is missing or differs.
    """
    shards = index.split(split).shards
    if index.address is not None:
        return
    thorough = sum(shard.bytes for shard in shards) <= _THOROUGH
    place, count = group.on_node()
    for shard in shards[place::count]:
        if shard.content is not None:  # verified sample by sample
            continue
        path = index.file_of(shard)
        if thorough or not path.is_file() or path.stat().st_size != shard.bytes:
            open_shard(index, shard).close()


def unlabelled(index: ShardIndex, split: str) -> list[str]:
    """Names of the samples of a split that have no label; every shard is opened, and fetched if it lies elsewhere.

    Raises:
        DataError: naming a shard that is missing or differs from the index.
    """
    return [opened.where(k) for opened, k in _every(index, split) if opened.label(k) is None]


def keys_of(index: ShardIndex, split: str) -> list[str]:
    """Keys of the samples of a split, in the order of their ids (shards are opened as for `unlabelled`)."""
    return [opened.keys[k] for opened, k in _every(index, split)]


def labels_of(index: ShardIndex, split: str) -> list[int]:
    """Class numbers of the samples of a split in the order of their ids, -1 without one (as for `unlabelled`).

    Raises:
        DataError: for a label that is none, too.
    """
    classes = len(index.classes)
    found = ((opened, k, opened.label(k)) for opened, k in _every(index, split))
    return [-1 if text is None else parse_label(text, classes, opened.where(k)) for opened, k, text in found]


def _every(index: ShardIndex, split: str) -> Iterator[tuple[OpenSamples, int]]:
    """Every sample of a split: its open shard, and its position there."""
    for shard in index.split(split).shards:
        opened = open_shard(index, shard)
        try:
            for k in range(shard.samples):
                yield opened, k
        finally:
            opened.close()
