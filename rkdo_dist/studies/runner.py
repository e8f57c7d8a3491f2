"""Independent training runs in processes of their own, a few at a time, behind one progress display.

Every run is an ordinary `rkdo train` with `run.resume=auto`: finished runs are left alone, interrupted ones go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress, TaskID

from rkdo_dist import addresses
from rkdo_dist import config as configuration
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.console import progress_bar, say
from rkdo_dist.files import write_atomic
from rkdo_dist.lock import LockedError, holder
from rkdo_dist.ranks.launch import launched_ranks
from rkdo_dist.ranks.signals import StopRequest
from rkdo_dist.rundir import RunDirectory, RunError

_POLL = 0.3  # seconds between looks at the processes
# What a launcher has set for this process would make the runs believe that they are its ranks.
PRECISION = "ACCELERATE_MIXED_PRECISION"  # of every run, where it is set
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Planned:
    """A run to be made.

    Attributes:
        config: complete; `run.dir` says where and `run.resume` is "auto".
        steps: its length.
    """

    config: Config
    steps: int

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def name(self) -> str:
        return self.directory.name


def complete(planned: Planned) -> bool:
    """Whether a run has nothing left to do: its status.json says so, and it is not a shorter one of that directory."""
    run = RunDirectory(planned.directory)
    try:
        status = run.status()
        longer = status["step"] < planned.steps and run.config().train != planned.config.train  # not an early stop
    except RunError:
        return False
    return status["status"] == "complete" and not longer


@dataclass
class Outcome:
    """The outcome of each run.

    Attributes:
        failed: by name of the run, the end of what it said.
        stopped: 0, or the exit code of the request to stop that ended the work.
    """

    failed: dict[str, str] = field(default_factory=dict)
    stopped: int = 0

    def report(self, console: Console) -> int:
        """Print a line for every run that failed, and how to continue; the exit code: 0, 2 or that of the request."""
        for name, reason in self.failed.items():
            say(console, f"failed: {name}: {reason}", "red")
        if self.stopped:
            console.print("stopped: the tables hold what is complete; the same command continues")
        return self.stopped or (2 if self.failed else 0)


def run_all(runs: Sequence[Planned], processes: int, console: Console) -> Outcome:
    """Train what is not complete yet, `processes` runs at a time.

    A run that fails does not keep the others from going on. A request to stop (Ctrl-C, SIGTERM, SIGUSR1) is passed on:
    every run finishes its step and saves it.

    Raises:
        ConfigError: for fewer than one process, or when this is one of several ranks of a launcher.
        RunError: if a directory holds a run with other settings.
    """
    if processes < 1:
        raise ConfigError(f"--processes must be at least 1, got {processes}")
    if launched_ranks() > 1:
        raise ConfigError("start this as one process: it starts the runs itself (--processes N)")
    for planned in runs:
        if (planned.directory / "config.yaml").is_file():
            RunDirectory(planned.directory).refuse_changes(planned.config)
    waiting = [planned for planned in runs if not complete(planned)]
    done = len(runs) - len(waiting)
    if done:
        console.print(f"{done} of {len(runs)} runs are complete already")
    outcome = Outcome()
    with StopRequest() as stop, progress_bar(console, disable=not console.is_terminal) as bar:
        overall = bar.add_task("runs", total=len(runs), completed=done, note="")
        _Crew(waiting, processes, console, bar, outcome).work(overall, stop)
    return outcome


class _Crew:
    """The processes at work."""

    def __init__(
        self, waiting: list[Planned], processes: int, console: Console, bar: Progress, outcome: Outcome
    ) -> None:
        self.waiting, self.console, self.bar, self.outcome = list(waiting), console, bar, outcome
        self.active: dict[int, _Process | None] = dict.fromkeys(range(min(processes, len(waiting))))

    def work(self, overall: TaskID, stop: StopRequest) -> None:
        """Until nothing waits and nothing runs."""
        told = False
        try:
            while True:
                if stop.code and not told:
                    self.outcome.stopped, told = stop.code, True
                    self.waiting.clear()
                    self._signal(signal.SIGTERM)
                self._look(overall)
                if not self.waiting and not any(self.active.values()):
                    return
                time.sleep(_POLL)
        finally:  # a second Ctrl-C, or a fault of ours: nothing is left running
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        for process in self.active.values():
            if process is not None:
                process.send(number)

    def _look(self, overall: TaskID) -> None:
        for place, process in self.active.items():
            if process is not None and process.poll(self.bar):
                self.active[place] = None
                self._finish(process, overall)
            if self.active[place] is None and self.waiting:
                planned = self.waiting.pop(0)
                try:
                    self.active[place] = _Process(planned, place, self.bar)
                    self._say(f"{planned.name}: started")
                except LockedError as error:
                    self.outcome.failed[planned.name] = str(error)

    def _finish(self, process: _Process, overall: TaskID) -> None:
        self.bar.update(overall, advance=1)
        code, name = process.code, process.planned.name
        if code == 0:
            self._say(f"{name}: done")
        elif not self.outcome.stopped:
            self.outcome.failed[name] = f"exit code {code}: {process.last_words()}"
            say(self.console, f"{name}: failed (exit code {code}, {process.log})", "red")

    def _say(self, text: str) -> None:
        if not self.console.is_terminal:  # the bar shows it there
            say(self.console, text)


class _Process:
    """One run in a process of its own, which locks its directory itself; so it stays locked without this one.

    Raises:
        LockedError: if another process works on the run already.
    """

    def __init__(self, planned: Planned, place: int, bar: Progress) -> None:
        self.planned, self.bar, self.code = planned, bar, 0
        base = planned.directory
        base.parent.mkdir(parents=True, exist_ok=True)
        self.log = base.with_name(base.name + ".log")
        file = base.with_name(base.name + ".yaml")
        other = holder(base)  # before its log is overwritten
        if other is not None:
            raise LockedError(f"{other} is working on it: wait for it, or end it")
        write_atomic(file, configuration.to_yaml(planned.config))  # without secrets: they go through the environment
        variables = environment(os.environ, place, accelerators())
        variables = addresses.handed_on(variables, configuration.flatten(planned.config).values())
        with self.log.open("w", encoding="utf-8") as log:
            self.process = start(["train", str(file)], variables, log)
        self.task = bar.add_task(planned.name, total=planned.steps, note="")

    def poll(self, bar: Progress) -> bool:
        """Show how far it is; whether it has ended."""
        ended = self.process.poll() is not None
        with contextlib.suppress(OSError):
            bar.update(self.task, completed=self._steps())
        if ended:
            self.code = self.process.returncode
            bar.remove_task(self.task)
        return ended

    def _steps(self) -> int:
        """Lines of metrics.jsonl."""
        metrics = RunDirectory(self.planned.directory).metrics
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def send(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self.process.send_signal(number)

    def last_words(self) -> str:
        """The error line of the log, or its last one."""
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        errors = [number for number, line in enumerate(lines) if "error:" in line]
        return " ".join(lines[errors[-1] :] if errors else lines[-1:])


def start(words: list[str], variables: Mapping[str, str], log: IO[str]) -> subprocess.Popen[Any]:
    """`rkdo` in a process group of its own, so that Ctrl-C reaches it through us, once."""
    return subprocess.Popen(
        [sys.executable, "-m", "rkdo_dist", *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(variables),
        start_new_session=True,
    )


def environment(variables: Mapping[str, str], place: int, count: int) -> dict[str, str]:
    """A run's environment: nothing of a launcher but the precision, and with several accelerators its own one, in turn.

    Args:
        variables: this process's environment.
        place: the number of the process among those at work.
        count: accelerators of this machine.
    """
    foreign = ("ACCELERATE_", "TORCHELASTIC_")
    kept = {k: v for k, v in variables.items() if k not in _LAUNCHER and (k == PRECISION or not k.startswith(foreign))}
    if count > 1:
        visible = variables.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        kept["CUDA_VISIBLE_DEVICES"] = visible[place % len(visible)]
    return kept


def accelerators() -> int:
    """How many CUDA devices there are, without claiming one."""
    import torch

    return torch.cuda.device_count()
