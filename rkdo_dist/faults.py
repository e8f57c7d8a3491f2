"""Errors that are no mistake of the user's: a fault of this project, too little memory, too few files."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
import tempfile
import traceback
from types import TracebackType

from rkdo_dist.addresses import said

OUT_OF_MEMORY = (
    "out of memory: lower train.micro_batch (auto takes the largest that fits), set train.recompute=true, or take a "
    "smaller encoder; `rkdo doctor CONFIG` estimates what a run needs"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether Python or one of torch's allocators (CPU, GPU) had no memory left."""
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(x in str(error) for x in words))


def shortage(error: BaseException) -> str:
    """What there was too little of, memory or files that may be open, and what to do; empty for another error."""
    if out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, OSError | RuntimeError) and os.strerror(errno.EMFILE).lower() in str(error).lower():
        most, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"too many open files: a process may have {most} here (ulimit -n). Raise it with ulimit -n "
            f"{min(4096, highest) if highest > 0 else 4096}, or take fewer loader processes (data.workers)"
        )
    return ""


def fault(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """A `sys.excepthook`: one line, and the traceback in a file, without secrets, which messages may quote.

    With RKDO_TRACEBACK, or where no file can be written, the traceback itself.
    """
    text = said("".join(traceback.format_exception(kind, error, where)))
    if not os.environ.get("RKDO_TRACEBACK") and not issubclass(kind, KeyboardInterrupt):
        with contextlib.suppress(OSError):
            handle, path = tempfile.mkstemp(prefix="rkdo-fault-", suffix=".txt")
            with open(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            line = " ".join(said(f"{kind.__name__}: {error}").split())[:300]
            text = f"rkdo: this is a fault of rkdo, please report it: {line}; the traceback is in {path}\n"
    print(text, end="", file=sys.stderr, flush=True)
