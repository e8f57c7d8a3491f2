"""Shards that somebody else wrote: indexed without a change, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkdo_dist.data.foreign import index_shards
from rkdo_dist.data.index import DataError, load_index
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.source import open_source
from rkdo_dist.data.stream import lane_stream
from tests.pictures import picture, shard_of


def foreign(root: Path) -> Path:
    """Shards as somebody else might have them: no index, folders, odd members, two splits by name."""
    (root / "a").mkdir(parents=True)
    for name, first in (("a/my-train-0.tar", 0), ("a/my-train-1.tar", 8), ("my-val-0.tar", 16)):
        members = []
        for k in range(first, first + 8):
            members += [
                (f"x/{k:03d}.JPG", picture(k)),
                (f"x/{k:03d}.cls", b"%d\n" % (k % 3)),
                (f"x/{k:03d}.pyd", b"\x80\x04."),
            ]
        (root / name).write_bytes(shard_of(members))
    return root


def test_anybodys_shards_can_be_indexed(tmp_path: Path) -> None:
    root = foreign(tmp_path / "w")
    before = {p: p.read_bytes() for p in root.rglob("*.tar")}
    calls: list[tuple[int, int, str]] = []
    index = index_shards(root, progress=lambda *call: calls.append(call))
    assert before == {p: p.read_bytes() for p in root.rglob("*.tar")}
    one = str(root / "my-val-0.tar")
    for wrong in (
        lambda: open_source(one),
        lambda: open_source(f"imagefolder://{one}"),
        lambda: prepare(one, root / "p"),
    ):
        with pytest.raises(DataError, match=r"my-val-0.tar is a WebDataset shard.* `rkdo index "):
            wrong()
    assert not open_source(f"imagefolder://{one}?labels=none").classes
    assert {name: s.samples for name, s in index.splits.items()} == {"train": 16, "test": 8}
    assert index.classes == ("0", "1", "2")
    assert index.image_size == (12, 12)
    assert calls[-1] == (3, 3, "index.json")
    loaded = load_index(root)
    assert loaded == index
    labels = {k: v for b in lane_stream(loaded, "train", seed=0, all_lanes=2, micro_batch=4)
              for m in b.lanes for k, v in zip(m.keys, m.labels.tolist(), strict=True)}  # fmt: skip
    assert labels == {f"x/{k:03d}": k % 3 for k in range(16)}
    named = index_shards(root, splits={"train": ["my-val-0.tar"]}, classes=["a", "b", "c"])
    assert named.split("train").samples == 8
    with pytest.raises(DataError, match="says class 2, but the index has 2 classes"):
        index_shards(root, classes=["a", "b"])


def test_one_wrong_label_does_not_make_a_billion_classes(tmp_path: Path) -> None:
    members = [("a.jpg", picture(1)), ("a.cls", b"999999999")]
    (tmp_path / "train.tar").write_bytes(shard_of(members))
    with pytest.raises(DataError, match=r"train.tar.*a.* says class 999999999; more than 1000000 classes are refused"):
        index_shards(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (shard_of([("a.cls", b"0")]), "needs exactly one image"),
        (shard_of([("a.jpg", b"no")]), "not a readable"),
        (shard_of([("a.jpg", picture(1))])[:1500], "truncated|cut off|not a readable"),
        (b"", "not a readable|truncated"),
    ],
)
def test_unusable_shards_are_not_indexed(tmp_path: Path, content: bytes, message: str) -> None:
    root = foreign(tmp_path / "w")
    (root / "a" / "my-train-1.tar").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        index_shards(root)
    assert "my-train-1.tar" in str(caught.value)
    assert not (root / "index.json").exists()
    with pytest.raises(DataError, match=r"no \*\.tar files"):
        index_shards(tmp_path / "w" / "b" if (tmp_path / "w" / "b").mkdir() is None else "")
