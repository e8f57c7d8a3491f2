"""The paper protocol's images: the first ones in the source's own order, whatever order `prepare` drew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rkdo_dist.data.index import ShardIndex, load_index
from rkdo_dist.data.own_order import first_samples
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.sources import open_source
from rkdo_dist.data.stream import evaluation_stream

COUNT = 100


def delivered(index: ShardIndex, split: str = "test") -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the first COUNT samples, in blocks of 32."""
    blocks = [block for _, block in evaluation_stream(index, split, 32, limit=COUNT)]
    return np.concatenate([b.images for b in blocks]), np.concatenate([b.labels for b in blocks])


@pytest.mark.parametrize(("seed", "shard_size"), [(0, None), (3, 31)])
def test_the_first_images_are_the_sources_own(tmp_path: Path, seed: int, shard_size: int | None) -> None:
    prepare("digits", tmp_path / "digits", seed=seed, shard_size=shard_size)
    index = load_index(tmp_path / "digits")
    images, labels = delivered(first_samples(index, "test", COUNT))
    own = open_source("digits", None, tmp_path).load()[1]["test"]
    assert labels.tolist() == [own.get(k).label for k in range(COUNT)]
    drawn, drawn_labels = delivered(index)
    assert drawn_labels.tolist() != labels.tolist()  # without undoing the draw they are others
    whole = first_samples(index, "test", 10_000)
    assert whole.split("test").samples == index.split("test").samples
    assert {image.tobytes() for image in drawn} <= {image.tobytes() for image in _all(whole)}
    assert len(images) == COUNT
    assert whole.digest() != index.digest()


def _all(index: ShardIndex) -> np.ndarray:
    return np.concatenate([block.images for _, block in evaluation_stream(index, "test", 64)])


def test_a_folder_keeps_its_drawn_order(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for k in range(20):
                Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / "images" / split / label / f"{k:02d}.png")
    prepare("imagefolder", tmp_path / "shards", tmp_path / "images")
    index = load_index(tmp_path / "shards")
    assert first_samples(index, "test", 10) is index
    labels = [label for _, block in evaluation_stream(index, "test", 32, limit=10) for label in block.labels.tolist()]
    assert set(labels) == {0, 1}  # in its own order all ten would be of one class
