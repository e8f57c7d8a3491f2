"""Metrics log and progress display: metrics.jsonl, trackers, one progress bar. Rank zero only."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from rkdo_dist.console import say, training_bar
from rkdo_dist.files import write_atomic
from rkdo_dist.history import attained_share
from rkdo_dist.run_files import EVALUATION, RunError, read_object, read_steps
from rkdo_dist.training.tracking import Trackers


class Journal:
    """Appends one JSON object per step to `metrics.jsonl` and shows progress.

    Args:
        path: metrics.jsonl.
        resume_step: steps already in the run; later lines (of a run that went on after its last checkpoint) are cut.
        total_steps, epochs: length of the run, for the display.
        console: where to show progress; None keeps this rank silent and writes nothing.
        label: what is trained, for the display.
        trackers: get the same numbers as metrics.jsonl; closed with the journal.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int,
        total_steps: int,
        epochs: int,
        console: Console | None,
        label: str,
        trackers: Trackers | None = None,
    ) -> None:
        self.console = console
        self._trackers = trackers
        self._file = None
        self._plain_at = 0.0
        if console is None:
            return
        _cut(path, resume_step)
        self._path, self._file = path, path.open("ab", buffering=0)
        self._progress = training_bar(console, disable=not console.is_terminal)
        self._task = self._progress.add_task(label, total=total_steps, completed=resume_step, note="")
        self._label, self._total, self._epochs = label, total_steps, epochs
        self._began, self._first = time.monotonic(), resume_step
        self._probes: dict[str, float] = {}  # the last ones

    def __enter__(self) -> Journal:
        if self.console is not None:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console is not None:
            self._progress.stop()
        if self._file is not None:
            self.sync()
            self._file.close()
        if self._trackers is not None:
            self._trackers.close()

    def step(self, record: dict[str, Any]) -> None:
        """Write one step. `record` holds at least step, epoch, loss and pairs_per_second."""
        if self._file is None:
            return
        self._append(json.dumps(record).encode() + b"\n")
        if self._trackers is not None:
            self._trackers.log(record["step"], record, "train/")
        self._probes |= {k: v for k, v in record.items() if k.startswith("probe_") and v is not None}
        note = self._note(record)
        self._progress.update(self._task, completed=record["step"], note=note)
        self._tell_plainly(record["step"], note)

    def _note(self, record: dict[str, Any]) -> str:
        """A step in words: 0 % is the loss of an encoder that knows nothing, 100 % that of an ideal one."""
        loss = "skipped"
        if record["loss"] is not None:
            uniform, ideal = record.get("loss_at_uniform"), record.get("loss_at_ideal")
            share = None if uniform is None or ideal is None else attained_share(record["loss"], uniform, ideal)
            loss = f"loss {record['loss']:.4f}" + ("" if share is None else f" ({share:z.0%})")
        probes = [f"{name.removeprefix('probe_')} {value:.2f}" for name, value in self._probes.items()]
        speed = [] if probes else [f"{record['pairs_per_second']:.0f} pairs/s"]  # there is no room for both
        return "  ".join([f"epoch {record['epoch'] + 1}/{self._epochs}", loss, *probes, *speed])

    def _tell_plainly(self, step: int, note: str) -> None:
        """Without a terminal, an occasional line instead of the bar."""
        assert self.console is not None
        if self.console.is_terminal or (time.monotonic() - self._plain_at < 10 and step < self._total):
            return
        self._plain_at = time.monotonic()
        left = (self._plain_at - self._began) / max(1, step - self._first) * (self._total - step)
        eta = f"  ETA {datetime.timedelta(seconds=round(left))}" if step < self._total else ""
        say(self.console, f"{self._label}: step {step}/{self._total}  {note}{eta}")

    def evaluated(self, step: int, path: Path) -> None:
        """Pass the scores of an evaluation that has just been written to the trackers."""
        if self._trackers is not None:
            self._trackers.log(step, read_object(path, EVALUATION), "evaluate/")

    def _append(self, line: bytes) -> None:
        """A whole line, or none.

        Raises:
            OSError: naming the file, what it needed and what the disk has.
        """
        assert self._file is not None
        before = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            free = shutil.disk_usage(self._path.parent).free
            text = f"{error.strerror}: a line of {len(line)} bytes did not fit, {free} bytes are free; the run can be "
            raise OSError(error.errno, text + "continued with run.resume=auto", str(self._path)) from error

    def sync(self) -> None:
        """Put every line on the disk: a checkpoint must never be ahead of its journal."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def say(self, text: str) -> None:
        """One line for people."""
        if self.console is not None:
            say(self.console, text)


def _cut(path: Path, steps: int) -> None:
    """Keep exactly the records of steps 1..`steps`.

    Raises:
        ValueError: if some of them are missing, damaged or out of order.
    """
    found = sum(1 for _ in islice(read_steps(path), steps))
    if found < steps:
        raise RunError(f"{path} ends at step {found}, before the checkpoint of step {steps}")
    lines = []
    if path.exists():
        with path.open("rb") as file:
            lines = file.readlines()
        if len(lines) == steps:
            return
    write_atomic(path, b"".join(lines[:steps]))
