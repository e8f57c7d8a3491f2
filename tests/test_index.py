"""The index: checked strictly, and nothing in it leads anywhere."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from rkdo_dist.data import index as index_module
from rkdo_dist.data.images import parse_label
from rkdo_dist.data.index import DataError, load_index, save_index
from rkdo_dist.data.order import EpochPlan, GlobalBatches
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.shards import open_shard
from tests.pictures import image_folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(format="zip"), "not a shard index"),
        (lambda t: t.update(version=2), "version 2 is not supported"),
        (lambda t: t.update(classes="ab"), '"classes" must be a list'),
        (lambda t: t.update(image_size=[8]), '"image_size" must be null or'),
        (lambda t: t.update(splits={}), "at least one split"),
        (lambda t: t["splits"].update(train=[]), "split 'train' has no shards"),
        (lambda t: t["splits"]["train"][0].update(samples=0), "split 'train' has no samples"),
        (lambda t: t["splits"]["train"][0].update(samples=True), '"samples" must be a whole number'),
        (
            lambda t: t["splits"]["train"][0].update(checks="nonsense"),
            "shard 0 of split 'train': .checks. must be base64",
        ),
        (lambda t: t["splits"]["train"][0].update(checks="AAAAAAAAAAA="), '"checks" must be base64 of eight bytes a'),
        (lambda t: t["splits"]["train"][0].update(sha256="beef"), "64 hexadecimal digits"),
        (lambda t: t["splits"]["train"].append(t["splits"]["train"][0]), "is listed twice"),
        (lambda t: t["splits"]["train"][0].update(name="../x.tar"), "leads out of the directory"),
        (lambda t: t["splits"]["train"][0].update(name="/etc/passwd"), "leads out of the directory"),
        (lambda t: t["splits"]["train"][0].update(name="pipe:touch x"), "no scheme or colon is allowed"),
        (lambda t: t["splits"]["train"][0].update(name="file:///x"), "no scheme or colon is allowed"),
        (lambda t: t["splits"]["train"][0].update(name=7), "is not a file name"),
    ],
)
def test_an_index_is_checked_strictly(tmp_path: Path, change: object, message: str) -> None:
    prepare("imagefolder", tmp_path / "out", image_folder(tmp_path / "f", train=4, test=2), shard_size=9)
    path = tmp_path / "out" / "index.json"
    tree = json.loads(path.read_text())
    change(tree)  # type: ignore[operator]
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message):
        load_index(tmp_path / "out")


def test_a_missing_or_broken_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no shard directory .*rkdo prepare"):
        load_index(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no index.json"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text('{"format": ')
    with pytest.raises(DataError, match="not valid JSON"):
        load_index(tmp_path)
    (tmp_path / "index.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="not valid JSON"):
        load_index(tmp_path)


def test_labels_are_small_numbers() -> None:
    assert parse_label(b" 7\n", 10, "x") == 7
    for text in (b"", b"-1", b"7.0", b"0x7", b"\x80\x04K\x07.", b"1" * 40, "７".encode()):
        with pytest.raises(DataError, match="x is not a class number"):
            parse_label(text, 10, "x")
    with pytest.raises(DataError, match="class 10, but the index has 10"):
        parse_label(b"10", 10, "x")


def test_a_pipe_in_place_of_an_index_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "index.json")
    with pytest.raises(DataError, match=r"index\.json: it is a pipe or a device"):
        load_index(tmp_path)


def damage(root: Path) -> str:
    """What is said of one changed byte in the middle of the second training shard."""
    file = root / "train-00001.tar"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    index = load_index(root)
    with pytest.raises(DataError, match="is damaged") as caught:
        open_shard(index, index.split("train").shards[1])
    return str(caught.value).replace(str(root), "")


def test_long_checksums_of_samples_are_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage is located as before, a reader that knows nothing of the file reads the index, and a copy has it all."""
    folder = image_folder(tmp_path / "f", train=40, test=5)
    prepare("imagefolder", tmp_path / "inline", folder, shard_size=9)
    monkeypatch.setattr(index_module, "_MAX_INLINE", 100)
    made = prepare("imagefolder", tmp_path / "apart", folder, shard_size=9)
    read = load_index(tmp_path / "apart")
    assert made.digest() == read.digest()
    assert (tmp_path / "apart" / "index.checks").stat().st_size == 8 * 45
    assert not (tmp_path / "inline" / "index.checks").exists()
    tree = json.loads((tmp_path / "apart" / "index.json").read_text())
    assert "checks" not in tree["splits"]["train"][0]
    for split in ("train", "test"):
        inline = load_index(tmp_path / "inline").split(split).shards
        assert [s.checks.read() for s in read.split(split).shards] == [s.checks for s in inline]  # type: ignore[union-attr]
    shutil.copytree(tmp_path / "apart", tmp_path / "again")
    save_index(load_index(tmp_path / "again"))
    assert (tmp_path / "again" / "index.checks").read_bytes() == (tmp_path / "apart" / "index.checks").read_bytes()
    said = damage(tmp_path / "inline")
    assert "first in sample" in said
    assert damage(tmp_path / "apart") == said
    (tmp_path / "again" / "index.checks").unlink()
    assert "first in" not in damage(tmp_path / "again")  # without the file damage is found, but not located
    tree["splits"]["train"][0]["checks_bytes"] = -1
    (tmp_path / "apart" / "index.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match='"checks_bytes" must be a whole number'):
        load_index(tmp_path / "apart")


def test_an_index_of_a_hundred_million_samples(tmp_path: Path) -> None:
    """50,000 shards; the 800 MB of checksums are not touched (here they do not even exist)."""
    entry = {"samples": 2000, "sha256": "0" * 64, "bytes": 200_000_000, "checks_bytes": 16_000}
    shards = [{"name": f"train-{k:05d}.tar", **entry} for k in range(50_000)]
    tree = {"format": "rkdo-shards", "version": 1, "classes": [], "image_size": None, "splits": {"train": shards}}
    (tmp_path / "index.json").write_text(json.dumps(tree))
    del shards, tree
    tracemalloc.start()
    index = load_index(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.split("train").samples == 100_000_000
    assert index.split("train").shards[-1].checks.offset == 49_999 * 16_000  # type: ignore[union-attr]
    assert peak < 150e6
    batches = GlobalBatches(EpochPlan(index.split("train").counts, 1, 0, 512, 64))
    assert len(np.unique(batches.ids(3050))) == 512 * 64
