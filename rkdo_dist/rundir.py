"""The run directory: the contract between training and everything that looks at a run.

config.yaml         the resolved configuration
environment.json    versions, devices, world size, commit
metrics.jsonl       one object per step
status.json         running, complete, preempted, interrupted or failed; the steps done and the last checkpoint's
                    (and a remark, where there is reason for one)
checkpoints/        <step>/, and `latest`
evaluations/        <step>.json, with the digest of the weights evaluated
.lock               held by the process that writes here
rows/               <step>.json: a few rows of a persistent field as they were at that checkpoint
"""

from __future__ import annotations

import difflib
import errno
import json
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from rkdo_dist import checkpoint
from rkdo_dist import config as configuration
from rkdo_dist.addresses import said
from rkdo_dist.files import write_atomic
from rkdo_dist.history import History
from rkdo_dist.lock import DirectoryLock
from rkdo_dist.run_files import (
    COMMON_METRIC_TITLES,
    ENVIRONMENT,
    EVALUATION,
    EXTRA,
    ROWS,
    SCORE_TITLES,
    STATUS,
    RunError,
    read_object,
    read_steps,
)

__all__ = ["COMMON_METRIC_TITLES", "SCORE_TITLES", "RunDirectory", "RunError"]


# May grow when a run is continued, provided nothing in the run depends on the total number of steps.
_LENGTH = {"train.epochs", "train.max_steps"}
# What an interrupted copy of another run may have left before its config.yaml.
_COPIED = {"checkpoints", "metrics.jsonl"}


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: DirectoryLock | None = None
        self._saved: int | None = None  # step of the last checkpoint, for status.json
        self._remark = ""

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    def config(self, overrides: Sequence[str] = ()) -> configuration.Config:
        """The configuration of the run, with overrides.

        Raises:
            RunError: if there is no run here.
        """
        if not (self.path / "config.yaml").is_file():
            raise RunError(f"{self.path} is not a run directory: it has no config.yaml{instead_of_run(self.path)}")
        return configuration.load(self.path / "config.yaml", overrides)

    def steps(self) -> Iterator[dict[str, Any]]:
        """The records of metrics.jsonl in order; an unfinished last line is left out.

        Raises:
            RunError: naming a line that is not the record of its step.
        """
        yield from read_steps(self.metrics)

    def lock(self) -> None:
        """Make this process the only one that writes here, until `close` or until the process ends.

        Raises:
            LockedError: if another process writes here, naming its host and process.
        """
        if self._lock is None:
            self._lock = DirectoryLock(self.path)

    def require_here(self) -> None:
        """Refuse to write where the directory is no longer that which this process has locked.

        Raises:
            RunError: if it was moved, removed or replaced.
        """
        if self._lock is not None and not self._lock.is_of(self.path):
            raise RunError(
                f"run.dir={self.path} was moved or removed while it was being written to: move it back, and go on "
                "from its last checkpoint with run.resume=auto"
            )

    def close(self) -> None:
        """Release the lock, if this process has it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def claim(
        self,
        config: configuration.Config,
        source: RunDirectory | None = None,
        data: str = "",
        steps: int | None = None,
    ) -> None:
        """Lock the directory and make it ready for `config`, or refuse and leave it as it is (rank zero only).

        Args:
            config: what is to be run here.
            source: another run to continue here: its journal and newest checkpoint are copied.
            data: digest of the shards' index.
            steps: how many the run is to have.

        Raises:
            RunError: if something else is here and `config.run.resume` does not continue it, if the checkpoint to
                continue from is another run's or of a later step than its last, or if it is lost.
            LockedError: if another process writes here.
        """
        self._refuse_other_content(config, source)
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self._refuse_other_content(config, source)  # again: now nobody else changes it
        if source is not None or (self.path / "config.yaml").is_file():
            self._check_checkpoint(config, source or self, data, steps)
        if source is not None:
            self._copy_from(source)
        write_atomic(self.path / "config.yaml", configuration.to_yaml(config))

    def _refuse_other_content(self, config: configuration.Config, source: RunDirectory | None) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"run.dir={self.path} is a file: choose another run.dir")
        present = [p.name for p in self.path.iterdir() if not p.name.startswith(".")] if self.path.is_dir() else []
        if (self.path / "config.yaml").is_file():
            if config.run.resume != "auto":
                raise RunError(
                    f"run.dir={self.path} holds another run: continue it with run.resume=auto, "
                    "or choose another run.dir"
                )
            self.refuse_changes(config)
        elif present and not (source is not None and set(present) <= _COPIED):
            raise RunError(
                f"run.dir={self.path} is not empty and holds no run ({present[0]}, ...): choose another run.dir"
            )

    def _check_checkpoint(
        self, config: configuration.Config, origin: RunDirectory, data: str, asked: int | None
    ) -> None:
        """Refuse to continue from a checkpoint of another run, or from none where there was one."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", checkpoint.CheckpointWarning)  # said when it is loaded
            found = checkpoint.load_latest(origin.checkpoints)
        if found is not None:
            origin.refuse_foreign(found, config, data)
            if asked is not None and found.step > asked:
                raise RunError(
                    f"{origin.path} has done {found.step} steps, more than the {asked} that are asked for: raise "
                    "train.epochs or train.max_steps, or choose another run.dir"
                )
            steps = sum(1 for _ in islice(origin.steps(), found.step))
            if steps < found.step:
                raise RunError(
                    f"{origin.metrics} ends at step {steps}, before the checkpoint of step {found.step}: put it back, "
                    "or choose another run.dir"
                )
            self._saved = found.step
            return
        steps = sum(1 for _ in origin.steps())
        lost = origin._lost_checkpoint() if steps else None
        if lost is not None:
            raise RunError(
                f"{origin.checkpoints} holds no checkpoint, but {origin.metrics} has {steps} steps and the run had "
                f"{lost}: put the checkpoint back to continue; to start over, choose another run.dir"
            )
        if origin is not self:
            raise RunError(f"run.resume={origin.path} has no checkpoint to continue from")
        if steps:
            warnings.warn(
                f"{self.path} ended before its first checkpoint: its {steps} steps are trained again", stacklevel=3
            )

    def _lost_checkpoint(self) -> str | None:
        """Evidence that the run has once had a checkpoint, for a message; None if there is none."""
        if (self.path / "status.json").is_file():
            status = self.status()
            if "checkpoint" in status:
                return f"one of step {status['checkpoint']}"
            if status.get("status") in ("complete", "preempted") and status.get("step"):
                return f"one of step {status['step']}"
        judged = _by_step(self.evaluations)
        return f"an evaluation of one ({judged[-1].name})" if judged else None

    def check_shared(self, patience: float = 10.0) -> None:
        """Check that this process sees the run that rank zero has claimed, waiting `patience` seconds at most.

        Raises:
            RunError: if it does not.
        """
        until = time.monotonic() + patience
        while not (self.path / "config.yaml").is_file():
            if time.monotonic() > until:
                raise RunError(
                    f"run.dir={self.path} on {platform.node()} is not the directory that rank zero writes to: "
                    "all nodes must share the run directory"
                )
            time.sleep(0.2)

    def _copy_from(self, source: RunDirectory) -> None:
        """Checkpoints and journal of another run; `config.yaml` comes last and makes the copy a run."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        shutil.copytree(source.checkpoints, self.checkpoints)
        write_atomic(self.metrics, source.metrics.read_bytes())

    def refuse_changes(self, config: configuration.Config) -> None:
        """Refuse to continue this run under `config` if that would compute something else.

        Raises:
            RunError: naming the settings that differ, or if there is no run here.
        """
        listed = _differences(self.config(), config)
        if listed:
            raise RunError(
                f"{self.path} holds a run with other settings ({listed}): "
                "restore them to continue it, or choose another run.dir"
            )

    def refuse_foreign(self, found: checkpoint.Checkpoint, config: configuration.Config, data: str = "") -> None:
        """Refuse a checkpoint that was not written under `config` and from these data.

        Args:
            found: a checkpoint of this directory.
            data: digest of the shards' index; empty: not compared.

        Raises:
            RunError: naming the settings that differ.
        """
        if wrong := EXTRA(found.extra, "extra"):
            raise RunError(f"{found.path / 'state.json'} is damaged: {wrong}; put the checkpoint back")
        if "configuration" in found.extra:
            try:
                before = configuration.from_tree(found.extra["configuration"])
            except ValueError as error:
                raise RunError(
                    f"{found.path} was written under settings that cannot be read (state.json): {error}"
                ) from error
            listed = _differences(before, config)
        else:  # of the first edition: a digest tells whether they differ, not in what
            fitting = {configuration.digest_of_first_edition(c) for c in (config, self.config())}
            listed = "" if found.extra.get("settings") in fitting else "it holds a digest alone, not which"
        if listed:
            raise RunError(
                f"{found.path} was written by a run with other settings ({listed}): restore the settings, or put this "
                "run's own checkpoint back"
            )
        if data and found.extra.get("data") != data:
            raise RunError(f"{found.path} was trained on other data than data.shards now holds")

    def write_environment(self, facts: dict[str, Any]) -> None:
        """Record versions, platform and `facts` (world size, devices, digests)."""
        write_atomic(self.path / "environment.json", json.dumps({**machine(), **facts}, indent=2) + "\n")

    def write_status(self, word: str, step: int, message: str = "") -> None:
        """Record the status of the run: "running", "complete", "preempted", "interrupted" or "failed"."""
        status: dict[str, Any] = {"status": word, "step": step}
        if self._saved is not None:
            status["checkpoint"] = self._saved
        if self._remark:
            status["remark"] = self._remark
        if message:
            status["message"] = said(message)
        path, text = self.path / "status.json", json.dumps(status, indent=2) + "\n"
        try:
            write_atomic(path, text)
        except OSError as error:
            # A full disk has no room for a new file, but the old one has a block of its own.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.is_file():
                raise
            with path.open("r+b") as file:
                file.write(text.encode())
                file.truncate()

    def remark(self, text: str) -> None:
        """Something more that status.json says of the run from its next writing on."""
        if text not in self._remark:
            self._remark = "; ".join(x for x in (self._remark, text) if x)

    def saved(self, step: int) -> None:
        """Record in status.json that the checkpoint of a step is on the disk, so that its loss is noticed later."""
        self._saved = step
        self.write_status("running", step)

    def status(self) -> dict[str, Any]:
        """The status that `write_status` wrote last; "running" without a process means that rank zero was killed.

        Raises:
            RunError: if there is no run here, or the file is damaged.
        """
        path = self.path / "status.json"
        if not path.is_file():
            hint = instead_of_run(self.path)
            raise RunError(f"{self.path} is not a run directory with a status.json: has training started?{hint}")
        return read_object(path, STATUS)

    def write_evaluation(self, step: int, scores: dict[str, Any], which: str = "trained") -> Path:
        """Write `evaluations/<step>.json`, with the digest of the weights that were evaluated ("trained" or "ema")."""
        self.evaluations.mkdir(exist_ok=True)
        path = self.evaluations / f"{step}.json"
        digest = checkpoint.model_digest(self.checkpoints, step, which)
        write_atomic(path, json.dumps({**scores, "weights": digest, "weights_are": which}, indent=2) + "\n")
        return path

    def evaluation(self, step: int) -> dict[str, Any]:
        """What `evaluations/<step>.json` holds.

        Raises:
            RunError: if it is damaged.
            OSError: if it is not there.
        """
        path = self.evaluations / f"{step}.json"
        found = read_object(path, EVALUATION)
        if found["step"] != step:
            raise RunError(f"{path} is damaged: it is of step {found['step']}; put it back, or remove it")
        return found

    def evaluated(self, step: int, which: str = "trained") -> bool:
        """Whether `evaluations/<step>.json` belongs to the weights ("trained" or "ema") in this step's checkpoint."""
        try:
            found = self.evaluation(step)
        except (OSError, RunError):
            return False
        digest = checkpoint.model_digest(self.checkpoints, step, which)
        return digest is not None and found.get("weights") == digest

    def write_rows(self, snapshot: dict[str, Any]) -> Path:
        """Write `rows/<step>.json`, a snapshot of a persistent field."""
        folder = self.path / "rows"
        folder.mkdir(exist_ok=True)
        path = folder / f"{snapshot['step']}.json"
        write_atomic(path, json.dumps(snapshot) + "\n")
        return path

    def rows(self) -> list[dict[str, Any]]:
        """All snapshots of a persistent field, by step; none if the run has no such field."""
        return [read_object(path, ROWS) for path in _by_step(self.path / "rows")]

    def history(self) -> History:
        """All that the run has left, also of one that has only begun.

        Raises:
            RunError: if it is not a run directory, or a file of it is damaged.
        """
        steps = [int(path.stem) for path in _by_step(self.evaluations)]
        evaluations = {step: self.evaluation(step) for step in steps}
        return History(self.path, self.config(), list(self.steps()), evaluations, self.environment())

    def environment(self) -> dict[str, Any]:
        """What `write_environment` has recorded, empty if nothing.

        Raises:
            RunError: if the file is damaged.
        """
        file = self.path / "environment.json"
        return read_object(file, ENVIRONMENT) if file.is_file() else {}


def instead_of_run(path: Path) -> str:
    """What may have been meant by a path at which there is no run, to end a message with."""
    if path.is_file():
        try:
            directory = configuration.load(path).run.dir
        except ValueError:
            return ""
        return f"; it is a configuration: its runs go to {directory or 'runs/NAME-DATE-TIME'}"
    there = [found.parent for found in path.parent.glob("*/config.yaml")]
    below = [found.parent for found in path.glob("*/config.yaml")]
    near = difflib.get_close_matches(path.name, [found.name for found in there], n=1, cutoff=0.5)
    if below:
        return f"; there are runs in it, such as {below[0]}"
    return f"; did you mean {path.parent / near[0]}?" if near and near[0] != path.name else ""


def _by_step(folder: Path) -> list[Path]:
    """The files <step>.json of a folder; others are left alone."""
    named = (path for path in folder.glob("*.json") if path.stem.isascii() and path.stem.isdecimal())
    return sorted(named, key=lambda path: int(path.stem))


def _differences(before: configuration.Config, now: configuration.Config) -> str:
    """Settings whose change alters results: "key: value -> value, ..."; empty if none, or if only the length grows."""
    old, new = configuration.decisive(before), configuration.decisive(now)
    changed = [key for key in new if old[key] != new[key]]
    if set(changed) <= _LENGTH and not configuration.follows_length(now):
        return ""
    return ", ".join(f"{key}: {old[key]} -> {new[key]}" for key in changed)


def machine() -> dict[str, Any]:
    """Versions of what decides results, the platform, and the commit of the code if it is a checkout."""
    packages = (
        "rkdo_dist",
        "torch",
        "torchvision",
        "accelerate",
        "webdataset",
        "safetensors",
        "scikit-learn",
        "numpy",
    )
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
