"""Saves that are killed: at every write, flush, rename and removal, and at any moment; something whole always loads."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rkdo_dist import checkpoint
from rkdo_dist.checkpoint import store
from tests.checkpoints import content, in_memory, quietly, whole, write


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with in_memory() as folder:
        yield Path(folder)


CALLS = [(os, name) for name in ("write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")]
CALLS += [(store, "save_file")]


class Countdown:
    """Wraps every call that changes the disk; kills this process by SIGKILL at the n-th instant among them.

    An instant is before each call, which is after the one before it, and when a write is half done.
    """

    def __init__(self, instants: int) -> None:
        self.left, self.passed = instants, 0
        for owner, name in CALLS:
            setattr(owner, name, self._wrapped(name, getattr(owner, name)))

    def _instant(self) -> None:
        if self.left == self.passed:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        self.passed += 1

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self._instant()
            if name in ("write", "save_file"):
                if self.left == self.passed and name == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                elif self.left == self.passed:
                    call(*arguments, **options)
                    os.truncate(arguments[1], os.stat(arguments[1]).st_size // 2)
                self._instant()
            return call(*arguments, **options)

        return wrapped


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            warnings.simplefilter("ignore")
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def first(root: Path) -> None:
    write(root, 2, keep=1)


def another_step(root: Path) -> None:
    write(root, 2, keep=1)


def same_step(root: Path) -> None:
    write(root, 1, keep=1, seed=5)


def over_remains(root: Path) -> None:
    """After two saves that were killed themselves."""
    write(root, 2, keep=1)


def remains(root: Path) -> None:
    write(root, 1)
    shutil.copytree(root / "1", root / ".2.tmp")
    shutil.copytree(root / "1", root / "1.replaced")
    (root / ".latest.aa.tmp").write_text("")


def damaged(root: Path) -> None:
    """The newest, of the step that is saved again, is damaged: the older one is the last good one."""
    write(root, 1)
    write(root, 2, seed=8)
    os.truncate(root / "2" / "model.safetensors", 50)


# name: (what is there, the save, what may be loaded after it was killed as (step, seed), None for nothing)
SCENES: dict[str, tuple[Callable[[Path], Any] | None, Callable[[Path], None], list[tuple[int, int] | None]]] = {
    "the first": (None, first, [None, (2, 0)]),
    "the next": (lambda root: write(root, 1), another_step, [(1, 0), (2, 0)]),
    "a different one of the same step": (lambda root: write(root, 1), same_step, [(1, 0), (1, 5)]),
    "over a damaged one": (damaged, another_step, [(1, 0), (2, 0)]),
    "over remains": (remains, over_remains, [(1, 0), (2, 0)]),
}


@pytest.mark.parametrize("name", SCENES)
def test_killed_at_every_instant_the_old_or_the_new_one_loads(name: str, tmp_path: Path) -> None:
    before, save, allowed = SCENES[name]
    template, root = tmp_path / "template", tmp_path / "checkpoints"
    template.mkdir()
    content(0), content(5)  # made here, so that the children need not
    if before is not None:
        before(template)
    seen = set()
    for instant in range(10_000):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)

        def killed(instant: int = instant) -> None:
            Countdown(instant)
            save(root)

        status = in_child(killed)
        assert status in (0, signal.SIGKILL), f"instant {instant}: status {status}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", checkpoint.CheckpointWarning)
            found = checkpoint.load_latest(root)
        outcome = [a for a in allowed if (found is None if a is None else whole(found, *a))]
        assert outcome, f"instant {instant}: found {found and found.path}"
        seen.add(outcome[0])
        if status == 0:
            break
        if instant % 5 == 0:  # and the next save is none the worse for it
            save(root)
            assert whole(quietly(root), *[a for a in allowed if a][-1])
            assert len([n for n in os.listdir(root) if n != "latest"]) == 1
    assert instant > 20  # the count of instants is real
    assert len(seen) == 2  # both the old and the new were found


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash of the machine keeps only what was flushed: files, then their directories, then the rename, then it."""
    write(tmp_path, 1)
    events: list[tuple[str, str]] = []

    def fsync(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    def renamed(name: str) -> Callable[[Any, Any], None]:
        real = getattr(os, name)

        def call(source: Any, target: Any) -> None:
            events.append((name, str(target)))
            real(source, target)

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renamed(name))
    write(tmp_path, 2, keep=1)
    monkeypatch.undo()

    rename = events.index(("rename", str(tmp_path / "2")))
    flushed = {path for kind, path in events[:rename] if kind == "fsync"}
    building = tmp_path / ".2.tmp"
    files = {str(building / p.relative_to(tmp_path / "2")) for p in (tmp_path / "2").rglob("*")}
    assert files | {str(building)} <= flushed
    manifest = events.index(("fsync", str(building / "manifest.json")))
    assert all(events.index(("fsync", f)) < manifest for f in files if not f.endswith("manifest.json"))
    point = events.index(("replace", str(tmp_path / "latest")))
    assert rename < events.index(("fsync", str(tmp_path)), rename) < point
    remove = events.index(("rename", str(tmp_path / ".1.removed.tmp")))
    assert point < events.index(("fsync", str(tmp_path)), point) < remove


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Moments inside the libraries too: a process that saves as fast as it can, killed 20 times."""
    generator = random.Random(1)
    content(0)
    step = 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                warnings.simplefilter("ignore")
                for s in range(step, step + 100_000):
                    write(tmp_path, s, keep=1)
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.01, 0.2))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", checkpoint.CheckpointWarning)
            found = checkpoint.load_latest(tmp_path)
        if found is None:
            assert step == 0
            continue
        assert found.step >= step
        assert whole(found, found.step)
        step = found.step
    assert step > 0
