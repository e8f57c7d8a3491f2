"""Damaged and hostile data: nothing passes silently, nothing is executed, and skipping is the same for
everybody."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from rkdo_dist.data import shards
from rkdo_dist.data.index import DataError, ShardIndex, load_index
from rkdo_dist.data.order import rank_lanes
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.stream import Batch, lane_stream
from tests.pictures import image_folder, picture, reindexed, shard_of

PLAN: dict[str, Any] = {"seed": 3, "all_lanes": 4, "micro_batch": 5, "window": 16}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """125 training samples in 8 shards."""
    root = tmp_path_factory.mktemp("shards")
    prepare("imagefolder", root / "s", image_folder(root / "f", train=125, test=4), shard_size=17)
    return load_index(root / "s")


@pytest.fixture
def copy(index: ShardIndex, tmp_path: Path) -> ShardIndex:
    """The same shards in a place where they can be damaged."""
    shutil.copytree(index.root, tmp_path / "copy")
    return load_index(tmp_path / "copy")


def flat(stream: Iterator[Batch]) -> list[Any]:
    return [
        (
            b.epoch,
            b.step,
            [
                (m.keys, m.ids.tolist(), m.images.numpy().tobytes(), m.labels.tolist(), m.skipped)
                for m in b.lanes
            ],
        )
        for b in stream
    ]


def bit_flip(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def smashed_block(data: bytes, chance: random.Random) -> bytes:
    place = 64 * chance.randrange(len(data) // 64)
    return data[:place] + chance.randbytes(64) + data[place + 64 :]


def truncation(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.choice([chance.randrange(len(data)), 512 * chance.randrange(len(data) // 512)])]


def zero_bytes(data: bytes, chance: random.Random) -> bytes:
    while True:
        place, length = chance.randrange(len(data)), chance.choice([512, 4096, len(data)])
        changed = data[:place] + bytes(len(data[place : place + length])) + data[place + length :]
        if changed != data:
            return changed


def duplicate_key(data: bytes, chance: random.Random) -> bytes:
    """One whole sample once more, in the place of the next one of the same length, or before the end."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
    first = 2 * chance.randrange(len(members) // 2)
    begin = members[first].offset
    end = members[first + 2].offset if first + 2 < len(members) else begin + 2048
    last = members[-1].offset_data + 512 * -(-members[-1].size // 512)
    return data[:last] + data[begin:end] + data[last:]


def error_page(data: bytes, chance: random.Random) -> bytes:
    page = b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n"
    return page if chance.random() < 0.5 else page.ljust(len(data))


KINDS = [bit_flip] * 3 + [smashed_block] * 2 + [truncation] * 2 + [zero_bytes, duplicate_key, error_page]


def damage(k: int, originals: list[bytes]) -> tuple[str, bytes]:
    chance = random.Random(k)
    if k % 11 == 10:  # another shard's file under this name
        return "swapped", originals[1 + chance.randrange(len(originals) - 1)]
    kind = KINDS[k % 11]
    return kind.__name__, kind(originals[0], chance)


def passes_plain_webdataset(path: Path) -> bool:
    """Whether webdataset delivers something from the file without any error."""
    try:
        return sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)) > 0
    except Exception:
        return False


def test_none_of_500_corruptions_passes_silently(copy: ShardIndex) -> None:
    entries = copy.split("train").shards
    originals = [(copy.root / entry.name).read_bytes() for entry in entries]
    shard, path = entries[0], copy.root / entries[0].name
    opened = shards.open_shard(copy.root, shard)
    keys, starts = opened.table.keys, opened.table.starts.tolist()
    opened.close()
    silent, located = 0, 0
    for k in range(500):
        kind, data = damage(k, originals)
        assert data != originals[0], kind
        path.write_bytes(data)
        with pytest.raises(DataError) as caught:
            shards.open_shard(copy.root, shard)
        message = str(caught.value)
        assert path.name in message, kind
        assert "\n" not in message
        silent += passes_plain_webdataset(path)
        first = next(
            (i for i, (a, b) in enumerate(zip(data, originals[0], strict=False)) if a != b), len(data)
        )
        sample = max((n for n, start in enumerate(starts) if start <= first), default=0)
        assert f"sample {sample}" in message, (kind, message)
        assert f"at offset {starts[sample] if sample else 0}" in message
        located += f"key {keys[sample]!r}" in message
    assert located > 250  # the rest has lost the header with the key in it
    assert silent > 150  # the control: plain webdataset lets these pass
    path.write_bytes(originals[0])
    shards.open_shard(copy.root, shard).close()


def skipping(index: ShardIndex, world: int, workers: int) -> list[Any]:
    parts = [
        flat(
            lane_stream(
                index,
                "train",
                **PLAN,
                epochs=2,
                lanes=rank_lanes(4, r, world),
                workers=workers,
                on_corrupt="skip",
            )
        )
        for r in range(world)
    ]
    return [[micro for part in parts for micro in part[k][2]] for k in range(len(parts[0]))]


def test_skipping_puts_the_same_samples_in_place_for_everybody(copy: ShardIndex) -> None:
    want = flat(lane_stream(copy, "train", **PLAN, epochs=2))
    (copy.root / "train-00001.tar").write_bytes(b"gone")
    (copy.root / "train-00005.tar").unlink()
    members = [(f"n{k}.png", picture(k, kind="PNG") if k % 3 else b"broken") for k in range(17)]
    broken = reindexed(copy, "train-00002.tar", shard_of(members), 17)
    got = skipping(broken, 1, 0)
    ends = np.cumsum((0, *broken.split("train").counts))
    bad = {k for s in (1, 5) for k in range(ends[s], ends[s + 1])} | {ends[2] + k for k in range(0, 17, 3)}
    for (_, _, planned), delivered in zip(want, got, strict=True):
        for lane, micro in zip(planned, delivered, strict=True):
            assert micro[4] == sum(k in bad for k in lane[1])
            for was, now in zip(lane[1], micro[1], strict=True):
                assert (was == now) if was not in bad else (now not in bad)
    assert sum(micro[4] for batch in got for micro in batch) > 30
    assert skipping(broken, 2, 0) == got
    assert skipping(broken, 4, 0) == got
    assert skipping(broken, 2, 2) == got


def test_nothing_usable_left_is_an_error_even_when_skipping(copy: ShardIndex) -> None:
    for shard in copy.split("train").shards:
        (copy.root / shard.name).unlink()
    with pytest.raises(DataError, match=r"no shard of split 'train' .* can be read"):
        next(lane_stream(copy, "train", **PLAN, on_corrupt="skip"))
