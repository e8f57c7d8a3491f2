"""Sample offsets in a tar shard, and location of damage.

Headers are walked by `tarfile` and grouped by webdataset's rule. webdataset's own reader is not used for
this: it takes a damaged header for the end of the archive, and reads members of any type and length into
memory.
"""

from __future__ import annotations

import base64
import binascii
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from webdataset.tariterators import base_plus_ext, group_by_keys

from rkdo_dist.data.images import EXTENSIONS, MAX_BYTES
from rkdo_dist.data.index import DataError

PIECE = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Table:
    """Positions of the samples of a shard.

    Attributes:
        keys: sample keys in the order of the shard.
        images: int64 (n, 2): offset and length of each image.
        labels: int64 (n, 2): offset and length of each `.cls` member; (-1, 0) where there is none.
        starts: int64 (n,): offset of each sample's first header.
    """

    keys: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray
    starts: np.ndarray


class _Capped:
    """A file for `tarfile` that refuses to read one long piece (headers are short)."""

    def __init__(self, descriptor: int, where: str) -> None:
        self._descriptor, self._where, self._place = descriptor, where, 0
        self._length = os.fstat(descriptor).st_size

    def read(self, size: int) -> bytes:
        if size > PIECE:
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
            occurs twice, a sample without exactly one image, or an archive without an end mark (truncated).
    """
    length = os.fstat(descriptor).st_size
    head = os.pread(descriptor, 8, 0)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"{where} is compressed ({kind}); shards must be plain tar files: decompress it first")
    keys: list[str] = []
    places: list[tuple[int, int, int, int, int]] = []
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
    table = np.array(places, dtype=np.int64).reshape(-1, 5)
    return Table(tuple(keys), table[:, :2].copy(), table[:, 2:4].copy(), table[:, 4].copy())


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
                yield {
                    "fname": member.name,
                    "data": (member.offset_data, member.size, offset),
                    "__url__": where,
                }
            _check_end(descriptor, where, int(archive.offset), length)
    except (tarfile.TarError, UnicodeDecodeError, OverflowError) as error:
        raise DataError(f"{where} is not a readable tar file after offset {offset} ({error})") from None


def _check_end(descriptor: int, where: str, offset: int, length: int) -> None:
    """Nothing but zeros, and at least one block of them, may follow the last member."""
    if length - offset < tarfile.BLOCKSIZE:
        raise DataError(f"{where} has no end mark at offset {offset}: it is truncated")
    while piece := os.pread(descriptor, PIECE, offset):
        if piece.strip(b"\0"):
            raise DataError(f"{where}: the header at offset {offset} is damaged")
        offset += len(piece)


def _parts(sample: dict[str, Any], where: str) -> tuple[int, int, int, int, int]:
    images = [extension for extension in EXTENSIONS if extension in sample]
    if len(images) != 1:
        found = ", ".join(sorted(name for name in sample if not name.startswith("__")))
        raise DataError(
            f"{where}: sample {sample['__key__']!r} needs exactly one image ({', '.join(EXTENSIONS)}), it has: {found}"
        )
    offset, size, _ = sample[images[0]]
    if size > MAX_BYTES:
        raise DataError(
            f"{where}: the image of sample {sample['__key__']!r} has {size} bytes; the limit is {MAX_BYTES}"
        )
    label_offset, label_size, _ = sample.get("cls", (-1, 0, 0))
    start = min(value[2] for name, value in sample.items() if not name.startswith("__"))
    return offset, size, label_offset, label_size, start


def checksums(descriptor: int, table: Table) -> str:
    """For each sample its first block and a CRC-32 of everything up to the next sample, for `locate`.

    They locate damage; the SHA-256 of the file detects it. Base64 of little-endian uint32 (n, 2): about
    eleven characters a sample.
    """
    starts = table.starts // tarfile.BLOCKSIZE
    pairs = np.empty((len(starts), 2), dtype="<u4")
    pairs[:, 0] = starts
    pairs[:, 1] = [_crc(descriptor, *extent) for extent in _extents(starts, os.fstat(descriptor).st_size)]
    return base64.b64encode(pairs.tobytes()).decode()


def locate(descriptor: int, checks: str) -> str:
    """First place where a file differs from its `checksums`: "sample 7, key 'x', at offset 4096", or ""."""
    try:
        pairs = np.frombuffer(base64.b64decode(checks, validate=True), dtype="<u4").reshape(-1, 2)
    except (ValueError, binascii.Error):
        return ""
    length = os.fstat(descriptor).st_size
    for k, (begin, end) in enumerate(_extents(pairs[:, 0], length)):
        if begin >= length or _crc(descriptor, begin, end) != pairs[k, 1]:
            return f"sample {k}{_key_at(descriptor, int(pairs[k, 0]) * tarfile.BLOCKSIZE)} at offset {begin}"
    return ""


def _extents(blocks: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each sample in bytes; the first begins with the file, the last ends with it."""
    edges = [int(block) * tarfile.BLOCKSIZE for block in blocks]
    for k, begin in enumerate(edges):
        yield begin if k else 0, edges[k + 1] if k + 1 < len(edges) else max(length, begin)


def _crc(descriptor: int, begin: int, end: int) -> int:
    value = 0
    while begin < end and (piece := os.pread(descriptor, min(PIECE, end - begin), begin)):
        value = zlib.crc32(piece, value)
        begin += len(piece)
    return value


def _key_at(descriptor: int, offset: int) -> str:
    try:
        member = tarfile.TarInfo.frombuf(os.pread(descriptor, tarfile.BLOCKSIZE, offset), "utf-8", "replace")
    except tarfile.TarError:
        return " (its header is damaged)"
    return f", key {base_plus_ext(member.name)[0] or member.name!r},"
