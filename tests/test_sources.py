"""Sources that are no shards: folders, tars and torch data sets keep the promises that shards keep."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.data.datasets import Opener, dataset_index
from rkdo_dist.data.errors import DataError
from rkdo_dist.data.folder import folder_index
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.order import rank_lanes
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.source import open_source
from rkdo_dist.data.stream import evaluation_stream, lane_stream
from tests.conftest import SMALL
from tests.jobs import command, fingerprint, metrics
from tests.pictures import image_folder, picture, tar_of

PLAN: dict[str, Any] = {"seed": 3, "all_lanes": 4, "micro_batch": 2, "window": 16}
MODULE = '''
import numpy as np
class Numbers:
    """Twenty-four images that tell their number."""
    classes = ["even", "odd"]
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, k):
        if k == BROKEN: raise OSError("the disk has a hole")
        return np.full((6, 6, 3), k, np.uint8), k % 2
BROKEN = -1
def make(): return {"train": Numbers(24), "validation": Numbers(8)}
def alone(): return Numbers(24)
def number(): return 5
def shuffled():
    class Restless(Numbers):
        def __getitem__(self, k): return np.random.default_rng().integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Restless(24)
'''


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKDO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's module of data sets, importable here and in loader workers."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_numbers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield
    sys.modules.pop("my_numbers", None)


def _folder(tmp_path: Path) -> str:
    return str(image_folder(tmp_path / "images", train=28, test=8))


def _tar(tmp_path: Path) -> str:
    return str(tar_of(image_folder(tmp_path / "images", train=28, test=8), tmp_path / "images.tar"))


def _shards(tmp_path: Path) -> str:
    prepare("imagefolder", tmp_path / "shards", image_folder(tmp_path / "images", train=28, test=8))
    return f"shards://{tmp_path / 'shards'}"


SOURCES: dict[str, Callable[[Path], str]] = {
    "shards": _shards,
    "folder": _folder,
    "tar": _tar,
    "import path": lambda _: "my_numbers:make",
    "torchvision": lambda _: "torchvision://FakeData?root=unused",
}


def _opened(name: str, tmp_path: Path) -> ShardIndex:
    return open_source(SOURCES[name](tmp_path))


def _batches(index: ShardIndex, steps: int = 3, **options: Any) -> list[Any]:
    """What the stream delivers: per step keys, ids, labels and pixels, lanes side by side."""
    found = []
    for batch in lane_stream(index, "train", **PLAN, **options):
        lanes = batch.lanes
        found.append([(m.keys, m.ids.tolist(), m.labels.tolist(), m.images.numpy().tobytes()) for m in lanes])
        if len(found) == steps:
            break
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_workers_ranks_and_a_restart_change_nothing(name: str, tmp_path: Path, module: None) -> None:
    index = _opened(name, tmp_path)
    size = None if name != "torchvision" else 16
    whole = _batches(index, size=size)
    assert len(whole) == 3
    assert len({key for step in whole for lane in step for key in lane[0]}) == 24  # no sample twice
    if name in ("folder", "import path"):  # starting processes takes seconds; how they start is the same for all
        assert _batches(index, size=size, workers=2) == whole
    ranks = [_batches(index, size=size, lanes=rank_lanes(4, rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    assert _batches(index, steps=2, size=size, start_step=1) == whole[1:]
    again = _opened_again(name, tmp_path)
    assert again.digest() == index.digest()
    assert _batches(again, size=size) == whole


def _opened_again(name: str, tmp_path: Path) -> ShardIndex:
    places = {"shards": f"shards://{tmp_path / 'shards'}", "folder": f"{tmp_path / 'images'}"}
    places |= {"tar": f"{tmp_path / 'images.tar'}"}
    return open_source(places.get(name) or SOURCES[name](tmp_path))


@pytest.mark.parametrize("name", SOURCES)
def test_evaluation_delivers_every_sample_once(name: str, tmp_path: Path, module: None) -> None:
    index = _opened(name, tmp_path)
    split = "test" if "test" in index.splits else "train"
    count = min(20, index.split(split).samples)
    found = [m for rank in (0, 1) for _, m in evaluation_stream(index, split, 4, rank, 2, limit=20, size=8)]
    assert sorted(i for m in found for i in m.ids.tolist()) == list(range(count))


def test_a_folder_gives_what_its_prepared_shards_give(tmp_path: Path) -> None:
    """The same samples in the same order; only the keys differ, which are file names in a folder."""
    shards, folder = open_source(_shards(tmp_path)), open_source(str(tmp_path / "images"))
    assert folder.classes == shards.classes
    assert [split.counts for split in folder.splits.values()] == [split.counts for split in shards.splits.values()]
    for a, b in zip(_batches(shards), _batches(folder), strict=True):
        assert [lane[1:] for lane in a] == [lane[1:] for lane in b]
    for split in ("train", "test"):
        both = zip(evaluation_stream(shards, split, 8), evaluation_stream(folder, split, 8), strict=True)
        assert all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for (_, a), (_, b) in both)


def _saved(path: Path, mode: str, size: tuple[int, int] = (20, 14), kind: str = "PNG") -> None:
    rng = np.random.default_rng(len(path.name))
    if mode == "I;16":
        Image.fromarray(rng.integers(0, 65536, size[::-1], dtype=np.uint16)).save(path, kind)
        return
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(path, kind)


def test_a_flat_folder_of_all_kinds_of_pictures(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for number, mode in enumerate(("RGB", "L", "RGBA", "LA", "P", "1", "I;16")):
        _saved(root / f"{number}.png", mode, (20 + number, 14))
    _saved(root / "7.JPG", "CMYK", kind="JPEG")
    _saved(root / "8.webp", "RGB", (30, 5), kind="WEBP")
    (root / "deep" / "er").mkdir(parents=True)
    _saved(root / "deep" / "er" / "0.png", "RGB")
    (root / "notes.txt").write_text("not a picture")
    (root / ".hidden.png").write_bytes(b"")
    index = open_source(str(root))
    assert (index.split("train").samples, index.classes, index.image_size) == (10, (), None)
    assert "10 images without labels" in index.notes[0]
    assert "1 files are not images and are left out (notes.txt)" in index.notes[1]
    blocks = [m for _, m in evaluation_stream(index, "train", 10, size=12)]
    assert blocks[0].images.shape == (10, 3, 12, 12)
    assert blocks[0].labels.tolist() == [-1] * 10
    assert {"0.png", "7.JPG", "deep/er/0.png"} <= set(blocks[0].keys)


@pytest.mark.parametrize(
    ("files", "classes", "splits"),
    [
        (["a/1", "a/2", "b/1"], ("a", "b"), {"train": 3}),  # torchvision's ImageFolder
        (["a/x/1", "b/y/z/1"], ("a", "b"), {"train": 2}),
        (["a/1", "2"], (), {"train": 2}),  # beside a folder: no classes
        (["all/1", "all/2"], (), {"train": 2}),  # one folder around everything
        (["train/1", "test/1"], (), {"train": 1, "test": 1}),
        (["train/a/1", "val/a/1"], ("a",), {"train": 1, "test": 1}),
        (["data/train/a/1", "data/val/b/1", "data/test/a/1"], ("a", "b"), {"train": 1, "val": 1, "test": 1}),
        (["train/a/1", "unlabeled/1"], ("a",), {"train": 1, "unlabeled": 1}),
    ],
)
def test_folders_say_splits_and_classes(
    files: list[str], classes: tuple[str, ...], splits: dict[str, int], tmp_path: Path
) -> None:
    root = tmp_path / "f"
    for name in files:
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(1, kind="PNG"))
    index = open_source(str(root))
    assert index.classes == classes
    assert {name: split.samples for name, split in index.splits.items()} == splits
    bare = open_source(f"imagefolder://{root}?labels=none")
    assert bare.classes == ()
    assert {name: split.samples for name, split in bare.splits.items()} == splits


def test_unreadable_files_are_named_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "f"
    root.mkdir()
    for k in range(12):
        (root / f"{k:02d}.jpg").write_bytes(picture(k))
    (root / "03.jpg").write_bytes(b"<!doctype html><p>404")
    (root / "07.jpg").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"2 of 12 files cannot be read as images \(.*03\.jpg.*07\.jpg.*on_corrupt=skip"
    ):
        open_source(str(root))
    index = open_source(str(root), on_corrupt="skip")
    assert index.split("train").samples == 10
    assert "2 files cannot be read as images and are left out (03.jpg, 07.jpg)" in index.notes[-1]


def test_a_file_that_changes_after_its_index_was_made(tmp_path: Path) -> None:
    root = Path(_folder(tmp_path))
    index = open_source(str(root))
    victim = root / "train" / "cat" / "0000.jpg"
    content = victim.read_bytes()
    victim.write_bytes(bytes([*content[:-2], content[-2] ^ 1, content[-1]]))
    with pytest.raises(DataError, match=r"train/cat/0000\.jpg has changed since its index was made"):
        _batches(index, size=12)
    skipped = list(lane_stream(index, "train", **PLAN, on_corrupt="skip"))
    assert sum(m.skipped for batch in skipped for m in batch.lanes) in (0, 1)  # 4 of 28 are not in this epoch
    victim.unlink()
    with pytest.raises(DataError, match=r"cannot read .*0000\.jpg"):
        _batches(index, size=12)


def test_only_new_files_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(_folder(tmp_path))
    seen: list[tuple[int, int]] = []
    first = folder_index(root, progress=lambda done, total, _: seen.append((done, total)))
    assert seen[-1] == (36, 36)
    seen.clear()
    assert folder_index(root, progress=lambda done, total, _: seen.append((done, total))).digest() == first.digest()
    assert not seen
    (root / "train" / "cat" / "new.jpg").write_bytes(picture(99))
    changed = folder_index(root, progress=lambda done, total, _: seen.append((done, total)))
    assert seen[-1] == (1, 1)
    assert changed.digest() != first.digest()
    for name in (tmp_path / "cache" / "folders").glob("*.json"):
        name.write_text("{ not json")
    assert folder_index(root).digest() == changed.digest()
    monkeypatch.setenv("RKDO_CACHE", "/proc/no-cache-here")
    assert folder_index(root).digest() == changed.digest()


def test_an_item_that_cannot_be_read(module: None) -> None:
    import my_numbers  # type: ignore[import-not-found]

    index = open_source("my_numbers:alone")
    assert index.split("train").samples == 24
    assert index.classes == ("even", "odd")
    my_numbers.BROKEN = 5
    with pytest.raises(DataError, match="my_numbers:alone: item 5 of split 'train' cannot be read: OSError: the disk"):
        _batches(index)
    batches = list(lane_stream(index, "train", **PLAN, on_corrupt="skip"))
    assert sum(m.skipped for batch in batches for m in batch.lanes) == 1


def test_data_sets_from_python(tmp_path: Path) -> None:
    tensors = torch.utils.data.TensorDataset(torch.arange(32 * 27).view(32, 3, 3, 3).to(torch.uint8), torch.arange(32))
    index = dataset_index(Opener("mine", lambda: tensors), workers=False)
    assert index.split("train").samples == 32
    found = {key: m.images[k] for _, m in evaluation_stream(index, "train", 32) for k, key in enumerate(m.keys)}
    assert torch.equal(found["train-7"], tensors[7][0])
    with pytest.raises(DataError, match=r"mine cannot be sent to loader processes .*data\.workers=0"):
        dataset_index(Opener("mine", lambda: tensors))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "there is no nowhere"),
        ("imagefolder://nowhere", "there is no image folder or tar"),
        ("imagefolder://", "names nothing after ://"),
        ("imagefolder://x?label=none", "unknown option 'label'; allowed: labels"),
        ("imagefolder://x?labels=some", "labels must be folder or none, got 'some'"),
        ("torchvision://CIFAR11", "torchvision has no data set 'CIFAR11'; did you mean CIFAR1"),
        ("torchvision://CIFAR10?root=nowhere", "torchvision://CIFAR10 cannot be opened: RuntimeError: .*not found"),
        ("torchvision://CIFAR10?download=perhaps", "download must be true or false, got 'perhaps'"),
        ("no_such_module_here:make", "cannot be imported: ModuleNotFoundError"),
        ("my_numbers:nothing", "cannot be imported: AttributeError"),
        ("my_numbers:BROKEN", "is int, not a function"),
        ("my_numbers:number", "gives int for split 'train', not a data set"),
        ("my_numbers:shuffled", "differs when it is read again: take random transforms out"),
    ],
)
def test_wrong_sources_are_one_clear_line(source: str, message: str, module: None) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_source(source)
    assert "\n" not in str(caught.value)


def test_a_run_on_a_folder_from_its_first_step_to_its_end(tmp_path: Path) -> None:
    """Three steps on a folder, continued to six, are the six steps on its prepared shards."""
    shards, run = _shards(tmp_path).removeprefix("shards://"), tmp_path / "run"
    config = tmp_path / "small.yaml"
    config.write_text(SMALL)
    size = ["train.global_batch=8", "train.micro_batch=4", "train.epochs=2", "train.batches_per_epoch=3"]
    whole = ["train", str(config), *size, f"data.shards={shards}", f"run.dir={tmp_path / 'shards-run'}"]
    assert command(whole)[0] == 0
    folder = ["train", str(config), *size, f"data.source={tmp_path / 'images'}", f"run.dir={run}", "run.resume=auto"]
    code, text = command([*folder, "train.max_steps=3"])
    assert code == 0, text
    assert "36 images in 2 classes by folder (cat, dog)" in text
    assert command(folder)[0] == 0
    assert fingerprint(run, 6) == fingerprint(tmp_path / "shards-run", 6)
    assert [r["loss"] for r in metrics(run)] == [r["loss"] for r in metrics(tmp_path / "shards-run")]
    code, text = command([*whole, f"data.source={tmp_path / 'images'}"])
    assert code == 2
    assert "data.source=" in text
    assert "data.shards=" in text
    (tmp_path / "images" / "train" / "cat" / "more.jpg").write_bytes(picture(77))
    code, text = command([*folder, "train.epochs=3"])
    assert code == 2
    assert "other data" in text


def test_a_source_that_is_asked_for_takes_the_place_of_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: {shards: data/digits}")
    data = configuration.load(path, ["data.source=pictures"]).data
    assert (data.source, data.shards) == ("pictures", "")
    data = configuration.change(configuration.load(path, ["data.source=pictures"]), ["data.shards=other"]).data
    assert (data.source, data.shards) == ("", "other")
    both = configuration.load(path, ["data.source=pictures", "data.shards=other"])
    with pytest.raises(configuration.ConfigError, match=r"data\.source=pictures and data\.shards=other both say"):
        parts.require_source(both)


def test_a_folder_is_indexed_and_prepared_like_training_reads_it(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for k in range(7):
        (flat / f"{k}.jpg").write_bytes(picture(k))
    (flat / "notes.txt").write_text("not a picture")
    code, text = command(["index", str(flat)])
    assert code == 0, text
    assert "7 images without labels" in text
    code, text = command(["prepare", str(flat), "--out", str(tmp_path / "shards")])
    assert code == 0, text
    shards, folder = open_source(str(tmp_path / "shards")), open_source(str(flat))
    both = zip(evaluation_stream(shards, "train", 7), evaluation_stream(folder, "train", 7), strict=True)
    assert all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for (_, a), (_, b) in both)
    code, text = command(["index", _tar(tmp_path)])
    assert code == 0, text
    assert "36 images in 2 classes by folder (cat, dog)" in text
    assert not (tmp_path / "index.json").exists()  # a tar of folders is no shard
    code, text = command(["index", str(tmp_path / "nowhere")])
    assert (code, "there is no" in text) == (2, True)


def test_folders_without_an_image_and_half_labelled_ones(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no image .* no file at all"):
        open_source(str(tmp_path / "empty"))
    (tmp_path / "empty" / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"holds no image .*only others, such as a\.txt"):
        open_source(str(tmp_path / "empty"))
    half = image_folder(tmp_path / "half", train=4, test=2)
    (half / "train" / "loose.jpg").write_bytes(picture(3))
    with pytest.raises(DataError, match=r"train/loose\.jpg does not lie in a class folder, as other images do"):
        open_source(str(half))
    out = io.BytesIO()
    Image.new("1", (8_000, 8_000)).save(out, "PNG")
    (half / "train" / "loose.jpg").unlink()
    (half / "train" / "dog" / "bomb.png").write_bytes(out.getvalue())
    with pytest.raises(DataError, match=r"1 of 7 files .*bomb\.png claims .* pixels"):
        open_source(str(half))
