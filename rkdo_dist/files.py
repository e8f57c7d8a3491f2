"""Atomic file writes: beside the target, flushed to the disk, then renamed over it.

Standard library only. `write_atomic` is for one small file (a pointer, a configuration, an index);
`checkpoint/` builds whole directories from the other functions here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from pathlib import Path

TEMPORARY = ".tmp"  # ends the name of everything that is not complete yet
_CHUNK = 1 << 20


def at_home(text: str) -> str:
    """A path, or a source of a kind that has one, with the home directory in place of a leading ~ (./~ is a name)."""
    kind, separator, path = text.rpartition("://")
    return f"{kind}{separator}{os.path.expanduser(path)}" if kind in ("", "shards", "imagefolder") else text


def write_atomic(path: str | os.PathLike[str], content: str | bytes | memoryview) -> None:
    """Replace `path` by `content`: a reader, or a crash at any instant, finds the old or the new file, whole.

    The content goes to a hidden temporary file in the same directory, is flushed to the disk and renamed over
    `path`; then the directory is flushed, so that the new name survives a power cut too. Text is written as
    UTF-8 with the line ends it has.

    Args:
        path: the file; its directory must exist. A symbolic link there is replaced, not followed.
        content: the whole new content.

    Raises:
        OSError: whatever the file system answers (no space, no permission, no such directory), with `path` as
            its file name. The old file is untouched then and the temporary file is removed.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        try:
            write_synced(temporary, content.encode() if isinstance(content, str) else content)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error


def read_regular(path: str | os.PathLike[str], limit: int = 64 << 20) -> bytes:
    """The content of a regular file: a pipe or a device, which may never end, is not waited for.

    Raises:
        OSError: from the file system; for anything that is no regular file, or has more than `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
        content = bytearray()  # grown by pieces: at once, the library makes room for the limit
        while len(content) <= limit and (piece := file.read(_CHUNK)):
            content += piece
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return bytes(content)


def write_synced(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Create the file `path` with `content` and flush it to the disk. Not atomic: for names nobody reads yet.

    Raises:
        OSError: from the file system; FileExistsError if `path` exists (a symbolic link is never followed).
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(content).cast("B")
        while rest:
            rest = rest[os.write(descriptor, rest[: 16 * _CHUNK]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: str | os.PathLike[str]) -> None:
    """Flush a file that another library has written to the disk.

    Raises:
        OSError: from the file system.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Flush the names in a directory to the disk (a file's own fsync does not flush its name).

    A file system that cannot do this for directories is left alone: nothing better exists there.

    Raises:
        OSError: any other error of the file system.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes as 64 hexadecimal digits, read in pieces of 1 MiB.

    Raises:
        OSError: if the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()
