"""Whole jobs for tests: the command line in this process, in forked ranks, or through a real launcher."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rkdo_dist import cli
from tests.ranks import Ranks, run_ranks

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "pairs_per_second")


def command(arguments: list[str]) -> tuple[int, str]:
    """Run `rkdo` in this process; its exit code and everything it printed."""
    text = io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            cli.main(arguments)
        except SystemExit as end:
            code = end.code
    return code, text.getvalue()


def run_of(arguments: list[str]) -> Path:
    """The run directory that a command line names; the last word counts."""
    return Path(next(a for a in reversed(arguments) if a.startswith("run.dir=")).removeprefix("run.dir="))


def rank_command(rank: int, world: int, arguments: list[str]) -> tuple[int, str]:
    """`command` on one of several ranks."""
    return command(arguments)


def on_ranks(world: int, arguments: list[str], timeout: float = 120) -> list[tuple[int, str]]:
    """Run `rkdo` on forked ranks of one gloo group."""
    return run_ranks(rank_command, world, arguments, timeout=timeout)


def kill_and_resume(arguments: list[str], goals: Sequence[tuple[int, int]]) -> None:
    """Start a run, resumed each time, on as many ranks as each goal says, and kill all ranks after its step."""
    words = [*arguments, "run.resume=auto", "run.timeout=20"]
    for world, goal in goals:
        with Ranks(rank_command, world, (words,), timeout=60) as ranks:
            wait_for(lambda goal=goal: steps(run_of(arguments)) >= goal, ranks.running)  # type: ignore[misc]
            ranks.kill(range(world))
            ranks.answers()


def launch(ranks: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`accelerate launch -m rkdo_dist ...` on several ranks, as a user would."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--multi_gpu", "--num_processes", str(ranks), "--main_process_port", "0"]
    words += ["-m", "rkdo_dist", *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)


def fingerprint(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of every tensor file of a checkpoint."""
    files = sorted((run / "checkpoints" / str(step)).glob("*.safetensors"))
    assert files, f"no checkpoint {step} in {run}"
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def steps(run: Path) -> int:
    """Whole lines of the journal."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(what: Callable[[], bool], alive: Callable[[], bool] = lambda: True, timeout: float = 120) -> None:
    """Wait for something that other processes bring about; fail if they end before."""
    deadline = time.monotonic() + timeout
    while not what():
        assert alive() or what(), "ended too early"
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.003)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The journal without times, which no two runs share."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]
