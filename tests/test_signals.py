"""A signal asks, the loop answers at the end of a step, and all ranks answer together."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rkdo_dist.ranks import signals
from rkdo_dist.ranks.signals import StopRequest
from tests.conftest import FORTY
from tests.jobs import command, fingerprint, metrics, rank_command, run_of, steps, wait_for
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


@pytest.mark.parametrize(
    ("world", "rank", "number", "code"),
    [(1, 0, signal.SIGINT, 130), (1, 0, signal.SIGTERM, 75), (2, 0, signal.SIGUSR1, 75), (2, 1, signal.SIGUSR1, 75)],
)
def test_a_signal_to_one_rank_stops_all_after_the_step_and_the_run_goes_on_later(
    small: list[str], straight: Path, world: int, rank: int, number: int, code: int
) -> None:
    run = run_of(small)
    arguments = [*small, *FORTY, "train.checkpoint_every=1000"]
    with Ranks(rank_command, world, (arguments,), timeout=60) as ranks:
        wait_for(lambda: steps(run) >= 3, ranks.running)
        os.kill(ranks.processes[rank].pid, number)
        at = steps(run)
        answers = ranks.answers()
    codes, texts = zip(*(answers[r][1] for r in range(world)), strict=True)
    assert list(codes) == [code] * world, texts
    assert "Traceback" not in "".join(texts)
    done = len(metrics(run))
    assert 3 <= done <= at + 2
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name != "latest"] == [str(done)]
    assert (run / "checkpoints" / "latest").read_text().strip() == str(done)
    assert command([*arguments, "run.resume=auto"])[0] == 0
    assert fingerprint(run, 40) == fingerprint(straight, 40)
    assert metrics(run) == metrics(straight)
