"""Locks that the operating system keeps, and releases when the process dies: a directory has one writer, and what one
process of a machine does for all (`wait_for_lock`) is done once.

A directory's is a POSIX record lock (`fcntl`) and not `flock`: it belongs to one process, so a loader worker that
outlives its rank does not keep it; and it holds between the nodes of a network file system. The file `.lock` stays;
only the lock counts, so a process that was killed blocks nobody. The content of the file is for the message.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import stat
import time
import warnings
from pathlib import Path

from rkdo_dist.diagnostics import logger
from rkdo_dist.files import read_regular

NAME = ".lock"
VOICE = 30.0  # seconds between two lines of a process that waits
_SOON = 1.0
_GLANCE = 0.2  # seconds
_LONGEST = 4096  # bytes of a note
_TAKEN = (errno.EAGAIN, errno.EACCES)
# The last where flock becomes a record lock (NFS), which a descriptor for reading cannot have.
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF)


class LockedError(ValueError):
    """Another process writes to the directory; the message names its host and process."""


class DirectoryLock:
    """Held from construction until `release`, or until this process ends in whatever way.

    A process must not lock a directory twice: closing either file releases both.

    Args:
        directory: must exist.

    Raises:
        LockedError: if another process holds the lock; at once, nothing waits.
        OSError: if the lock file cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / NAME
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.release()
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file: remove it", str(path))
        try:
            if _taken(self._descriptor):  # perhaps by a `holder` that looks just now
                time.sleep(_GLANCE)
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                self.release()
                if error.errno in _TAKEN:
                    raise LockedError(f"{directory} is in use by {_named(path)}: wait for it, or end it") from None
                raise
            _warn(error, directory, "make sure that no second process writes to this directory")
        _sign(self._descriptor)
        os.fsync(self._descriptor)  # a process on another node reads it

    def is_of(self, directory: Path) -> bool:
        """Whether it is still this directory's: it has not been moved, removed or replaced."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(directory / NAME))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def wait_for_lock(descriptor: int, path: Path, doing: str, signed: bool = True) -> None:
    """Take a lock (`flock`) that other processes hold for as long as they do the same work; closing releases it.

    The wait has no end of its own, because that work has none (to read a folder of any size); it ends when the holder
    is done or dies. A line says soon, and every `VOICE` seconds, who it is. Where the file system cannot lock, a
    warning says so, and the caller does the work too.

    Args:
        descriptor: of `path`, open for reading and writing.
        doing: what the holder does, such as "reads the folder F".
        signed: whether the file has no other content, so that the holder writes its name there.
    """
    began, line = time.monotonic(), _SOON
    while not lock_at_once(descriptor, path, "the work is done by each process"):
        waited = time.monotonic() - began
        if waited >= line:
            other = _named(path) if signed else "another process"
            logger.info("waiting for %s, which %s (%s, %.0f s now)", other, doing, path, waited)
            line = waited + VOICE
        time.sleep(min(_GLANCE, 0.01 + waited / 10))
    if signed:
        _sign(descriptor)


def lock_at_once(descriptor: int, path: Path, otherwise: str) -> bool:
    """Take a lock (`flock`), unless another process has it: then False.

    Args:
        path: of the descriptor.
        otherwise: said where the file system cannot lock, which counts as True.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _CANNOT_LOCK:
            raise
        _warn(error, path.parent, otherwise)
    return True


def _warn(error: OSError, directory: Path, otherwise: str) -> None:
    reason = os.strerror(error.errno or 0)
    warnings.warn(f"the file system of {directory} cannot lock files ({reason}): {otherwise}", stacklevel=3)


def holder(directory: Path) -> str | None:
    """The process that holds the lock of a directory, such as "process 71 on node3"; None if there is none.

    Not for the process that holds it itself: it would release its own lock.
    """
    try:
        descriptor = os.open(directory / NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _named(directory / NAME) if _taken(descriptor) else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    """Take the lock; True if another process has it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return True
    return False


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)


def _named(path: Path) -> str:
    try:
        said = read_regular(path, _LONGEST).decode("utf-8", "replace")
        return " ".join("".join(c if c.isprintable() else " " for c in said).split())[:200] or "another process"
    except OSError:
        return "another process"
