"""A folder of images (or a plain tar of one) read as it is: no conversion, the same guarantees as for shards.

An index of the folder is made once, which reads every file: length, SHA-256 and the header of each image. It is kept in
the cache (`remote.default_cache`), so only files that are new or changed are read again. The images are put into a
drawn order and cut into runs that take the place of shards, just as `prepare` would write them: training on a folder
sees the same samples in the same order as training on its prepared shards. Every image is compared with its SHA-256
when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rkdo_dist.data.errors import DataError
from rkdo_dist.data.images import decode, header
from rkdo_dist.data.index import Progress, Shard, ShardIndex, Split
from rkdo_dist.data.listing import SPLITS, ImageFile, Listing, list_images
from rkdo_dist.data.order import hash64, permutation, run_length
from rkdo_dist.data.remote import default_cache
from rkdo_dist.files import read_regular, write_atomic
from rkdo_dist.lock import wait_for_lock

_THREADS = 8  # reading and hashing leave the interpreter's lock
_SHOWN = 3


@dataclass(frozen=True)
class _Entry:
    """Facts of a file's content: SHA-256 (hex), (height, width); or why it is not a readable image."""

    digest: str
    size: tuple[int, int]
    problem: str = ""


@dataclass(frozen=True)
class ImageRun:
    """Consecutive images of the drawn order, in the role of a shard.

    Attributes:
        listing: where they are.
        files: in order.
        digests: SHA-256 (hex) of each.
        labels: class numbers, -1 without one.
    """

    listing: Listing
    files: tuple[ImageFile, ...]
    digests: tuple[str, ...]
    labels: tuple[int, ...]

    def open(self, name: str) -> OpenRun:
        """Ready for reading; nothing is opened before it is asked for."""
        return OpenRun(self)


class OpenRun:
    """The images of a run, each verified when it is read.

    Attributes:
        keys: names below the folder.
    """

    def __init__(self, run: ImageRun) -> None:
        self._run = run
        self.name = str(run.listing.root)
        self.keys = tuple(file.name for file in run.files)

    def pixels(self, position: int, size: int | None) -> np.ndarray:
        """The decoded image, see `images.decode`.

        Raises:
            DataError: missing, changed since the index was made, or damaged.
        """
        listing, file = self._run.listing, self._run.files[position]
        payload = listing.read(file)
        if hashlib.sha256(payload).hexdigest() != self._run.digests[position]:
            raise DataError(
                f"{self.where(position)} has changed since its index was made: start again to index it again"
            )
        return decode(payload, self.where(position), size)

    def label(self, position: int) -> bytes | None:
        """The class number as text, or None."""
        label = self._run.labels[position]
        return None if label < 0 else str(label).encode()

    def where(self, position: int) -> str:
        """Name of an image in errors."""
        return self._run.listing.where(self._run.files[position])

    def check_unchanged(self) -> None:
        """Nothing: every image is verified when it is read."""

    def close(self) -> None:
        """Nothing is open."""


def folder_index(
    root: Path, *, labels: bool = True, on_corrupt: str = "abort", progress: Progress | None = None
) -> ShardIndex:
    """The index of a folder or tar of images, from the cache as far as it is there.

    Args:
        root: see `listing.list_images`.
        labels: False: no classes, whatever folders there are.
        on_corrupt: "abort" refuses a folder with a file that is not a readable image; "skip" leaves such files out.
        progress: called as progress(done, total, label) with counts of files that had to be read.

    Raises:
        DataError: nothing there to train on, or unreadable files (named and counted).
    """
    listing = list_images(root.absolute(), labels=labels)
    known = _examined(listing, progress or (lambda *_: None))
    broken = [file for file in listing.files if known[file.name].problem]
    if broken and on_corrupt == "abort":
        named = "; ".join(known[file.name].problem for file in broken[:_SHOWN])
        raise DataError(
            f"{root}: {len(broken)} of {len(listing.files)} files cannot be read as images ({named}"
            f"{'; ...' if len(broken) > _SHOWN else ''}): remove them, or leave them out with data.on_corrupt=skip"
        )
    numbers = {name: k for k, name in enumerate(listing.classes)}
    splits = {}
    for name in SPLITS:
        files = [file for file in listing.split(name) if not known[file.name].problem]
        if files:
            splits[name] = Split(name, tuple(_runs(listing, name, files, known, numbers)))
    if "train" not in splits:
        raise DataError(f"{root} holds no readable image in its train split")
    sizes = {known[file.name].size for file in listing.files if not known[file.name].problem}
    return ShardIndex(
        root=listing.root,
        splits=splits,
        classes=listing.classes,
        image_size=sizes.pop() if len(sizes) == 1 else None,
        source="folder",
        notes=tuple(_notes(listing, broken)),
    )


def _runs(
    listing: Listing, split: str, files: Sequence[ImageFile], known: dict[str, _Entry], numbers: dict[str, int]
) -> Iterator[Shard]:
    """The split in its drawn order, in runs."""
    order = permutation(len(files), hash64(0, *split.encode()))
    limit = run_length(len(files))
    for number, start in enumerate(range(0, len(files), limit)):
        chosen = tuple(files[int(k)] for k in order[start : start + limit])
        digests = tuple(known[file.name].digest for file in chosen)
        labels = tuple(-1 if file.label is None else numbers[file.label] for file in chosen)
        facts = "\n".join(f"{f.name} {d} {label}" for f, d, label in zip(chosen, digests, labels, strict=True))
        yield Shard(
            name=f"{split}-{number:05d}",
            samples=len(chosen),
            sha256=hashlib.sha256(facts.encode()).hexdigest(),
            bytes=sum(file.size for file in chosen),
            content=ImageRun(listing, chosen, digests, labels),
        )


def _notes(listing: Listing, broken: Sequence[ImageFile]) -> Iterator[str]:
    """Remarks on this folder for the user, before training on it."""
    if listing.classes:
        shown = ", ".join(listing.classes[:5]) + (", ..." if len(listing.classes) > 5 else "")
        yield f"{listing.root}: {len(listing.files)} images in {len(listing.classes)} classes by folder ({shown})"
    else:
        yield f"{listing.root}: {len(listing.files)} images without labels"
    for what, names in (
        ("are not images and are left out", listing.ignored),
        ("cannot be read as images and are left out", tuple(file.name for file in broken)),
    ):
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            yield f"{listing.root}: {len(names)} files {what} ({shown})"


def _examined(listing: Listing, progress: Progress) -> dict[str, _Entry]:
    """Digest and size of every file, read where the cache does not know it; one process of a machine at a time."""
    place = hashlib.sha256(os.fsencode(listing.root)).hexdigest()[:32]
    with _cache_file(place, listing.root) as cache:
        old = _cached(cache)
        stamps = {file.name: _stamp(listing, file) for file in listing.files}
        known = {name: entry for name, (stamp, entry) in old.items() if stamps.get(name) == stamp}
        missing = [file for file in listing.files if file.name not in known]
        if missing:
            with ThreadPoolExecutor(_THREADS) as pool:
                for done, (file, entry) in enumerate(
                    zip(missing, pool.map(lambda f: _look(listing, f), missing), strict=True)
                ):
                    known[file.name] = entry
                    if done % 64 == 0:
                        progress(done, len(missing), file.name)
            progress(len(missing), len(missing), "")
        if cache is not None and (missing or len(old) != len(known)):
            rows = {n: [*stamps[n], e.digest, *e.size, e.problem] for n, e in known.items()}
            with suppress(OSError):  # a full or read-only cache costs time, not the run
                write_atomic(cache, json.dumps({"format": "rkdo-folder", "version": 1, "files": rows}))
        return known


def _look(listing: Listing, file: ImageFile) -> _Entry:
    try:
        payload = listing.read(file)
        return _Entry(hashlib.sha256(payload).hexdigest(), header(payload, listing.where(file)))
    except DataError as error:
        return _Entry("", (0, 0), str(error))


def _stamp(listing: Listing, file: ImageFile) -> tuple[int, int]:
    """Length and time of modification: a file with the same two is taken to be the same."""
    status = os.stat(listing.root if file.offset >= 0 else listing.root / file.name)
    return file.size, status.st_mtime_ns


@contextmanager
def _cache_file(place: str, root: Path) -> Iterator[Path | None]:
    """The cache file of a folder, locked: others wait for its reader, and need not read it. None where no cache can be
    written."""
    folder = default_cache() / "folders"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / f"{place}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield None
        return
    try:
        wait_for_lock(descriptor, folder / f"{place}.lock", f"reads {root} for its index")
        yield folder / f"{place}.json"
    finally:
        os.close(descriptor)


def _cached(path: Path | None) -> dict[str, tuple[tuple[int, int], _Entry]]:
    """Entries of the cache; none if there is no cache or it cannot be read."""
    if path is None:
        return {}
    try:
        tree = json.loads(read_regular(path, 1 << 32))
        if (tree["format"], tree["version"]) != ("rkdo-folder", 1):
            return {}
        return {
            name: ((row[0], row[1]), _Entry(str(row[2]), (int(row[3]), int(row[4])), str(row[5])))
            for name, row in tree["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}
