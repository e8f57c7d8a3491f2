"""Where prepared samples come from: scikit-learn's digits, torchvision's downloads, image folders and tars
of them.

A source is lazy: it knows its name and identity at once, and loads a split when it is asked for it.
Nothing is ever extracted: members of a tar are read from their offsets.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rkdo_dist.data.images import EXTENSIONS, MAX_BYTES, check, encode_png
from rkdo_dist.data.images import FORMATS as IMAGE_FORMATS
from rkdo_dist.data.index import DataError
from rkdo_dist.data.order import hash64, permutation

DOWNLOADS = ("cifar10", "cifar100", "stl10")
NAMES = ("digits", *DOWNLOADS, "imagefolder")
_DIGITS_TRAIN = 0.8
_SPLIT_FOLDERS = ("train", "val", "test", "unlabeled")


@dataclass(frozen=True)
class Item:
    """One sample ready to be written: encoded image, its extension, class number or None, (height, width)."""

    payload: bytes
    extension: str
    label: int | None
    size: tuple[int, int]


@dataclass(frozen=True)
class Samples:
    """One split of a source: how many samples, and how to get one by its number."""

    count: int
    get: Callable[[int], Item]


@dataclass(frozen=True)
class Source:
    """Something to prepare.

    Attributes:
        name: one of `NAMES`.
        identity: changes when the content does, as far as that is known without reading every byte.
        load: returns the class names and the splits.
    """

    name: str
    identity: str
    load: Callable[[], tuple[tuple[str, ...], Mapping[str, Samples]]]


def open_source(source: str, root: Path | None, downloads: Path) -> Source:
    """The source called `source`.

    Args:
        source: one of `NAMES`, or the path of an image folder or of a tar of one.
        root: where files of a download already are, or the image folder.
        downloads: where torchvision may download to when `root` is None.

    Raises:
        DataError: no such source, or its files are not what it says.
    """
    if source == "digits":
        return Source("digits", "scikit-learn digits", _digits)
    if source in DOWNLOADS:
        return Source(source, f"torchvision {source}", lambda: _torchvision(source, root or downloads))
    if source == "imagefolder":
        if root is None:
            raise DataError("imagefolder needs --root: the folder (or tar) with train/ and test/ or val/ in it")
        return _imagefolder(root)
    if os.sep in source or source.endswith(".tar") or Path(source).exists():
        return _imagefolder(Path(source))
    raise DataError(f"unknown source {source!r}; choose {', '.join(NAMES)}, or the path of an image folder")


def _arrays(images: np.ndarray, labels: np.ndarray | None) -> Samples:
    """A split from uint8 (n, 3, H, W) pixels and int labels (n,)."""

    def get(k: int) -> Item:
        payload = encode_png(images[k])
        return Item(payload, "png", None if labels is None else int(labels[k]), images.shape[2:4])

    return Samples(len(images), get)


def _digits() -> tuple[tuple[str, ...], Mapping[str, Samples]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[:, None], 3, axis=1)
    labels = bunch.target
    train = np.zeros(len(labels), dtype=bool)
    for label in range(10):  # stratified: the same share of every class
        members = np.flatnonzero(labels == label)
        chosen = permutation(len(members), hash64(label))[: round(_DIGITS_TRAIN * len(members))]
        train[members[chosen]] = True
    names = tuple(str(k) for k in range(10))
    return names, {
        "train": _arrays(images[train], labels[train]),
        "test": _arrays(images[~train], labels[~train]),
    }


def _torchvision(name: str, root: Path) -> tuple[tuple[str, ...], Mapping[str, Samples]]:
    from torchvision import datasets

    if name == "stl10":
        kinds: dict[str, dict[str, Any]] = {s: {"split": s} for s in ("train", "test", "unlabeled")}
    else:
        kinds = {"train": {"train": True}, "test": {"train": False}}
    make = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[name]
    loaded = {split: _fetch(make, name, root, arguments) for split, arguments in kinds.items()}
    splits = {}
    for split, data in loaded.items():
        images = data.data if name == "stl10" else data.data.transpose(0, 3, 1, 2)
        labels = np.asarray(data.labels if name == "stl10" else data.targets)
        splits[split] = _arrays(images, None if split == "unlabeled" else labels)
    return tuple(loaded["train"].classes), splits


def _fetch(make: Callable[..., Any], name: str, root: Path, arguments: dict[str, Any]) -> Any:
    try:
        return make(str(root), download=False, **arguments)
    except (RuntimeError, FileNotFoundError):
        pass  # not there, or not whole
    try:
        root.mkdir(parents=True, exist_ok=True)
        return make(str(root), download=True, **arguments)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"cannot download {name} to {root} ({error}): put its files there, or say where with --root"
        ) from error


@dataclass(frozen=True)
class _File:
    """An image of a folder: its name there, split, class, length, and its offset in a tar (or -1)."""

    name: str
    split: str
    label: str
    size: int
    offset: int


def _imagefolder(root: Path) -> Source:
    """An ImageFolder tree `<split>/<class>/.../<image>`, or a plain tar of one (a single folder around it
    is fine)."""
    if root.is_dir():
        paths = _walk(root)
    elif root.is_file():
        paths = _members(root)
    else:
        raise DataError(f"there is no image folder or tar {root}")
    files = _sorted_files(root, paths)
    listing = "\n".join(f"{f.split} {f.name.split('/', f.name.count('/') - 1)[-1]} {f.size}" for f in files)
    identity = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    return Source("imagefolder", identity, lambda: _load_folder(root, files))


def _walk(root: Path) -> Iterator[tuple[str, int, int]]:
    """Files of a tree as (path below root with /, length, -1); hidden names are left out, folder links not
    followed."""
    tops = [root / name for name in _SPLIT_FOLDERS if (root / name).is_dir()]
    if not tops:
        inner = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        tops = [inner[0] / s for s in _SPLIT_FOLDERS if (inner[0] / s).is_dir()] if len(inner) == 1 else inner
    for top in tops:
        for folder, folders, names in os.walk(top):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                path = Path(folder, name)
                if not name.startswith("."):
                    if not path.is_file():
                        raise DataError(f"{path} is not an ordinary file")
                    yield path.relative_to(root).as_posix(), path.stat().st_size, -1


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Files of a tar as (name, length, offset)."""
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{path}: member {member.name!r} is not an ordinary file (a link or device)")
                parts = member.name.split("/")
                if member.name.startswith("/") or ".." in parts:
                    raise DataError(f"{path}: member {member.name!r} has an unsafe name")
                if not any(part.startswith(".") and part != "." for part in parts):
                    yield "/".join(p for p in parts if p not in ("", ".")), member.size, member.offset_data
            with open(path, "rb") as file:
                file.seek(archive.offset)
                end = file.read(tarfile.BLOCKSIZE)
            if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
                raise DataError(f"{path} is truncated or damaged at offset {archive.offset}; copy it again")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is not a readable plain tar file ({error}); decompress it first if it is compressed"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _sorted_files(root: Path, paths: Iterator[tuple[str, int, int]]) -> list[_File]:
    entries = sorted(paths)
    tops = {name.split("/")[0] for name, _, _ in entries}
    around = 0 if tops & set(_SPLIT_FOLDERS) or len(tops) != 1 else 1
    files = []
    for name, size, offset in entries:
        parts = name.split("/")[around:]
        if not parts or parts[0] not in _SPLIT_FOLDERS:
            continue  # a README, or a folder beside the splits
        if len(parts) < 3:
            raise DataError(f"{root}: {name} does not lie in a class folder (<split>/<class>/<image>)")
        if not parts[-1].lower().endswith(tuple(f".{extension}" for extension in EXTENSIONS)):
            raise DataError(
                f"{root}: {name} is not an image ({', '.join(EXTENSIONS)}); remove it, or hide it with a leading dot"
            )
        files.append(_File(name, parts[0], parts[1], size, offset))
    if not any(f.split == "train" for f in files):
        there = ", ".join(sorted(tops)[:8]) or "nothing"
        raise DataError(f"{root} needs images in train/<class>/, and in test/<class>/ or val/<class>/; it has: {there}")
    if not any(f.split == "test" for f in files):  # evaluation finds its samples under "test"
        files = [replace(f, split="test") if f.split == "val" else f for f in files]
    return files


def _load_folder(root: Path, files: list[_File]) -> tuple[tuple[str, ...], Mapping[str, Samples]]:
    names = sorted({f.label for f in files if f.split != "unlabeled"})
    numbers: dict[str, int] = {name: k for k, name in enumerate(names)}
    splits = {}
    for split in _SPLIT_FOLDERS:
        members = [f for f in files if f.split == split]
        if members:
            labels = {} if split == "unlabeled" else numbers
            splits[split] = Samples(len(members), partial(_read_item, root, members, labels))
    return tuple(names), splits


def _read_item(root: Path, files: list[_File], labels: dict[str, int], k: int) -> Item:
    file = files[k]
    where = f"{root}: {file.name}" if file.offset >= 0 else str(root / file.name)
    if file.size > MAX_BYTES:
        raise DataError(f"{where} has {file.size} bytes; the limit for one image is {MAX_BYTES}")
    try:
        with open(root if file.offset >= 0 else root / file.name, "rb") as stream:
            stream.seek(max(0, file.offset))
            payload = stream.read(file.size)
    except OSError as error:
        raise DataError(f"cannot read {where}: {error.strerror or error}") from error
    if len(payload) != file.size:
        raise DataError(f"{where} ends after {len(payload)} of {file.size} bytes")
    kind, height, width = check(payload, where)
    return Item(payload, IMAGE_FORMATS[kind], labels.get(file.label), (height, width))
