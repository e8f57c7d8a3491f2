"""One process writes to a run directory: a second is refused at once, and a dead one is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rkdo_dist.lock import DirectoryLock, LockedError, holder
from rkdo_dist.training.step import Step
from tests.jobs import command, fingerprint, metrics, on_ranks, run_of, steps
from tests.launching import Script, environment, wait_until
from tests.runs import locked_elsewhere

LONG = ["train.epochs=20", "train.batches_per_epoch=20", "train.checkpoint_every=2"]


def test_a_second_process_is_refused_with_host_and_process_of_the_first(small: list[str]) -> None:
    run = run_of(small)
    assert command([*small, "train.max_steps=2"])[0] == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    with locked_elsewhere(run) as pid:
        for arguments in ([*small, "run.resume=auto"], ["evaluate", str(run)]):
            code, text = command(arguments)
            assert code == 2, text
            assert f"in use by process {pid} on {platform.node()}" in " ".join(text.split())
        for code, text in on_ranks(2, [*small, "run.resume=auto"], timeout=30):
            assert code == 2, text
            assert f"process {pid} on {platform.node()}" in " ".join(text.split())
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before
    assert command([*small, "run.resume=auto"])[0] == 0  # the first has ended: several ranks are one writer
    assert [code for code, _ in on_ranks(2, [*small, "run.resume=auto"], timeout=60)] == [0, 0]


def test_a_new_run_too_has_one_writer(small: list[str]) -> None:
    with locked_elsewhere(run_of(small)) as pid:
        code, text = command(small)
        assert code == 2
        assert f"process {pid}" in text
    assert sorted(p.name for p in run_of(small).iterdir()) == [".lock"]
    assert command([*small, "train.max_steps=1"])[0] == 0


def test_a_directory_that_is_moved_is_not_made_again(
    small: list[str], reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, embed = run_of(small), Step.embed
    moved = run.with_name("moved")

    def move_at_the_fourth(self: Step, lanes: Any, at: Any, keys: Any = None) -> Any:
        if at.step == 3:
            run.rename(moved)
        return embed(self, lanes, at, keys)

    monkeypatch.setattr(Step, "embed", move_at_the_fourth)
    code, text = command([*small, "train.checkpoint_every=2"])
    assert (code, run.exists()) == (2, False)
    assert "was moved or removed while it was being written to: move it back" in " ".join(text.split())
    modes = {path.stat().st_mode & 0o777 for path in (moved / "checkpoints").rglob("*") if path.is_file()}
    assert len(modes) == 1  # readable by those who can read the rest
    monkeypatch.setattr(Step, "embed", embed)
    moved.rename(run)
    assert command([*small, "train.checkpoint_every=2", "run.resume=auto"])[0] == 0
    assert metrics(run) == metrics(reference)


@pytest.mark.slow
def test_two_launches_into_one_directory_leave_the_first_as_it_would_have_been(
    small: list[str], tmp_path: Path
) -> None:
    """What broke before: the second cut the journal that the first was writing."""
    run, words = run_of(small), [sys.executable, "-m", "rkdo_dist", *small, *LONG, "run.resume=auto"]
    with Script(words, tmp_path / "first", environment()) as first:
        wait_until(lambda: steps(run) >= 5, first)
        second = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment(), check=False)
        assert second.returncode == 2, second.stderr
        assert f"in use by process {first.process.pid} on {platform.node()}" in second.stderr
        first.process.send_signal(signal.SIGTERM)
        assert first.wait() == 75
    done = len(metrics(run))
    straight = run.with_name("straight")
    assert command([*small[:-1], *LONG, f"run.dir={straight}", f"train.max_steps={done}"])[0] == 0
    assert metrics(run) == metrics(straight)
    assert fingerprint(run, done) == fingerprint(straight, done)


@pytest.mark.slow
def test_a_killed_process_blocks_nobody(small: list[str], tmp_path: Path) -> None:
    """Also while loader workers, which were forked with the lock open, are still there."""
    run, words = run_of(small), [*small, *LONG, "data.workers=2", "run.resume=auto"]
    with Script([sys.executable, "-m", "rkdo_dist", *words], tmp_path / "log", environment()) as script:
        wait_until(lambda: steps(run) >= 3, script)
        assert holder(run) == f"process {script.process.pid} on {platform.node()}"
        script.process.kill()
        script.process.wait(30)
        assert holder(run) is None
    code, text = command([*words, f"train.max_steps={len(metrics(run)) + 2}"])
    assert code == 0, text


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_cannot_lock_is_said_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(descriptor: int, operation: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "lockf", refusing)
    with pytest.warns(UserWarning, match=r"cannot lock files .*: make sure that no second process") as said:
        DirectoryLock(tmp_path).release()
    assert len(said) == 1
    assert holder(tmp_path) is None


def test_the_lock_of_a_process_that_ended_is_free(tmp_path: Path) -> None:
    with locked_elsewhere(tmp_path) as pid:
        assert holder(tmp_path) == f"process {pid} on {platform.node()}"
        with pytest.raises(LockedError, match=f"process {pid}"):
            DirectoryLock(tmp_path)
    assert holder(tmp_path) is None
    lock = DirectoryLock(tmp_path)
    lock.release()
    lock.release()
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"\.lock"):
        DirectoryLock(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
