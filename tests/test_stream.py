"""Stream: exactly the planned samples, whoever reads them; nothing unverified; errors in one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from rkdo_dist.data import samples, shards, stream
from rkdo_dist.data.index import DataError, ShardIndex, load_index
from rkdo_dist.data.order import EpochPlan, rank_lanes
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.stream import Batch, MicroBatch, evaluation_stream, lane_stream
from tests.pictures import image_folder, picture, reindexed, shard_of
from tests.ranks import PRELOAD

multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOAD, "rkdo_dist.data.stream"])

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
PLAN: dict[str, Any] = {"seed": 3, "all_lanes": 4, "micro_batch": 5, "window": 16}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """125 training samples in 8 shards, 30 for testing in 2."""
    root = tmp_path_factory.mktemp("shards")
    prepare("imagefolder", root / "s", image_folder(root / "f", train=125, test=30), shard_size=17)
    return load_index(root / "s")


@pytest.fixture
def copy(index: ShardIndex, tmp_path: Path) -> ShardIndex:
    """The same shards in a place where they can be damaged."""
    shutil.copytree(index.root, tmp_path / "copy")
    return load_index(tmp_path / "copy")


def by_hand(index: ShardIndex, split: str) -> list[tuple[str, np.ndarray, int]]:
    """Every sample in index order, read with nothing but tarfile and Pillow."""
    found = []
    for shard in index.split(split).shards:
        with tarfile.open(index.root / shard.name) as archive:
            names = sorted({name.split(".")[0] for name in archive.getnames()})
            for name in names:
                member = next(m for m in archive.getnames() if m in (f"{name}.jpg", f"{name}.png"))
                data, label = archive.extractfile(member), archive.extractfile(f"{name}.cls")
                assert data is not None
                assert label is not None
                pixels = np.asarray(Image.open(io.BytesIO(data.read())).convert("RGB")).transpose(2, 0, 1)
                found.append((name, pixels, int(label.read())))
    return found


def flat(micro: MicroBatch) -> tuple[list[str], list[int], bytes, list[int], int]:
    return (
        micro.keys,
        micro.ids.tolist(),
        micro.images.numpy().tobytes(),
        micro.labels.tolist(),
        micro.skipped,
    )


def all_of(stream: Iterator[Batch]) -> list[Any]:
    return [(b.epoch, b.step, [flat(micro) for micro in b.lanes]) for b in stream]


def test_it_delivers_what_the_plan_says(index: ShardIndex) -> None:
    expected = by_hand(index, "train")
    for batch in lane_stream(index, "train", **PLAN, epoch=4, epochs=2):
        plan = EpochPlan(index.split("train").counts, 3, batch.epoch, 4, 5, 16)
        for lane, micro in enumerate(batch.lanes):
            ids = plan.micro_batch_ids(batch.step, lane)
            assert micro.ids.tolist() == ids.tolist()
            assert micro.keys == [expected[k][0] for k in ids]
            assert micro.labels.tolist() == [expected[k][2] for k in ids]
            assert micro.images.dtype == torch.uint8
            assert np.array_equal(micro.images.numpy(), np.stack([expected[k][1] for k in ids]))
            assert micro.skipped == 0


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_any_number_of_workers_gives_the_same_bits(index: ShardIndex, workers: int) -> None:
    want = all_of(lane_stream(index, "train", **PLAN, epochs=2))
    assert [(e, s) for e, s, _ in want] == [(e, s) for e in range(2) for s in range(6)]
    state = torch.random.get_rng_state()
    assert all_of(lane_stream(index, "train", **PLAN, epochs=2, workers=workers)) == want
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's draws are shifted


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (2, 2), (4, 3)])
def test_any_number_of_ranks_gives_the_same_global_batches(index: ShardIndex, world: int, workers: int) -> None:
    want = all_of(lane_stream(index, "train", **PLAN))
    parts = [
        all_of(lane_stream(index, "train", **PLAN, lanes=rank_lanes(4, rank, world), workers=workers))
        for rank in range(world)
    ]
    for step, whole in enumerate(want):
        assert whole[2] == [micro for part in parts for micro in part[step][2]]


@pytest.mark.parametrize("workers", [0, 5])
def test_it_begins_anywhere(index: ShardIndex, workers: int) -> None:
    want = all_of(lane_stream(index, "train", **PLAN, epochs=3, steps_per_epoch=4))
    assert len(want) == 12
    for epoch, step in ((0, 3), (1, 0), (2, 1), (1, 4)):
        got = all_of(
            lane_stream(
                index,
                "train",
                **PLAN,
                epoch=epoch,
                start_step=step,
                epochs=3 - epoch,
                steps_per_epoch=4,
                workers=workers,
            )
        )
        assert got == [item for item in want if item[:2] >= (epoch, step)]


def test_shards_are_opened_about_once_and_a_seek_reads_nothing_else(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    fetched: list[int] = []
    original = samples.open_shard
    monkeypatch.setattr(samples, "open_shard", lambda index, shard: opened.append(shard.name) or original(index, shard))
    image = shards.OpenShard.image
    monkeypatch.setattr(shards.OpenShard, "image", lambda self, k: fetched.append(k) or image(self, k))
    count = len(index.split("train").shards)
    for epoch in range(5):
        opened.clear()
        list(lane_stream(index, "train", **PLAN, epoch=epoch))
        assert len(opened) <= 1.1 * count + PLAN["all_lanes"]
        opened.clear()
        fetched.clear()
        rest = list(lane_stream(index, "train", **PLAN, epoch=epoch, start_step=5))
        assert len(rest) == 1
        assert len(fetched) == 20
        assert len(opened) <= 2 * PLAN["all_lanes"]


def test_bytes_are_verified_before_any_sample_is_used(copy: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    image = shards.OpenShard.image
    monkeypatch.setattr(shards.OpenShard, "image", lambda self, k: fetched.append(k) or image(self, k))
    first = next(iter(EpochPlan(copy.split("train").counts, 3, 0, 4, 5, 16).windows(0))).shard
    path = copy.root / copy.split("train").shards[first].name
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1  # far behind the first sample
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name} is damaged .*: its SHA-256"):
        next(lane_stream(copy, "train", **PLAN))
    assert not fetched


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "is missing, but the index lists it"),
        (lambda p: p.write_bytes(p.read_bytes()[:-512]), "bytes, the index says"),
        (lambda p: p.write_bytes(b"<!DOCTYPE html>".ljust(p.stat().st_size)), "web page"),
        (lambda p: p.write_bytes(bytes(p.stat().st_size)), "begins with zeros"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "not an ordinary file"),
    ],
)
def test_a_damaged_shard_is_one_clear_error(copy: ShardIndex, workers: int, damage: Any, message: str) -> None:
    path = copy.root / "train-00002.tar"
    damage(path)
    stream = lane_stream(copy, "train", **PLAN, workers=workers)
    with pytest.raises(DataError, match=rf"train-00002\.tar.*{message}") as caught:
        list(stream)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=message):
        shards.check_shards(copy, "train")


@pytest.mark.parametrize(
    ("members", "count", "message"),
    [
        ([("a.jpg", picture(1)), ("a.cls", b"0")], 2, "holds 1 samples, the index says 2"),
        ([("a.jpg", picture(1)), ("b.jpg", picture(2)), ("a.png", picture(3))], 3, "key 'a' occurs twice"),
        ([("a.jpg", picture(1)), ("a.jpg", picture(2))], 1, "duplicate file name"),
        ([("a.cls", b"0")], 1, "sample 'a' needs exactly one image .* it has: cls"),
        ([("a.jpg", picture(1)), ("a.png", picture(1))], 1, "needs exactly one image"),
        ([("a.jpg", b"no image"), ("a.cls", b"0")], 1, "sample 'a' at offset 512 is not a readable"),
        ([("a.jpg", picture(1)[:-60]), ("a.cls", b"0")], 1, "sample 'a' at offset 512 cannot be decoded"),
        ([("a.jpg", picture(1)), ("a.cls", b"2")], 1, "sample 'a' .* says class 2, but the index has 2"),
        ([("a.jpg", picture(1)), ("a.cls", b"cat")], 1, "sample 'a' .* is not a class number: b'cat'"),
        ([("../a.jpg", picture(1))], 1, "unsafe name"),
    ],
)
def test_a_shard_that_matches_its_index_but_holds_nonsense(
    copy: ShardIndex, members: list[tuple[str, bytes]], count: int, message: str
) -> None:
    broken = reindexed(copy, "train-00003.tar", shard_of(members), count)
    with pytest.raises(DataError, match=rf"train-00003\.tar.*{message}"):
        list(lane_stream(broken, "train", seed=0, all_lanes=1, micro_batch=1))


def test_samples_without_a_label_have_minus_one(copy: ShardIndex) -> None:
    odd = reindexed(copy, "train-00000.tar", shard_of([("x/1.PNG", picture(1, kind="PNG")), ("x/1.seg.png", b"?")]), 1)
    seen = {k: v for b in lane_stream(odd, "train", seed=0, all_lanes=1, micro_batch=1)
            for k, v in zip(b.lanes[0].keys, b.lanes[0].labels.tolist(), strict=True)}  # fmt: skip
    assert seen.pop("x/1") == -1
    assert set(seen.values()) == {0, 1}


def test_images_of_several_sizes_need_a_size(copy: ShardIndex) -> None:
    mixed = reindexed(copy, "train-00000.tar", shard_of([("a.png", picture(1, 20, 40, "PNG"))]), 1)
    plan = {"seed": 0, "all_lanes": 1, "micro_batch": 50}
    with pytest.raises(
        DataError, match=r"a' at offset 512 has 40 x 20 pixels, but .*/copy says 12 x 12: .*data.image_size"
    ):
        list(lane_stream(mixed, "train", **plan))
    with pytest.raises(DataError, match=r"12 x 12 and 40 x 20\): set data.image_size"):
        list(lane_stream(dataclasses.replace(mixed, image_size=None), "train", **plan))
    found = {}
    for batch in lane_stream(mixed, "train", **plan, size=12):
        assert batch.lanes[0].images.shape[1:] == (3, 12, 12)
        found.update(zip(batch.lanes[0].keys, batch.lanes[0].images, strict=True))
    resized = Image.open(io.BytesIO(picture(1, 20, 40, "PNG"))).resize((24, 12), Image.Resampling.BILINEAR)
    if "a" in found:
        assert np.array_equal(found["a"].numpy(), np.asarray(resized)[:, 6:18].transpose(2, 0, 1))
    assert len(found) >= 100


def test_too_few_samples_and_wrong_arguments(index: ShardIndex) -> None:
    with pytest.raises(DataError, match="125 samples, fewer than one global batch of 128"):
        lane_stream(index, "train", seed=0, all_lanes=2, micro_batch=64)
    with pytest.raises(DataError, match="has no split 'val'; it has train, test"):
        lane_stream(index, "val", seed=0, all_lanes=2, micro_batch=64)
    with pytest.raises(ValueError, match="start_step 7"):
        lane_stream(index, "train", **PLAN, start_step=7)
    with pytest.raises(ValueError, match="cannot read lanes"):
        lane_stream(index, "train", **PLAN, lanes=range(3, 5))
    with pytest.raises(ValueError, match="on_corrupt"):
        lane_stream(index, "train", **PLAN, on_corrupt="ignore")
    with pytest.raises(ValueError, match="rank 2 of 2"):
        evaluation_stream(index, "test", 8, rank=2, world=2)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 3)])
def test_evaluation_delivers_every_sample_once(
    index: ShardIndex, world: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_BLOCKS", 1)
    expected = by_hand(index, "test")
    blocks: dict[int, MicroBatch] = {}
    for rank in range(world):
        for number, micro in evaluation_stream(index, "test", 7, rank, world, workers=workers):
            assert number % world == rank
            blocks[number] = micro
    assert sorted(blocks) == list(range(5))
    assert [len(blocks[k].keys) for k in range(5)] == [7, 7, 7, 7, 2]
    assert [key for k in range(5) for key in blocks[k].keys] == [e[0] for e in expected]
    assert torch.cat([blocks[k].ids for k in range(5)]).tolist() == list(range(30))
    images = torch.cat([blocks[k].images for k in range(5)]).numpy()
    assert np.array_equal(images, np.stack([e[1] for e in expected]))
    limited = [m for _, m in evaluation_stream(index, "test", 7, limit=9)]
    assert [len(m.keys) for m in limited] == [7, 2]


def test_a_change_during_reading_is_noticed(copy: ShardIndex) -> None:
    stream = lane_stream(copy, "train", seed=0, all_lanes=1, micro_batch=2, window=2)
    next(stream)
    for shard in copy.split("train").shards:
        with open(copy.root / shard.name, "r+b") as file:
            file.write(b"?")
    with pytest.raises(DataError, match=r"was changed while it was being read|is damaged"):
        list(stream)


def test_workers_that_cannot_be_started_are_reported(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(loader: Any) -> Any:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", dead)
    with pytest.raises(DataError, match=r"a loader worker ended unexpectedly \(\[Errno 32\] Broken pipe\)"):
        next(lane_stream(index, "train", **PLAN, workers=1))


def test_workers_end_with_the_stream_and_a_killed_one_is_reported(index: ShardIndex) -> None:
    def children() -> list[psutil.Process]:
        return [p for p in psutil.Process().children(recursive=True) if p.pid not in before]

    list(lane_stream(index, "train", **PLAN, workers=1))  # starts the fork server and its tracker
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    stream = lane_stream(index, "train", **PLAN, workers=2, epochs=50)
    next(stream)
    assert len(children()) == 2
    stream.close()
    deadline = time.monotonic() + 10
    while children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not children()
    stream = lane_stream(index, "train", **PLAN, workers=2, epochs=50)
    next(stream)
    children()[0].kill()
    with pytest.raises(DataError, match="loader worker ended unexpectedly"):
        list(stream)


SCRIPT = """
import signal
import sys
from rkdo_dist.data.index import load_index
from rkdo_dist.data.stream import lane_stream
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started the tests behind
    plan = {"seed": 0, "all_lanes": 2, "micro_batch": 5}
    stream = lane_stream(load_index(sys.argv[1]), "train", **plan, workers=2, epochs=10**6)
    try:
        for k, batch in enumerate(stream):
            if k == 3:
                print("going", flush=True)
    except KeyboardInterrupt:
        stream.close()
        print("stopped", flush=True)
"""


@contextlib.contextmanager
def streaming(folder: Path, index: ShardIndex) -> Iterator[subprocess.Popen[str]]:
    """A process group of its own that streams with two workers."""
    script = folder / "run.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), str(index.root)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_is_answered_by_the_main_process_alone(index: ShardIndex, tmp_path: Path) -> None:
    with streaming(tmp_path, index) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=60)
    assert out == "stopped\n"
    assert err == ""
    assert process.returncode == 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_workers_do_not_outlive_a_killed_process(index: ShardIndex, tmp_path: Path) -> None:
    """Nobody tells them: what starts them is another process, which stays as long as they do."""
    with streaming(tmp_path, index) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 3  # the server and two workers
        process.kill()
        deadline = time.monotonic() + 20
        while (left := [one for one in family if _runs(one)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for one in left:
            one.kill()
        assert not left


def _runs(process: psutil.Process) -> bool:
    """Whether it still does anything; nobody may be there to take notice of its end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
