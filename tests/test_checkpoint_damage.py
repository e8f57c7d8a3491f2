"""Checkpoints: damage is noticed; errors explain and leave the last one whole."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rkdo_dist import checkpoint
from rkdo_dist.checkpoint import CheckpointError, CheckpointWarning, manifest, store
from tests.checkpoints import in_memory, quietly, whole, write
from tests.disks import small_disk


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with in_memory() as folder:
        yield Path(folder)


# --- damage -----------------------------------------------------------------------------------------------------


def damages(root: Path, older: Path, seed: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """100 ways to damage a checkpoint, over all of its files."""
    generator = random.Random(seed)
    files = sorted(p for p in root.rglob("*") if p.is_file())

    def flip(path: Path, bit: int) -> Callable[[], Any]:
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        return lambda: path.write_bytes(content)

    for i in range(60):
        path = files[i % len(files)]
        bit = generator.randrange(8 * path.stat().st_size)
        yield f"bit {bit} of {path.name}", flip(path, bit)
    for i in range(25):
        path = files[i % len(files)]
        length = generator.randrange(path.stat().st_size)
        yield f"{path.name} cut to {length}", lambda p=path, n=length: os.truncate(p, n)
    for path in files:
        yield f"no {path.name}", path.unlink
        yield f"longer {path.name}", lambda p=path: p.write_bytes(p.read_bytes() + b"\0")
        other = older / path.relative_to(root)
        yield f"another's {path.name}", lambda p=path, o=other: shutil.copy(o, p)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_100_of_100_damaged_checkpoints_are_noticed(tmp_path: Path, seed: int) -> None:
    """Another's manifest.json alone is damage too: lengths are equal, so only digests can tell."""
    template, root = tmp_path / "template", tmp_path / "checkpoints"
    write(template, 10, seed=1)
    write(template, 20)
    shutil.copytree(template, root)
    noticed = 0
    for what, damage in damages(root / "20", root / "10", seed):
        shutil.rmtree(root)
        shutil.copytree(template, root)
        damage()
        with pytest.warns(CheckpointWarning) as caught:
            found = checkpoint.load_latest(root)
        assert whole(found, 10, seed=1), what
        text = str(caught[0].message)
        assert str(root / "20") in text, what
        assert f"Using {root / '10'}" in text, what
        noticed += 1
    assert noticed == 100


@pytest.mark.parametrize(
    ("text", "step", "words"),
    [
        (b"10\n", 10, "there are newer: \\[20\\]"),
        (b"30\n", 20, "names step 30, which is not there"),
        (b"020\n", 20, "latest is damaged"),
        (b"2", 20, "latest is damaged"),
        (b"", 20, "latest is damaged"),
        (b"\xff" * 100, 20, "latest is damaged"),
        (None, 20, "latest cannot be read"),
    ],
    ids=range(7),
)
def test_a_wrong_pointer_is_said(text: bytes | None, step: int, words: str, tmp_path: Path) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    (tmp_path / "latest").unlink()
    if text is not None:
        (tmp_path / "latest").write_bytes(text)
    with pytest.warns(CheckpointWarning, match=words):
        found = checkpoint.load_latest(tmp_path)
    assert whole(found, step)


def test_when_none_is_whole_it_does_not_start_anew_silently(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    for step in (1, 2):
        os.truncate(tmp_path / str(step) / "model.safetensors", 9)
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is complete: .*/2 is damaged: model.*/1 is damaged"):
        checkpoint.load_latest(tmp_path)
    with pytest.raises(CheckpointError, match=r"incomplete: it has no manifest.json"):
        checkpoint.load(tmp_path / "3")


def forge(root: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint with a manifest that vouches for it."""
    (root / name).write_bytes(content)
    step = json.loads((root / "manifest.json").read_bytes())["step"]
    (root / "manifest.json").write_bytes(manifest.manifest_of(root, step))


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "latest"]


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_not_loaded_even_with_valid_checksums(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    root = tmp_path / "checkpoints"
    write(root, 1)
    payload = pickle.dumps(Canary(canary))
    if name in ("manifest.json", "latest"):
        (root / "1" / name if name != "latest" else root / name).write_bytes(payload)
    else:
        forge(root / "1", name, payload)
    if name == "latest":
        with pytest.warns(CheckpointWarning, match="damaged"):
            checkpoint.load_latest(root)
    else:
        with pytest.raises(CheckpointError, match=r"/1(/state.json)? (cannot be read|is damaged)"):
            checkpoint.load_latest(root)
    assert not canary.exists()
    pickle.loads(payload)  # the control: the canary does sing
    assert canary.exists()


def test_a_manifest_reaches_nothing_outside_its_directory(tmp_path: Path) -> None:
    root = tmp_path / "1"
    write(tmp_path, 1)
    honest = json.loads((root / "manifest.json").read_bytes())
    del honest["sha256"]
    for name in ("../secret", "/etc/passwd", "parts/../../secret", "parts/a/b", ".."):
        forged = {**honest, "files": {**honest["files"], name: {"bytes": 1, "sha256": "0" * 64}}}
        (root / "manifest.json").write_bytes(manifest._signed(forged))
        with pytest.raises(CheckpointError, match="not as it was written"):
            checkpoint.load(root)
    (root / "manifest.json").write_bytes(manifest._signed(honest))
    assert whole(checkpoint.load(root), 1)
    content = (root / "model.safetensors").read_bytes()
    (tmp_path / "elsewhere").write_bytes(content)
    (root / "model.safetensors").unlink()
    (root / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        checkpoint.load(root)


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "FORMAT", 2)
    write(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2; this version reads 1"):
        checkpoint.load(tmp_path / "1")


# --- a full or forbidden disk -----------------------------------------------------------------------------------

CALLS = {"write": os, "fsync": os, "rename": os, "replace": os, "mkdir": os, "save_file": store}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", CALLS)
def test_any_failing_call_is_explained_and_the_last_good_one_stays(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each occurrence of the call in a save fails in turn, until a save gets through."""
    write(tmp_path, 1, keep=1)
    real = getattr(CALLS[call], call)
    for nth in range(100):
        left = [nth]

        def failing(*arguments: Any, left: list[int] = left, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        monkeypatch.setattr(CALLS[call], call, failing)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointWarning)  # an old one that cannot be removed
                write(tmp_path, 2, keep=1)
        except CheckpointError as error:
            text = str(error)
            assert "step 2" in text
            assert str(tmp_path) in text
            assert os.strerror(number) in text
            assert {errno.ENOSPC: "free some space", errno.EACCES: "writable", errno.EIO: "check"}[number] in text
        finally:
            monkeypatch.undo()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            found = checkpoint.load_latest(tmp_path)
        assert whole(found, 1) or whole(found, 2)
        assert not [n for n in os.listdir(tmp_path) if n.startswith(".2")]
        if left[0] >= 0:
            break
    assert nth > 0
    assert whole(quietly(tmp_path), 2)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "256k") as place:
        yield place


def test_a_disk_that_is_really_full_or_read_only(disk: Path) -> None:
    write(disk, 1)
    with pytest.raises(CheckpointError, match="No space left on device; free some space"):
        checkpoint.save(disk, 2, {"w": torch.zeros(100_000)})
    assert whole(quietly(disk), 1)
    assert sorted(os.listdir(disk)) == ["1", "latest"]
    write(disk, 2)
    assert whole(quietly(disk), 2)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=20)
    with pytest.raises(CheckpointError, match="Read-only file system; choose a directory"):
        write(disk, 3)
    assert whole(quietly(disk), 2)


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        write(tmp_path / "file", 1)
    assert save_file is store.save_file
