"""One shard: written in the same bytes every time, and read only after it is verified.

Reading goes by position: the whole file is hashed once, its headers are scanned once, and samples are then
fetched from their offsets through the open file. So no shuffle buffer holds encoded images, a seek inside
a shard costs nothing, and an error knows its offset. The headers are walked by `tarfile` and grouped by
webdataset's rule. webdataset's own reader is not used for this: it takes a damaged header for the end of
the archive, and reads members of any type and length into memory.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from webdataset.tariterators import group_by_keys
from webdataset.writer import TarWriter

from rkdo_dist.data.images import EXTENSIONS, MAX_BYTES
from rkdo_dist.data.index import DataError, Shard, ShardIndex
from rkdo_dist.files import TEMPORARY, sync_directory

_PIECE = 1 << 20
_MAX_CACHED_SAMPLES = 1 << 18  # about 40 MB of tables a process
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Table:
    """Where the samples of a shard are.

    Attributes:
        keys: sample keys in the order of the shard.
        images: int64 (n, 2): offset and length of each image.
        labels: int64 (n, 2): offset and length of each `.cls` member; (-1, 0) where there is none.
    """

    keys: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray


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
        os.replace(self._temporary, self.path)
        sync_directory(self.path.parent)
        return Shard(self.path.name, self.samples, self._digest.hexdigest(), self.bytes)

    def abandon(self) -> None:
        """Remove what was written so far (nothing after `finish`)."""
        if not self._file.closed:
            with suppress(OSError):
                self._tar.close()
            with suppress(OSError):
                self._file.close()
        self._temporary.unlink(missing_ok=True)


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

    def image(self, position: int) -> bytes:
        """The encoded image of a sample."""
        offset, size = self.table.images[position]
        return self._fetch(offset, size, position)

    def label(self, position: int) -> bytes | None:
        """The text of a sample's `.cls` member, or None where there is none."""
        offset, size = self.table.labels[position]
        return None if offset < 0 else self._fetch(offset, size, position)

    def where(self, position: int) -> str:
        """How errors call a sample: shard, key, offset."""
        return f"{self.name}: sample {self.table.keys[position]!r} at offset {self.table.images[position][0]}"

    def check_unchanged(self) -> None:
        """Whether the file is still the one that was verified.

        Raises:
            DataError: if somebody wrote to it since.
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
            raise DataError(f"{self.where(position)} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise DataError(f"{self.where(position)} ends after {len(data)} of {size} bytes")
        return data


_verified: OrderedDict[tuple, Table] = OrderedDict()


def open_shard(root: Path, shard: Shard) -> OpenShard:
    """Open a shard after checking its length, SHA-256 and sample count against the index.

    A file that this process has verified before, and that nobody has written to since (same inode, length,
    times of modification and of status change), is not hashed again.

    Raises:
        DataError: missing, changed, truncated or damaged; the message names the shard.
    """
    path = root / shard.name
    descriptor = _open(path)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is not an ordinary file")
        if status.st_size != shard.bytes:
            raise DataError(
                f"{path} has {status.st_size} bytes, the index says {shard.bytes}: {_guess(descriptor)}"
            )
        key = (shard, _identity(status))
        table = _verified.get(key)
        if table is None:
            table = _verify(descriptor, path, shard)
            _verified[key] = table
            while len(_verified) > 1 and sum(len(t.keys) for t in _verified.values()) > _MAX_CACHED_SAMPLES:
                _verified.popitem(last=False)
        else:
            _verified.move_to_end(key)
        return OpenShard(str(path), descriptor, table)
    except BaseException:
        os.close(descriptor)
        raise


def _open(path: Path) -> int:
    try:
        # A pipe under a shard's name must not block the reader: it is refused as soon as it is open.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise DataError(f"{path} is missing, but the index lists it; prepare the shards again") from None
    except OSError as error:
        raise DataError(f"cannot open {path}: {error.strerror or error}") from error


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _verify(descriptor: int, path: Path, shard: Shard) -> Table:
    digest, offset = hashlib.sha256(), 0
    try:
        while piece := os.pread(descriptor, _PIECE, offset):
            digest.update(piece)
            offset += len(piece)
    except OSError as error:
        raise DataError(f"{path} cannot be read at offset {offset}: {error.strerror}") from error
    if digest.hexdigest() != shard.sha256:
        raise DataError(
            f"{path} is damaged: its SHA-256 is {digest.hexdigest()[:16]}..., the index says "
            f"{shard.sha256[:16]}... ({_guess(descriptor)})"
        )
    table = scan(descriptor, str(path))
    if len(table.keys) != shard.samples:
        raise DataError(f"{path} holds {len(table.keys)} samples, the index says {shard.samples}")
    return table


def _guess(descriptor: int) -> str:
    head = os.pread(descriptor, 512, 0).lstrip()[:200].lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, perhaps of a failed download; fetch it again"
    if not head.strip(b"\0"):
        return "it begins with zeros; copy it again"
    return "copy it again from where it came from, or prepare the shards again with --force"


class _Capped:
    """A file for `tarfile` that refuses to read one long piece (headers are short) and remembers its
    place."""

    def __init__(self, descriptor: int, where: str) -> None:
        self._descriptor, self._where, self._place = descriptor, where, 0
        self._length = os.fstat(descriptor).st_size

    def read(self, size: int) -> bytes:
        if size > _PIECE:
            raise DataError(f"{self._where}: a header at offset {self._place} claims {size} bytes")
        data = os.pread(self._descriptor, size, self._place)
        self._place += len(data)
        return data

    def seek(self, place: int, whence: int = 0) -> int:
        self._place = place + (0, self._place, self._length)[whence]
        return self._place

    def tell(self) -> int:
        return self._place


def scan(descriptor: int, where: str) -> Table:
    """Walk the headers of a tar file and group its members into samples; no payload is read.

    Raises:
        DataError: a compressed or damaged archive, a member that is not an ordinary file, a key that
            occurs twice, a sample without exactly one image, or an archive without its end mark (as a
            truncated one).
    """
    length = os.fstat(descriptor).st_size
    head = os.pread(descriptor, 8, 0)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"{where} is compressed ({kind}); shards must be plain tar files: decompress it first"
            )
    keys: list[str] = []
    places: list[tuple[int, int, int, int]] = []
    try:
        for sample in group_by_keys(_members(descriptor, where, length)):
            keys.append(sample["__key__"])
            places.append(_parts(sample, where))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: {error.args[0]}") from None
    if len(set(keys)) < len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise DataError(f"{where}: key {twice!r} occurs twice")
    table = np.array(places, dtype=np.int64).reshape(-1, 4)
    return Table(tuple(keys), table[:, :2].copy(), table[:, 2:].copy())


def _members(descriptor: int, where: str, length: int) -> Iterator[dict[str, Any]]:
    source: Any = _Capped(descriptor, where)
    offset = 0
    try:
        with tarfile.open(fileobj=source, mode="r:", errors="strict", encoding="utf-8") as archive:
            for member in archive:
                offset = member.offset
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"{where}: member {member.name!r} at offset {offset} is not an ordinary file "
                        "(a link, device or sparse file); it is refused"
                    )
                if member.offset_data + member.size > length:
                    raise DataError(f"{where}: member {member.name!r} at offset {offset} is cut off")
                if "\0" in member.name or member.name.startswith("/") or ".." in member.name.split("/"):
                    raise DataError(f"{where}: member {member.name!r} at offset {offset} has an unsafe name")
                yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": where}
            _check_end(descriptor, where, int(archive.offset), length)
    except (tarfile.TarError, UnicodeDecodeError, OverflowError) as error:
        raise DataError(f"{where} is not a readable tar file after offset {offset} ({error})") from None


def _check_end(descriptor: int, where: str, offset: int, length: int) -> None:
    """Nothing but zeros, and at least one block of them, may follow the last member."""
    if length - offset < tarfile.BLOCKSIZE:
        raise DataError(f"{where} has no end mark at offset {offset}: it is truncated")
    while piece := os.pread(descriptor, _PIECE, offset):
        if piece.strip(b"\0"):
            raise DataError(f"{where}: the header at offset {offset} is damaged")
        offset += len(piece)


def _parts(sample: dict[str, Any], where: str) -> tuple[int, int, int, int]:
    images = [extension for extension in EXTENSIONS if extension in sample]
    if len(images) != 1:
        found = ", ".join(sorted(name for name in sample if not name.startswith("__")))
        raise DataError(
            f"{where}: sample {sample['__key__']!r} needs exactly one image "
            f"({', '.join(EXTENSIONS)}), it has: {found}"
        )
    offset, size = sample[images[0]]
    if size > MAX_BYTES:
        raise DataError(
            f"{where}: the image of sample {sample['__key__']!r} has {size} bytes; the limit is {MAX_BYTES}"
        )
    return (offset, size, *sample.get("cls", (-1, 0)))


def check_shards(index: ShardIndex, split: str, most_bytes: int = 2 << 30) -> None:
    """Whether the shards of a split are there and what the index says, before anything depends on it.

    Args:
        most_bytes: lengths are always compared; SHA-256 too if the split has no more bytes than this. (The
            stream verifies each shard again before it uses it.)

    Raises:
        DataError: naming the first shard that is missing or differs.
    """
    shards = index.split(split).shards
    thorough = sum(shard.bytes for shard in shards) <= most_bytes
    for shard in shards:
        path = index.root / shard.name
        if thorough or not path.is_file() or path.stat().st_size != shard.bytes:
            open_shard(index.root, shard).close()
