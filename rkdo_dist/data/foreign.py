"""Index of existing WebDataset shards, which are read once and not rewritten.

Each sample needs one image (jpg, jpeg, png or webp) and may have a class number (cls); other members are
ignored.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rkdo_dist.data.archive import PIECE, checksums, scan
from rkdo_dist.data.images import check, parse_label
from rkdo_dist.data.index import INDEX_NAME, DataError, Progress, Shard, ShardIndex, Split, save_index
from rkdo_dist.data.remote import Address, adopt, default_cache, is_url
from rkdo_dist.data.shards import OpenShard, open_plain

_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "val": "test",
    "valid": "test",
    "validation": "test",
    "unlabeled": "unlabeled",
}
MOST_CLASSES = 1_000_000


def index_shards(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] | None = None,
    splits: Mapping[str, Sequence[str]] | None = None,
    classes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> ShardIndex:
    """Write the index of existing shards.

    Args:
        source: a directory with *.tar in it (at any depth), or a list of tar files or URLs below one
            directory.
        out: where index.json is written; default: that directory. Needed for URLs: there the index names
            their place, without any secret part, and `load_index` follows it only where that is allowed.
        splits: names of shards (relative to the directory) by split. Default: by words in their names
            (train, val, test, unlabeled; val becomes test if there is no test), and "train" for shards
            without such a word.
        classes: names; default: the numbers up to the largest label.
        progress: called as progress(done, total, label) with counts of shards.

    Raises:
        DataError: nothing to index, or a shard or sample that could not be used (named); every image is
            decoded.
        OSError: from the file system.
    """
    base, names = _listed(source)
    if isinstance(base, Address) and out is None:
        raise DataError("the index of remote shards needs a directory on this machine: say where with --out")
    chosen = _split(names) if splits is None else {split: list(members) for split, members in splits.items()}
    report = progress or (lambda *_: None)
    built, sizes, largest = {}, set(), -1
    done, total = 0, sum(len(members) for members in chosen.values())
    for split, members in sorted(chosen.items(), key=lambda item: (item[0] != "train", item[0])):
        entries = []
        for name in members:
            report(done, total, name)
            shard, found, label = _examine(base, name, len(classes or ()))
            entries.append(shard)
            sizes |= found
            largest = max(largest, label)
            done += 1
        built[split] = Split(split, tuple(entries))
    report(total, total, INDEX_NAME)
    if not built or not built[next(iter(built))].samples:
        raise DataError(f"there are no samples in {source}")
    index = ShardIndex(
        root=base if isinstance(base, Path) else default_cache(),
        splits=built,
        classes=tuple(classes) if classes is not None else tuple(str(k) for k in range(largest + 1)),
        image_size=sizes.pop() if len(sizes) == 1 else None,
        source="webdataset",
        address=base if isinstance(base, Address) else None,
    )
    folder = Path(out) if out is not None else index.root
    if isinstance(base, Path) and folder.resolve() != base.resolve():
        raise DataError(f"the index of local shards belongs beside them, in {base}")
    folder.mkdir(parents=True, exist_ok=True)
    save_index(index, folder / INDEX_NAME)
    return index


def _listed(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> tuple[Path | Address, list[str]]:
    """The directory of the shards (for URLs: the address of an index there) and their names below it."""
    if isinstance(source, str | os.PathLike) and not is_url(source):
        base = Path(source)
        if base.is_dir():
            names = sorted(path.relative_to(base).as_posix() for path in base.rglob("*.tar") if path.name[0] != ".")
            if not names:
                raise DataError(f"there are no *.tar files in {base}")
            return base, names
        source = [source]
    items = [str(source)] if isinstance(source, str | os.PathLike) else [str(item) for item in source]
    if not items:
        raise DataError("there are no shards to index")
    if any(is_url(item) for item in items):
        addresses = [Address(item) for item in items]
        if len({address.base for address in addresses}) > 1:
            raise DataError("shards that are indexed together must be in one directory")
        return addresses[0].beside(INDEX_NAME), [address.name for address in addresses]
    base = Path(os.path.commonpath([Path(item).absolute().parent for item in items]))
    return base, [Path(item).absolute().relative_to(base).as_posix() for item in items]


def _split(names: list[str]) -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {}
    words = [next((w for w in re.split(r"[^a-z]+", name.lower()) if w in _SPLITS), "train") for name in names]
    both = "test" in words
    for name, word in zip(names, words, strict=True):
        split = "val" if both and _SPLITS[word] == "test" and word != "test" else _SPLITS[word]
        chosen.setdefault(split, []).append(name)
    return chosen


def _examine(base: Path | Address, name: str, classes: int) -> tuple[Shard, set[tuple[int, int]], int]:
    """One shard: its entry, the sizes of its images, and its largest label (-1 without labels)."""
    if isinstance(base, Path):
        path, shown = base / name, str(base / name)
    else:
        there = base.beside(name)
        path, shown = adopt(there, default_cache()), there.shown
    descriptor = open_plain(path, shown)
    try:
        digest, length = hashlib.sha256(), 0
        while piece := os.pread(descriptor, PIECE, length):
            digest.update(piece)
            length += len(piece)
        table = scan(descriptor, shown)
        opened = OpenShard(shown, descriptor, table)
        sizes, largest = set(), -1
        for k in range(len(table.keys)):
            sizes.add(check(opened.image(k), opened.where(k))[1:])
            text = opened.label(k)
            if text is not None:
                label = parse_label(text, classes, opened.where(k))
                if label >= MOST_CLASSES:
                    raise DataError(
                        f"{opened.where(k)} says class {label}; more than {MOST_CLASSES} classes are refused, because "
                        "each would get a name: number the classes from 0"
                    )
                largest = max(largest, label)
        shard = Shard(name, len(table.keys), digest.hexdigest(), length, checksums(descriptor, table))
    finally:
        os.close(descriptor)
    return shard, sizes, largest
