"""The index: checked strictly, and nothing in it leads anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rkdo_dist.data.images import parse_label
from rkdo_dist.data.index import DataError, load_index
from rkdo_dist.data.prepare import prepare
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
