"""A stand-in for NCCL on CPUs: gloo, except that a collective never says that a peer is gone.

NCCL runs on the device. Where a peer dies or fails, nothing is raised in the main thread: it waits for ever, until the
watchdog of the group aborts the process after its timeout (SIGABRT), without a message, a status or an exit code.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

SILENT = "silent"
_OPERATIONS = [
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "gather", "scatter", "send", "recv"),
    *("allgather", "_allgather_base", "all_gather_single", "alltoall_base", "all_to_all_single"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"),
]


class _Work(dist._Work):
    """Of an operation that hangs, and then aborts the process, where gloo's would raise."""

    def __init__(self, launch: Any, timeout: float) -> None:
        super().__init__()
        self._timeout = timeout
        self._work = self._attempt(launch)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._attempt(self._work.wait)
        return True

    def _attempt(self, what: Any) -> Any:
        try:
            return what()
        except RuntimeError:
            time.sleep(self._timeout)
            os.abort()


class _Silent(dist.ProcessGroup):
    def __init__(self, store: Any, rank: int, world: int, timeout: timedelta) -> None:
        super().__init__(rank, world)
        self._gloo = dist.ProcessGroupGloo(store, rank, world, timeout)
        self._seconds = timeout.total_seconds()

    def getBackendName(self) -> str:
        return SILENT


def _operation(name: str) -> Any:
    def call(self: _Silent, *arguments: Any, **more: Any) -> _Work:
        return _Work(lambda: getattr(self._gloo, name)(*arguments, **more), self._seconds)

    return call


for _name in _OPERATIONS:
    if hasattr(dist.ProcessGroupGloo, _name):
        setattr(_Silent, _name, _operation(_name))


def register() -> None:
    """Make the backend `SILENT` known in this process."""
    dist.Backend.register_backend(SILENT, _Silent, devices=["cpu"])
