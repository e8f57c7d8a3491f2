"""What a launcher has set in the environment of a process, checked before anything relies on it."""

from __future__ import annotations

import os

from rkdo_dist.printable import shortened


class LaunchError(ValueError):
    """The launch and the configuration contradict each other; the message says what to change."""


def launched_ranks() -> int:
    """The number of processes that the launcher has started (`WORLD_SIZE`), 1 without one.

    Raises:
        LaunchError: naming the first variable that is no number, beyond its range, or empty.
    """
    world = _number("WORLD_SIZE", 1, 1, 1 << 20)
    here = _number("LOCAL_WORLD_SIZE", world, 1, world, "WORLD_SIZE")
    _number("RANK", 0, 0, world - 1, "WORLD_SIZE - 1")
    _number("LOCAL_RANK", 0, -1, here - 1, "LOCAL_WORLD_SIZE - 1")  # -1: customary for "not launched"
    _number("MASTER_PORT", 0, 0, 65535)
    if not os.environ.get("MASTER_ADDR", "first").strip():
        raise LaunchError("MASTER_ADDR is empty: set it to the name or address of the first machine, or unset it")
    return world


def _number(name: str, default: int, least: int, most: int, of: str = "") -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        known = f" ({of})" if of else ""
        raise LaunchError(
            f"the environment's {name} must be a whole number from {max(0, least)} to {most}{known}, "
            f"got {shortened(text)!r}: launchers set it; without one, unset {name}"
        )
    return number
