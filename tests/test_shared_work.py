"""What processes of a machine share: work that others wait for, locks (where there are any), open files."""

from __future__ import annotations

import errno
import fcntl
import logging
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rkdo_dist import lock
from rkdo_dist.data.folder import folder_index
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.shards import _once
from tests.jobs import wait_for
from tests.launching import environment
from tests.pictures import image_folder

HOLDING = """
import os, pathlib, sys
from rkdo_dist.lock import wait_for_lock
path = pathlib.Path(sys.argv[1])
wait_for_lock(os.open(path, os.O_RDWR | os.O_CREAT), path, "")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_reads_is_waited_for_with_a_voice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RKDO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lock, "VOICE", 0.1)
    monkeypatch.setattr(lock, "_SOON", 0.1)
    caplog.set_level(logging.INFO, "rkdo_dist")
    folder = image_folder(tmp_path / "f", train=4, test=2)
    digest = folder_index(folder).digest()
    (path,) = (tmp_path / "cache" / "folders").glob("*.lock")
    words = [sys.executable, "-c", HOLDING, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        said = f"waiting for process {holder.pid} on {platform.node()}, which reads {folder.absolute()} for its index"

        def end_when_said() -> None:
            wait_for(lambda: caplog.text.count(said) >= 3)
            holder.kill()

        ending = threading.Thread(target=end_when_said)
        ending.start()
        assert folder_index(folder).digest() == digest  # the dead release what they held
        ending.join()
    assert caplog.text.count(said) >= 3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_that_cannot_lock_is_said_and_the_work_is_done(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RKDO_CACHE", str(tmp_path / "cache"))
    folder = image_folder(tmp_path / "f", train=4, test=2)
    digest = folder_index(folder).digest()

    def refusing(descriptor: int, operation: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "flock", refusing)
    with pytest.warns(UserWarning, match=r"cache/folders cannot lock files .*: the work is done by each process"):
        assert folder_index(folder).digest() == digest
    with pytest.warns(UserWarning, match=r"cannot lock files .*: make sure that no second process prepares"):
        prepare("imagefolder", tmp_path / "out", folder)
    with pytest.warns(UserWarning, match="cannot lock files"), _once(tmp_path, ("a",), "a.tar") as known:
        assert not known


@pytest.mark.slow
def test_too_few_open_files_are_named_with_their_limit(small: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "rkdo_dist", *small, "data.workers=2"]
    few = ["sh", "-c", 'ulimit -n 20; exec "$@"', "sh", *words]
    done = subprocess.run(few, capture_output=True, text=True, env=environment(), timeout=240, check=False)
    assert done.returncode == 2, done.stderr
    assert "rkdo: error: too many open files: a process may have 20 here (ulimit -n)" in done.stderr
