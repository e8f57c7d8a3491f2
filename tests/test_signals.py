"""A signal asks, the loop answers at the end of a step, and all ranks answer together."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from rkdo_dist.ranks import signals
from rkdo_dist.ranks.signals import StopRequest
from tests.jobs import command, fingerprint, metrics, rank_command
from tests.ranks import Ranks


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_sets_a_code_and_nothing_else(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.code == 0
        os.kill(os.getpid(), number)
        assert stop.code == code
    assert signal.getsignal(number) is before


def test_an_echo_of_the_first_interrupt_is_not_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.code == 130
    monkeypatch.setattr(signals, "PATIENCE", -1.0)
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("rank", [0, 1])
def test_pre_emption_of_one_rank_stops_all_with_one_checkpoint(small: list[str], rank: int) -> None:
    run = Path(small[-1].removeprefix("run.dir="))
    arguments = [*small, "train.batches_per_epoch=40", "train.checkpoint_every=1000"]
    with Ranks(rank_command, 2, (arguments,), timeout=60) as ranks:
        _wait_for_steps(run, 3)
        os.kill(ranks.processes[rank].pid, signal.SIGUSR1)
        at = len(metrics(run))
        answers = ranks.answers()
    assert [answer for answer, _ in (answers[r][1] for r in range(2))] == [75, 75], answers
    done = len(metrics(run))
    assert done <= at + 2
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name != "latest"] == [str(done)]
    straight = run.with_name("straight")
    command([*arguments, f"run.dir={straight}"])
    assert command([*arguments, "run.resume=auto"])[0] == 0
    assert fingerprint(run, 40) == fingerprint(straight, 40)


def _wait_for_steps(run: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.005)
