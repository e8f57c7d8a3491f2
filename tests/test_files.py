"""Atomic files: old or new, never half; errors name the file and leave nothing behind."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from rkdo_dist import files


def test_writes_text_and_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_atomic(path, "grün\r\n")
    assert path.read_bytes() == "grün\r\n".encode()
    files.write_atomic(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    files.write_atomic(path, b"")
    assert path.read_bytes() == b""
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    link = tmp_path / "link"
    link.symlink_to(victim)
    files.write_atomic(link, "new")
    assert victim.read_text() == "untouched"
    assert not link.is_symlink()
    with pytest.raises(FileExistsError):
        files.write_synced(link, b"again")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_call_leaves_the_old_file_and_names_it(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pointer"
    files.write_atomic(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="pointer") as caught:
        files.write_atomic(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["pointer"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, rest: write(descriptor, rest[:3]))
    files.write_atomic(tmp_path / "a", "0123456789")
    assert (tmp_path / "a").read_text() == "0123456789"


def test_directory_without_fsync_is_tolerated_and_other_errors_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(number: int) -> None:
        def call(_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", call)

    fails(errno.EINVAL)
    files.sync_directory(tmp_path)
    fails(errno.EIO)
    with pytest.raises(OSError):
        files.sync_directory(tmp_path)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.write_atomic(tmp_path / "nowhere" / "a", "x")


def test_sha256_of_a_file_longer_than_a_piece(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
