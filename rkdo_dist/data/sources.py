"""Sources of samples: scikit-learn's digits, torchvision's downloads, image folders and tars of them.

A source is lazy: it knows its name and identity at once, and loads a split when it is asked for it.
Nothing is ever extracted: members of a tar are read from their offsets.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rkdo_dist.data.images import FORMATS as IMAGE_FORMATS
from rkdo_dist.data.images import MAX_BYTES, check, encode_png
from rkdo_dist.data.index import DataError
from rkdo_dist.data.listing import SPLITS, ImageFile, Listing, list_images
from rkdo_dist.data.order import hash64, permutation
from rkdo_dist.web import waiting

DOWNLOADS = ("cifar10", "cifar100", "stl10")
NAMES = ("digits", *DOWNLOADS, "imagefolder")
_DIGITS_TRAIN = 0.8


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
        if root is not None and root.exists() and not root.is_dir():
            raise DataError(
                f"--root {root} is a file: the files of {source} lie in a directory, torchvision's root; a tar of "
                f"images is prepared by its path, `rkdo prepare {root}`"
            )
        return Source(source, f"torchvision {source}", lambda: _torchvision(source, root or downloads))
    if source == "imagefolder":
        if root is None:
            raise DataError("imagefolder needs --root: the folder of images, or a tar of one")
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
        with waiting(f"torchvision's download of {name}"):
            return make(str(root), download=True, **arguments)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"cannot download {name} to {root} ({error}): put its files there, or say where with --root"
        ) from error


def _imagefolder(root: Path) -> Source:
    """A folder of images, or a plain tar of one, see `listing`."""
    listing = list_images(root)
    facts = "\n".join(f"{f.split} {f.name.split('/', f.name.count('/') - 1)[-1]} {f.size}" for f in listing.files)
    identity = hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()
    return Source("imagefolder", identity, lambda: _load_folder(listing))


def _load_folder(listing: Listing) -> tuple[tuple[str, ...], Mapping[str, Samples]]:
    numbers = {name: k for k, name in enumerate(listing.classes)}
    splits = {}
    for split in SPLITS:
        files = listing.split(split)
        if files:
            splits[split] = Samples(len(files), partial(_read_item, listing, files, numbers))
    return listing.classes, splits


def _read_item(listing: Listing, files: tuple[ImageFile, ...], numbers: dict[str, int], k: int) -> Item:
    file, where = files[k], listing.where(files[k])
    if file.size > MAX_BYTES:
        raise DataError(f"{where} has {file.size} bytes; the limit for one image is {MAX_BYTES}")
    payload = listing.read(file)
    kind, height, width = check(payload, where)
    label = None if file.label is None else numbers[file.label]
    return Item(payload, IMAGE_FORMATS[kind], label, (height, width))
