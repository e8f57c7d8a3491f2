"""Small image folders and shard directories for the tests of the data."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rkdo_dist.data.index import ShardIndex, load_index

SHARED_CIFAR = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "cifar10-jpeg.tar"


def picture(seed: int, height: int = 12, width: int = 12, kind: str = "JPEG") -> bytes:
    """An encoded random image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def image_folder(
    root: Path, train: int = 40, test: int = 10, classes: tuple[str, ...] = ("cat", "dog"), size: int = 12
) -> Path:
    """An ImageFolder tree with jpg and png files, sorted by class as usual."""
    number = 0
    for split, count in (("train", train), ("test", test)):
        for k in range(count):
            kind, extension = (("JPEG", "jpg"), ("PNG", "png"))[k % 2]
            folder = root / split / classes[k * len(classes) // count]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{k:04d}.{extension}").write_bytes(picture(number, size, size, kind))
            number += 1
    return root


def tar_of(folder: Path, target: Path, prefix: str = "") -> Path:
    """An ordinary tar of a folder's content."""
    with tarfile.open(target, "w") as archive:
        for name in sorted(os.listdir(folder)):
            archive.add(folder / name, prefix + name)
    return target


def cifar_tar() -> Path:
    """The CIFAR-10 image folder beside the repository; skips without it, fails without it in CI."""
    if not SHARED_CIFAR.exists():
        if os.environ.get("CI"):
            pytest.fail(f"{SHARED_CIFAR.name} is missing beside the repository")
        pytest.skip(f"{SHARED_CIFAR.name} is not in ../shared/data beside the repository")
    return SHARED_CIFAR.resolve()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a directory with its bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def reindexed(index: ShardIndex, name: str, content: bytes, count: int) -> ShardIndex:
    """The index after shard `name` has been given another content, honestly described."""
    (index.root / name).write_bytes(content)
    path = index.root / "index.json"
    tree = json.loads(path.read_text())
    for entry in (e for split in tree["splits"].values() for e in split if e["name"] == name):
        entry.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), samples=count, checks="")
    path.write_text(json.dumps(tree))
    return load_index(index.root)


def shard_of(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()
