"""Damaged and hostile data: nothing passes silently, nothing is executed, and skipping is the same for
everybody."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from rkdo_dist.data import shards
from rkdo_dist.data.archive import scan
from rkdo_dist.data.images import decode
from rkdo_dist.data.index import DataError, Shard, ShardIndex, load_index
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
            [(m.keys, m.ids.tolist(), m.images.numpy().tobytes(), m.labels.tolist(), m.skipped) for m in b.lanes],
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


@pytest.mark.parametrize(
    "numbers", [range(500), pytest.param(range(500, 1000), marks=pytest.mark.nightly)], ids=["first", "more"]
)
def test_none_of_500_corruptions_passes_silently(copy: ShardIndex, numbers: range) -> None:
    entries = copy.split("train").shards
    originals = [(copy.root / entry.name).read_bytes() for entry in entries]
    shard, path = entries[0], copy.root / entries[0].name
    opened = shards.open_shard(copy, shard)
    keys, starts = opened.table.keys, opened.table.starts.tolist()
    opened.close()
    silent, located = 0, 0
    for k in numbers:
        kind, data = damage(k, originals)
        assert data != originals[0], kind
        path.write_bytes(data)
        with pytest.raises(DataError) as caught:
            shards.open_shard(copy, shard)
        message = str(caught.value)
        assert path.name in message, kind
        assert "\n" not in message
        silent += passes_plain_webdataset(path)
        first = next((i for i, (a, b) in enumerate(zip(data, originals[0], strict=False)) if a != b), len(data))
        sample = max((n for n, start in enumerate(starts) if start <= first), default=0)
        assert f"sample {sample}" in message, (kind, message)
        assert f"at offset {starts[sample] if sample else 0}" in message
        located += f"key {keys[sample]!r}" in message
    assert located > 250  # the rest has lost the header with the key in it
    assert silent > 150  # the control: plain webdataset lets these pass
    path.write_bytes(originals[0])
    shards.open_shard(copy, shard).close()


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


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


EXTENSIONS = (
    "pyd",
    "pkl",
    "pickle",
    "pth",
    "pt",
    "npy",
    "npz",
    "ten",
    "tb",
    "mp",
    "json",
    "txt",
    "cbor",
    "jpg.pyd",
)


def read_all(index: ShardIndex) -> int:
    return sum(len(b.lanes[0].keys) for b in lane_stream(index, "train", seed=0, all_lanes=1, micro_batch=1))


def test_pickles_are_never_opened(copy: ShardIndex, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Bomb(canary))
    name, rest = copy.split("train").shards[0].name, 125 - 17
    beside = [("a.jpg", picture(1)), *((f"a.{extension}", payload) for extension in EXTENSIONS)]
    assert read_all(reindexed(copy, name, shard_of(beside), 1)) == rest + 1  # present, but nobody looks
    for extension in ("jpg", "jpeg", "png", "webp", "cls"):
        members = [(f"a.{extension}", payload), *([("a.jpg", picture(1))] if extension == "cls" else [])]
        with pytest.raises(DataError, match=r"sample 'a'"):
            read_all(reindexed(copy, name, shard_of(members), 1))
    for content in (payload, payload.ljust(10240, b"\0")):
        with pytest.raises(DataError, match=name):
            read_all(reindexed(copy, name, content, 1))
    (copy.root / "index.json").write_bytes(payload)
    with pytest.raises(DataError, match="not valid JSON"):
        load_index(copy.root)
    assert not canary.exists()
    pickle.loads(payload)  # the trap works
    assert canary.exists()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def sparse_header(name: str, length: int) -> bytes:
    """An old GNU sparse member: no data, `length` bytes of zeros when read."""
    header = bytearray(member(name, tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[483:495] = f"{length:011o}\0".encode()
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


def pax_header(length: int) -> bytes:
    return member("pax", tarfile.XHDTYPE, size=length).tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            member("a.jpg", tarfile.SYMTYPE, "/etc/passwd").tobuf(),
            "member 'a.jpg' at offset 0 is not an ordinary file",
        ),
        (member("a.jpg", tarfile.LNKTYPE, "/etc/passwd").tobuf(), "not an ordinary file"),
        (member("a.jpg", tarfile.FIFOTYPE).tobuf(), "not an ordinary file"),
        (member("a.jpg", tarfile.CHRTYPE).tobuf(), "not an ordinary file"),
        (sparse_header("a.jpg", 6 << 30), "not an ordinary file"),
        (member("../a.jpg").tobuf(), "unsafe name"),
        (member("/a.jpg").tobuf(), "unsafe name"),
        (member("a.jpg", size=1 << 40).tobuf(tarfile.GNU_FORMAT), "cut off|not a readable"),
        (pax_header(4 << 30), "claims 4294967296 bytes|not a readable"),
    ],
)
def test_hostile_members_are_refused(copy: ShardIndex, content: bytes, message: str) -> None:
    name = copy.split("train").shards[0].name
    with pytest.raises(DataError, match=message):
        read_all(reindexed(copy, name, content + bytes(10240), 1))


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that want to be large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, height: int, extra: bytes = b"") -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return (
            b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(bytes(1 << 16))) + chunk(b"IEND", b"")
        )

    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 << 20)))
    webp = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(webp, "WEBP")
    jpeg = bytearray(picture(1))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    yield "wide.png", png(60_000, 60_000)
    yield "long.png", png(1, 2**31 - 1)
    yield "text.png", png(8, 8, text)
    yield "large.webp", webp.getvalue()
    yield "large.jpg", bytes(jpeg)
    yield "shard", gzip.compress(bytes(300 << 20))


def _open_bombs(root: Path, names: list[str]) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew here
    before = psutil.Process().memory_info().rss / 2**20
    for name in names:
        data = (root / name).read_bytes()
        try:
            if name == "shard":
                shard = Shard(name, 1, hashlib.sha256(data).hexdigest(), len(data))
                shards.open_shard(ShardIndex(root, {}), shard)
            else:
                decode(data, name)
        except DataError:
            continue
        raise AssertionError(f"{name} was accepted")
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    grown = int(peak.group(1)) / 1024 - before
    assert grown < 150, f"memory grew by {grown} MB"


def test_bombs_stay_small(tmp_path: Path) -> None:
    names = []
    for name, content in bombs():
        assert len(content) < 1 << 20
        (tmp_path / name).write_bytes(content)
        names.append(name)
    child = multiprocessing.get_context("forkserver").Process(target=_open_bombs, args=(tmp_path, names))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_scan_needs_the_end_mark() -> None:
    whole = shard_of([("a.jpg", picture(1))])
    cut = whole[: 512 + 512 * -(-len(picture(1)) // 512)]
    with open(os.memfd_create("shard"), "r+b") as file:
        file.write(cut)
        file.flush()
        with pytest.raises(DataError, match="no end mark"):
            scan(file.fileno(), "x")


def test_urls_in_an_index_are_refused(copy: ShardIndex, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    tree = json.loads((copy.root / "index.json").read_text())
    for name in (
        f"pipe:touch {canary}",
        f"file:{canary}",
        "http://localhost/x.tar",
        "s3://bucket/x.tar",
        "gopen:x",
    ):
        tree["splits"]["train"][0]["name"] = name
        (copy.root / "index.json").write_text(json.dumps(tree))
        with pytest.raises(DataError, match="no scheme or colon is allowed"):
            load_index(copy.root)
    assert not canary.exists()
