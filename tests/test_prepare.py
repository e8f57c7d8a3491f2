"""Prepare: faithful, deterministic, restartable after a kill at any write, careful with what it is given."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rkdo_dist.data import sources
from rkdo_dist.data.images import decode
from rkdo_dist.data.index import DataError, load_index
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.shards import open_shard
from rkdo_dist.data.stream import lane_stream
from tests.pictures import cifar_tar, files_of, image_folder, picture, tar_of
from tests.ranks import PRELOAD

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload([*PRELOAD, "rkdo_dist.data.prepare"])


def contents(out: Path, split: str) -> list[tuple[str, bytes, int | None]]:
    """(key, image bytes, label) of every sample, through the verifying reader."""
    index, found = load_index(out), []
    for shard in index.split(split).shards:
        opened = open_shard(index, shard)
        for k, key in enumerate(opened.table.keys):
            label = opened.label(k)
            found.append((key, opened.image(k), None if label is None else int(label)))
        opened.close()
    return found


def test_digits_are_complete_balanced_and_in_several_shards(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    calls: list[tuple[int, int, str]] = []
    index = prepare("digits", tmp_path / "d", progress=lambda *call: calls.append(call))
    assert index.built
    assert index.image_size == (8, 8)
    assert index.classes == tuple("0123456789")
    assert len(index.split("train").shards) == 8
    train, test = contents(tmp_path / "d", "train"), contents(tmp_path / "d", "test")
    assert len(train) + len(test) == 1797
    assert abs(len(test) / 1797 - 0.2) < 0.005
    share = np.bincount([s[2] for s in test]) / np.bincount([s[2] for s in train + test])
    assert np.all(abs(share - 0.2) < 0.01)

    def bag(images: list[np.ndarray], labels: list[int]) -> list[tuple[int, bytes]]:
        return sorted((label, image.astype(np.uint8).tobytes()) for image, label in zip(images, labels, strict=True))

    raw = load_digits()
    decoded = [decode(image, key) for key, image, _ in train + test]
    assert all((d == d[:1]).all() for d in decoded)
    pixels = [np.rint(d[0] / (255 / 16)) for d in decoded]
    assert bag(pixels, [s[2] for s in train + test]) == bag(list(raw.images), list(raw.target))
    assert calls[-1][:2] == (1797, 1797)
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_samples_are_shuffled_and_bytes_are_the_originals(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "f")
    prepare("imagefolder", tmp_path / "out", folder, shard_size=8)
    index = load_index(tmp_path / "out")
    assert index.split("train").counts == (8,) * 5
    assert index.classes == ("cat", "dog")
    labels = [s[2] for s in contents(tmp_path / "out", "train")]
    assert 0 < sum(labels[:20]) < 20  # not one class after the other
    originals = sorted(((folder / "train").glob("*/*")), key=lambda p: p.read_bytes())
    got = sorted(contents(tmp_path / "out", "train"), key=lambda s: s[1])
    assert [p.read_bytes() for p in originals] == [s[1] for s in got]
    assert [p.parent.name for p in originals] == [index.classes[s[2]] for s in got if s[2] is not None]
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as archive:
        members = archive.getmembers()
    assert {m.name.split(".")[1] for m in members} == {"jpg", "png", "cls"}
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}


def test_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    import webdataset as wds

    prepare(str(image_folder(tmp_path / "f")), tmp_path / "out", shard_size=50)
    url = str(tmp_path / "out" / "train-00000.tar")
    seen = {s["__key__"]: s for s in wds.WebDataset(url, shardshuffle=False, empty_check=False)}
    assert len(seen) == 40
    for key, image, label in contents(tmp_path / "out", "train"):
        assert seen[key].get("jpg", seen[key].get("png")) == image
        assert int(seen[key]["cls"]) == label


@pytest.mark.parametrize("prefix", ["", "./", "birds/"])
def test_a_tar_gives_the_same_bytes_as_its_folder(tmp_path: Path, prefix: str) -> None:
    folder = image_folder(tmp_path / "f", train=12, test=4)
    (folder / ".hidden").write_text("left out")
    (folder / "train" / "cat" / "._0001.jpg").write_text("left out")
    prepare("imagefolder", tmp_path / "a", folder)
    prepare("imagefolder", tmp_path / "b", tar_of(folder, tmp_path / "f.tar", prefix))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_val_serves_as_test_and_unlabeled_has_no_labels(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "f", train=6, test=4)
    (folder / "test").rename(folder / "val")
    (folder / "unlabeled" / "all").mkdir(parents=True)
    (folder / "unlabeled" / "all" / "x.webp").write_bytes(picture(1, 8, 20, "WEBP"))
    (folder / "train" / "cat" / "is-a-png.jpg").write_bytes(picture(2, 9, 9, "PNG"))
    index = prepare("imagefolder", tmp_path / "out", folder)
    assert {name: s.samples for name, s in index.splits.items()} == {"train": 7, "test": 4, "unlabeled": 1}
    assert contents(tmp_path / "out", "unlabeled")[0][2] is None
    assert index.image_size is None
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as archive:
        assert sum(name.endswith(".png") for name in archive.getnames()) == 4  # named by what they are


def test_complete_output_is_left_alone_and_other_content_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "f", train=10, test=4)
    out = tmp_path / "out"
    assert prepare("imagefolder", out, folder).built
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.iterdir()}
    again = prepare("imagefolder", out, folder)
    assert not again.built
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.iterdir()}
    with pytest.raises(DataError, match="already has shards with seed 0, and 1 was asked for"):
        prepare("imagefolder", out, folder, seed=1)
    (folder / "train" / "cat" / "new.jpg").write_bytes(picture(99))
    with pytest.raises(DataError, match="already has shards with identity"):
        prepare("imagefolder", out, folder)
    assert prepare("imagefolder", out, folder, force=True).split("train").samples == 11
    (out / "train-00000.tar").write_bytes(b"short")
    with pytest.raises(DataError, match=r"train-00000\.tar is missing or its length is not the one in its index"):
        prepare("imagefolder", out, folder)
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"other files \(thesis\.tex\)"):
        prepare("imagefolder", out, folder, force=True)
    assert (out / "index.json").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not empty \(notes\.txt\)"):
        prepare("digits", other)
    with pytest.raises(DataError, match="is not a directory"):
        prepare("digits", other / "notes.txt")


def _prepare_and_die(folder: Path, out: Path, die_at: int) -> None:
    """Prepare, and be killed just before the `die_at`-th write, fsync, rename or unlink."""
    calls = 0
    for name in ("write", "fsync", "replace", "unlink"):

        def counted(*args: object, _original: object = getattr(os, name), **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return _original(*args, **kwargs)  # type: ignore[operator]

        setattr(os, name, counted)
    prepare("imagefolder", out, folder, shard_size=3)


def test_killed_at_every_write_it_completes_to_the_same_bytes(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "f", train=5, test=1)
    prepare("imagefolder", tmp_path / "expected", folder, shard_size=3)
    expected = files_of(tmp_path / "expected")
    kills = 0
    for die_at in range(1, 200):
        out = tmp_path / f"out{die_at}"
        child = FORK.Process(target=_prepare_and_die, args=(folder, out, die_at))
        child.start()
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode == 0:
            break
        kills += 1
        prepare("imagefolder", out, folder, shard_size=3)
        assert files_of(out) == expected
    assert kills > 15


def _prepare_after(started: Any, folder: Path, out: Path) -> None:
    started.set()
    prepare("imagefolder", out, folder, shard_size=5)


def test_killed_again_and_again_at_random_moments(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "f", train=120, test=20)
    begin = time.monotonic()
    prepare("imagefolder", tmp_path / "expected", folder, shard_size=5)
    usual = time.monotonic() - begin
    out, chance, kills = tmp_path / "out", random.Random(3), 0
    for _ in range(8):
        started = FORK.Event()
        child = FORK.Process(target=_prepare_after, args=(started, folder, out))
        child.start()
        assert started.wait(60)
        time.sleep(chance.uniform(0, usual / 2))
        kills += child.is_alive()
        child.kill()
        child.join(60)
    assert kills > 0
    prepare("imagefolder", out, folder, shard_size=5)
    assert files_of(out) == files_of(tmp_path / "expected")


def test_an_unfinished_preparation_of_something_else_is_not_continued(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "f", train=6, test=2)
    (folder / "train" / "dog" / "9.jpg").write_bytes(picture(5)[:200])
    with pytest.raises(DataError, match=r"9\.jpg is not a readable|9\.jpg cannot be decoded"):
        prepare("imagefolder", tmp_path / "out", folder, shard_size=2)
    assert not list((tmp_path / "out").glob("*.tmp"))
    with pytest.raises(DataError, match="unfinished preparation of another data set"):
        prepare("imagefolder", tmp_path / "out", folder, shard_size=3)
    (folder / "train" / "dog" / "9.jpg").unlink()
    prepare("imagefolder", tmp_path / "out", folder, shard_size=3, force=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/dog/x.jpg", b"", r"x\.jpg is not a readable"),
        ("train/dog/x.jpg", b"<!doctype html><p>404", r"x\.jpg is not a readable"),
        ("train/dog/x.jpg", picture(1, kind="GIF"), r"x\.jpg is not a readable"),
        ("train/x.jpg", picture(1), r"x\.jpg does not lie in a class folder"),
    ],
)
def test_what_is_not_an_image_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = image_folder(tmp_path / "f", train=4, test=2)
    (folder / name).write_bytes(content)
    for root in (folder, tar_of(folder, tmp_path / "f.tar")):
        with pytest.raises(DataError, match=message):
            prepare("imagefolder", tmp_path / f"out-{root.name}", root)


def test_bombs_are_refused_by_their_headers(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("1", (8_000, 8_000)).save(out, "PNG")  # 8 kB that would be 192 MB
    folder = image_folder(tmp_path / "f", train=4, test=2)
    (folder / "train" / "dog" / "bomb.png").write_bytes(out.getvalue())
    with pytest.raises(DataError, match=r"bomb\.png claims .* pixels"):
        prepare("imagefolder", tmp_path / "out", folder)


def test_hostile_and_broken_tars_are_refused(tmp_path: Path) -> None:
    good = tar_of(image_folder(tmp_path / "f", train=4, test=2), tmp_path / "good.tar")

    def broken(name: str, content: bytes | None = None, member: tarfile.TarInfo | None = None) -> Path:
        path = tmp_path / name
        path.write_bytes(good.read_bytes() if content is None else content)
        if member is not None:
            with tarfile.open(path, "a") as archive:
                archive.addfile(member, io.BytesIO(b"x" * member.size))
        return path

    link = tarfile.TarInfo("train/cat/x.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    climb = tarfile.TarInfo("train/cat/../../../x.jpg")
    climb.size = 1
    data = good.read_bytes()
    gz = tmp_path / "c.tar.gz"
    with tarfile.open(gz, "w:gz") as archive:
        archive.add(tmp_path / "f", ".")
    for path, message in [
        (broken("link.tar", member=link), "not an ordinary file"),
        (broken("climb.tar", member=climb), "unsafe name"),
        (broken("cut.tar", data[:3000]), "truncated|not a readable"),
        (broken("cut2.tar", data[:4096]), "truncated|not a readable"),
        (
            broken("smashed.tar", data[:3072] + b"\x55" * 512 + data[3584:]),
            "damaged|not a readable|needs images",
        ),
        (gz, "decompress it first"),
        (tmp_path / "nowhere.tar", "there is no image folder"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare("imagefolder", tmp_path / f"out-{path.name}", path)
    assert not (tmp_path / "x.jpg").exists()


def test_wrong_sources_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown source 'mnist'; choose digits, cifar10"):
        prepare("mnist", tmp_path / "out")
    (tmp_path / "images.tar").touch()
    with pytest.raises(DataError, match=r"images.tar is a file: .* `rkdo prepare .*images.tar`"):
        prepare("cifar10", tmp_path / "out", tmp_path / "images.tar")
    with pytest.raises(DataError, match="needs --root"):
        prepare("imagefolder", tmp_path / "out")
    (tmp_path / "f" / "test" / "cat").mkdir(parents=True)
    (tmp_path / "f" / "test" / "cat" / "1.jpg").write_bytes(picture(1))
    with pytest.raises(DataError, match=r"has no images in train/, only in test/"):
        prepare("imagefolder", tmp_path / "out", tmp_path / "f")
    with pytest.raises(DataError, match="shard_size must be at least 1"):
        prepare("digits", tmp_path / "out", shard_size=0)


class _Fake:
    """Looks like a torchvision data set."""

    def __init__(self, root: str, download: bool, train: bool | None = None, split: str | None = None) -> None:
        if not download:
            raise RuntimeError("Dataset not found or corrupted")
        if "offline" in root:
            raise OSError("no network")
        rng = np.random.default_rng(len(split or str(train)))
        self.classes = ["a", "b"]
        n = 9 if (train or split) else 5
        self.data = rng.integers(0, 256, (n, 3, 16, 16) if split else (n, 6, 6, 3), dtype=np.uint8)
        self.targets = [k % 2 for k in range(n)]
        self.labels = np.array([-1] * n if split == "unlabeled" else self.targets)


def test_torchvision_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    monkeypatch.setattr(datasets, "CIFAR10", _Fake)
    monkeypatch.setattr(datasets, "STL10", _Fake)
    index = prepare("cifar10", tmp_path / "c")
    assert {name: s.samples for name, s in index.splits.items()} == {"train": 9, "test": 5}
    assert index.image_size == (6, 6)
    expected = _Fake("", True, train=True).data
    got = {decode(image, key).transpose(1, 2, 0).tobytes() for key, image, _ in contents(tmp_path / "c", "train")}
    assert got == {image.tobytes() for image in expected}
    index = prepare("stl10", tmp_path / "s")
    assert set(index.splits) == {"train", "test", "unlabeled"}
    assert {s[2] for s in contents(tmp_path / "s", "unlabeled")} == {None}
    assert {s[2] for s in contents(tmp_path / "s", "train")} == {0, 1}
    with pytest.raises(DataError, match=r"cannot download cifar10 to .* --root"):
        prepare("cifar10", tmp_path / "x", tmp_path / "offline")
    assert prepare("digits", tmp_path / "x").built  # nothing is left of it that would stand in the way
    assert set(sources.DOWNLOADS) == {"cifar10", "cifar100", "stl10"}


def test_two_preparations_of_one_directory_exclude_each_other(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "f", train=4, test=2)
    messages = []

    def intrude(done: int, total: int, label: str) -> None:
        if not messages:
            with pytest.raises(DataError, match="another process is preparing") as caught:
                prepare("imagefolder", tmp_path / "out", folder)
            messages.append(str(caught.value))

    prepare("imagefolder", tmp_path / "out", folder, progress=intrude)
    assert messages


@pytest.mark.real
def test_the_whole_of_cifar10_from_its_tar(tmp_path: Path) -> None:
    tar = cifar_tar()
    index = prepare("imagefolder", tmp_path / "c", tar)
    assert {name: s.samples for name, s in index.splits.items()} == {"train": 50_000, "test": 10_000}
    assert len(index.classes) == 10
    assert index.image_size == (32, 32)
    labels = np.array([s[2] for s in contents(tmp_path / "c", "train")])
    assert np.all(np.bincount(labels) == 5000)
    assert np.all(np.bincount(labels[:5000]) > 400)
    assert not prepare("imagefolder", tmp_path / "c", tar).built
    seen: set[str] = set()
    for batch in lane_stream(index, "test", seed=1, all_lanes=4, micro_batch=64, workers=2):
        for micro in batch.lanes:
            assert micro.images.shape == (64, 3, 32, 32)
            seen.update(micro.keys)
    assert len(seen) == 10_000 // 256 * 256
    micro = next(lane_stream(index, "train", seed=1, all_lanes=1, micro_batch=1000, start_step=49)).lanes[0]
    assert np.bincount(micro.labels.numpy(), minlength=10).min() > 60
