"""Runs for tests of studies: run directories made up of given numbers, and real runs in forked processes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rkdo_dist import config as configuration
from rkdo_dist.config import Config
from tests.jobs import command
from tests.ranks import _context


def made_up(
    config: Config, losses: list[float], scores: Callable[[int], Mapping[str, Any]], steps_per_epoch: int = 11
) -> None:
    """A complete run directory at `config.run.dir` whose epochs have these mean losses, judged after every epoch.

    Args:
        scores: by epoch, counted from 1.
    """
    run = Path(config.run.dir)
    (run / "evaluations").mkdir(parents=True)
    (run / "config.yaml").write_text(configuration.to_yaml(config))
    uniform, ideal = (2.1396, 0.7520) if config.field.objective == "rkdo" else (2.8472, 1.3140)
    lines = []
    for epoch, loss in enumerate(losses):
        for number in range(steps_per_epoch):
            wobble = 0.01 * (number - (steps_per_epoch - 1) / 2)  # the mean is what was asked for
            record = {"step": epoch * steps_per_epoch + number + 1, "epoch": epoch, "loss": loss + wobble}
            lines.append(json.dumps({**record, "loss_at_uniform": uniform, "loss_at_ideal": ideal}) + "\n")
        step = (epoch + 1) * steps_per_epoch
        judged = {"step": step, "protocol": config.evaluate.protocol, **scores(epoch + 1)}
        (run / "evaluations" / f"{step}.json").write_text(json.dumps(judged))
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "status.json").write_text(json.dumps({"status": "complete", "step": len(lines)}))


@contextlib.contextmanager
def locked_elsewhere(directory: Path) -> Iterator[int]:
    """While open, another process writes to the directory; its number."""
    directory.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", _LOCKING, str(directory)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield process.pid
        process.stdin.close()


_LOCKING = """
import pathlib, sys
from rkdo_dist.lock import DirectoryLock
lock = DirectoryLock(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


class Forked:
    """Stands in for `studies.runner.start`: the same run in a process forked from a server that has torch loaded."""

    def __init__(self, words: list[str], variables: Mapping[str, str], log: IO[str]) -> None:
        self._process = _context.Process(target=_run, args=(words, log.name))
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """As `subprocess.Popen.send_signal`."""
        import os

        if self._process.is_alive():
            os.kill(self._process.pid or 0, number)


def _run(words: list[str], log: str) -> None:
    code, text = command(words)
    Path(log).write_text(text)
    sys.exit(code)
