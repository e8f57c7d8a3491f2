"""A disk that is really small, where mounting one is allowed."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A disk of `size` (as mount says it, "256k") at `place`, which is made; without the right to, the test skips."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("mounting a small disk needs more rights")
    yield place
    subprocess.run(["umount", str(place)], check=True, timeout=20)
