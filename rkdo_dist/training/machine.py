"""What this machine has: memory, by device, and cores."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def all_bytes(device: torch.device) -> int:
    """All memory of the device; on a CPU that of the machine, with its swap space, or of the container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return int(min(psutil.virtual_memory().total + psutil.swap_memory().total, _limit_of_container()))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes(device: torch.device) -> int:
    """Memory of the device; on a CPU the memory that is available to all ranks of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return int(min(psutil.virtual_memory().available, _left_in_container()))


def _left_in_container() -> float:
    """What a container may still take by its limit (cgroup v2), infinite without one; cached files give way."""
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        files = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(files.get("inactive_file", 0))
    except (OSError, ValueError):  # not there, or "max": no limit
        return math.inf


def _limit_of_container() -> float:
    try:
        return int((_CGROUP / "memory.max").read_text())
    except (OSError, ValueError):
        return math.inf


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of `peak_bytes`; on a CPU that needs Linux, elsewhere the old peak stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held since `reset_peak`: allocated on the device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as handle:
        for line in handle:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
