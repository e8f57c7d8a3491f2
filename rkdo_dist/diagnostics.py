"""Diagnostics: the logger `rkdo_dist`, whose records become lines on standard error. Results go to standard output."""

from __future__ import annotations

import logging
import os
import sys

from rkdo_dist.addresses import shown

logger = logging.getLogger("rkdo_dist")
_LEVELS = {logging.WARNING: "warning: ", logging.ERROR: "error: "}


class Lines(logging.Handler):
    """Diagnostics as lines on standard error, without secrets, with the process's rank unless that is zero.

    A record's attribute `rank` (`extra={"rank": 1}`) says that it speaks for another rank.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        rank = int(getattr(record, "rank", os.environ.get("RANK", "0")))
        prefix = "rkdo" if rank == 0 else f"rkdo [rank {rank}]"
        print(f"{prefix}: {_LEVELS.get(record.levelno, '')}{shown(record.getMessage())}", file=sys.stderr, flush=True)


def show_diagnostics() -> None:
    """From now on the logger's records of level INFO and above are lines on standard error."""
    if not any(isinstance(handler, Lines) for handler in logger.handlers):
        logger.addHandler(Lines())
        logger.setLevel(logging.INFO)
