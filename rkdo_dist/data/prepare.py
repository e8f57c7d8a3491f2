"""Preparation of a data set: tar shards and an index, the same bytes every time.

Shards are written one after another under a temporary name, flushed and renamed; a journal beside them
says which are done, so an interrupted preparation continues where it stopped, with the same bytes in the
end. The index is written last: a directory with an index is complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rkdo_dist import documents
from rkdo_dist.data.index import INDEX_NAME, DataError, Progress, Shard, ShardIndex, Split, load_index, save_index
from rkdo_dist.data.order import hash64, permutation, run_length
from rkdo_dist.data.shards import ShardWriter
from rkdo_dist.data.sources import Samples, Source, open_source
from rkdo_dist.files import TEMPORARY, sha256_of, write_atomic
from rkdo_dist.lock import lock_at_once

JOURNAL_NAME = ".prepare.json"
SHARD_BYTES = 64 << 20  # a shard is closed when it has grown to this, or to `shard_size` samples
_REPORT_EVERY = 64
_OURS = re.compile(
    rf"[a-z0-9_]+-[0-9]{{5}}\.tar|\..*{re.escape(TEMPORARY)}|{re.escape(JOURNAL_NAME)}|{re.escape(INDEX_NAME)}"
)


@dataclass(frozen=True)
class Prepared(ShardIndex):
    """The index that was asked for; `built` is False when it was complete already and nothing was done."""

    built: bool = True


def prepare(
    source: str,
    out: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    *,
    shard_size: int | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Write `source` as shuffled WebDataset shards with an index.

    Args:
        source: "digits", "cifar10", "cifar100", "stl10", "imagefolder", or the path of an image folder or
            a tar of one.
        out: directory for `<split>-00000.tar`, ... and `index.json`; made if needed.
        root: where the files of the source are (for a download: where they are already, or are put; default
            `downloads` beside `out`).
        shard_size: most samples in a shard; default: an eighth of the split, but 50 to 2000. A shard is also
            closed when it reaches 64 MiB.
        seed: of the order of the samples.
        force: remove shards and index that are there, and build again.
        progress: called as progress(done, total, label) with counts of samples.

    Raises:
        DataError: unknown source, unreadable or non-image member (named), or an `out` that holds something
            else.
        OSError: from the file system (no space, no permission).
    """
    if shard_size is not None and shard_size < 1:
        raise DataError(f"shard_size must be at least 1, got {shard_size}")
    out = Path(out)
    opened = open_source(source, None if root is None else Path(root), out.absolute().parent / "downloads")
    wanted = {"source": opened.name, "identity": opened.identity, "seed": seed, "shard_size": shard_size}
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is not a directory")
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        if force:
            _clear(out)
        ready = _complete(out, wanted)
        if ready is not None:
            return ready
        done = _journal(out, wanted)
        index = _build(opened, out, wanted, done, progress or (lambda *_: None))
    return Prepared(**vars(index))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not lock_at_once(descriptor, out, f"make sure that no second process prepares {out}"):
            raise DataError(f"another process is preparing {out} right now")
        yield
    finally:
        os.close(descriptor)


def _clear(out: Path) -> None:
    """Remove what this module writes; the index goes first, so that a crash leaves nothing that looks
    complete."""
    names = sorted(os.listdir(out), key=lambda name: name != INDEX_NAME)
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign:
        raise DataError(f"{out} holds other files ({', '.join(foreign[:3])}): give an empty or new directory")
    for name in names:
        (out / name).unlink()


def _complete(out: Path, wanted: dict[str, Any]) -> Prepared | None:
    """The finished index in `out`, if there is one and it is what is wanted."""
    if not (out / INDEX_NAME).exists():
        return None
    index = load_index(out)
    for name, value in wanted.items():
        if getattr(index, name) != value:
            raise DataError(
                f"{out} already has shards with {name} {getattr(index, name)!r}, and {value!r} was asked for: "
                "choose another directory, or rebuild with --force"
            )
    for split in index.splits.values():
        for shard in split.shards:
            path = out / shard.name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise DataError(f"{path} is missing or its length is not the one in its index: rebuild with --force")
    (out / JOURNAL_NAME).unlink(missing_ok=True)
    return Prepared(**vars(index), built=False)


_JOURNAL = documents.shape(
    source=documents.TEXT,
    shards=documents.list_of(
        documents.shape(
            **dict.fromkeys(("name", "sha256", "checks"), documents.TEXT),
            **dict.fromkeys(("samples", "bytes"), documents.COUNT),
            size=documents.maybe(documents.row_of(documents.COUNT, documents.COUNT)),
        )
    ),
)


def _journal(out: Path, wanted: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The shards that an interrupted preparation has finished, by name; starts the journal if there is
    none."""
    path = out / JOURNAL_NAME
    for name in os.listdir(out):
        if name.endswith(TEMPORARY) and _OURS.fullmatch(name):
            (out / name).unlink()
    if os.listdir(out) == [JOURNAL_NAME]:  # of a preparation that has written nothing yet
        path.unlink()
    if not path.exists():
        left = sorted(os.listdir(out))
        if left:
            raise DataError(f"{out} is not empty ({', '.join(left[:3])}): give an empty or new directory")
        write_atomic(path, json.dumps({**wanted, "shards": []}))
        return {}
    try:
        journal = documents.read(path, _JOURNAL, "rebuild with --force")
    except documents.DamagedError as error:
        raise DataError(str(error)) from None
    begun, shards = {name: journal.get(name) for name in wanted}, {s["name"]: s for s in journal["shards"]}
    if begun != wanted:
        raise DataError(
            f"{out} has an unfinished preparation of another data set or with other options ({begun['source']}): "
            "choose another directory, or start again with --force"
        )
    return {name: s for name, s in shards.items() if (out / name).is_file() and sha256_of(out / name) == s["sha256"]}


def _build(
    source: Source, out: Path, wanted: dict[str, Any], done: dict[str, dict[str, Any]], progress: Progress
) -> ShardIndex:
    classes, splits = source.load()
    total = sum(samples.count for samples in splits.values())
    finished: list[dict[str, Any]] = []
    built: dict[str, Split] = {}
    for name, samples in splits.items():
        report = partial(_report, progress, sum(split.samples for split in built.values()), total)
        order = permutation(samples.count, hash64(wanted["seed"], *name.encode()))
        limit = wanted["shard_size"] or run_length(samples.count)
        shards: list[Shard] = []
        start = 0
        while start < samples.count:
            path = out / f"{name}-{len(shards):05d}.tar"
            report(path.name, start)
            stop = min(samples.count, start + limit)
            entry = done.get(path.name) or _write(samples, order, start, stop, path, partial(report, path.name))
            finished.append(entry)
            write_atomic(out / JOURNAL_NAME, json.dumps({**wanted, "shards": finished}))
            shards.append(Shard(**{k: entry[k] for k in ("name", "samples", "sha256", "bytes", "checks")}))
            start += entry["samples"]
        built[name] = Split(name, tuple(shards))
    sizes = {tuple(entry["size"]) if entry["size"] else None for entry in finished}
    index = ShardIndex(out, built, classes, sizes.pop() if len(sizes) == 1 else None, **wanted)
    save_index(index)
    (out / JOURNAL_NAME).unlink()
    progress(total, total, INDEX_NAME)
    return load_index(out)


def _report(progress: Progress, before: int, total: int, label: str, done: int) -> None:
    progress(before + done, total, label)


def _write(
    samples: Samples, order: Any, start: int, stop: int, path: Path, report: Callable[[int], None]
) -> dict[str, Any]:
    """Write samples `order[start:stop]` (fewer if the shard grows too long); returns the shard's journal
    entry."""
    writer = ShardWriter(path)
    sizes = set()
    try:
        for k in range(start, stop):
            item = samples.get(int(order[k]))
            members = {item.extension: item.payload}
            if item.label is not None:
                members["cls"] = str(item.label).encode()
            writer.add(f"{path.name.rsplit('-', 1)[0]}-{k:08d}", members)
            sizes.add(item.size)
            if writer.bytes >= SHARD_BYTES:
                break
            if (k + 1) % _REPORT_EVERY == 0:
                report(k + 1)
        shard = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    return {**vars(shard), "size": list(sizes.pop()) if len(sizes) == 1 else None}
