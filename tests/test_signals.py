"""A signal asks, the loop answers at the end of a step, and all ranks answer together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rkdo_dist
from rkdo_dist.cli import main
from rkdo_dist.data.shards import ShardWriter
from rkdo_dist.encoders import CifarResNet
from rkdo_dist.ranks import signals
from rkdo_dist.ranks.signals import StopRequest
from tests.conftest import FORTY, ROOT
from tests.jobs import command, fingerprint, metrics, rank_command, run_of, steps, wait_for
from tests.launching import environment, free_port
from tests.ranks import Ranks


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_sets_a_code_and_nothing_else(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.code == 0
        os.kill(os.getpid(), number)
        assert stop.code == code
    assert signal.getsignal(number) is before


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


def test_a_request_ends_at_once_what_has_nothing_to_finish() -> None:
    with StopRequest() as stop:
        with pytest.raises(signals.Stopped) as raised, stop.at_once():
            signal.raise_signal(signal.SIGTERM)
        assert raised.value.code == 75
        with pytest.raises(signals.Stopped), stop.at_once():  # it is still asked for
            pass


def test_a_request_counts_around_another_that_has_ended() -> None:
    def both(stop: StopRequest) -> None:
        with stop.at_once():
            with stop.at_once():
                pass
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("nobody heard it")

    with StopRequest() as stop, pytest.raises(signals.Stopped):
        both(stop)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)])
def test_a_command_stops_with_one_line_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    words = ["prepare", "digits", "--out", str(tmp_path / "digits"), "--shard-size", "100"]
    written: list[str] = []
    add = ShardWriter.add

    def signalled(self: ShardWriter, key: str, members: dict[str, bytes]) -> None:
        written.append(key)
        if len(written) == 250:
            signal.raise_signal(number)
        add(self, key, members)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    monkeypatch.setattr(ShardWriter, "add", signalled)
    try:
        with pytest.raises(SystemExit) as ended:
            main(words)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended.value.code == code
    assert capsys.readouterr().err == f"rkdo: {'interrupted' if code == 130 else 'stopped by a signal'}\n"
    left = sorted(path.name for path in (tmp_path / "digits").iterdir())
    assert left == [".prepare.json", "train-00000.tar", "train-00001.tar"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert len(set(written)) == 1797


def test_a_request_ends_what_a_scaling_study_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, ended, launcher = tmp_path / "started", tmp_path / "ended", tmp_path / "launcher"
    launcher.write_text(f"#!/bin/sh\ntrap 'echo > {ended}; exit' TERM\necho > {started}\nwhile :; do sleep 0.1; done\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))  # in place of torchrun, which ends its ranks after SIGTERM

    def request() -> None:
        wait_for(started.exists, lambda: True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=request, daemon=True).start()
    words = ["scale", str(ROOT / "configs" / "digits-rkdo.yaml"), "--world-sizes", "2", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 75
    assert ended.exists()


def test_a_closed_terminal_stops_a_run_unless_that_was_to_be_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.code == 75
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


STUCK = """
import hashlib, signal, sys
from rkdo_dist.ranks import signals
signals.GRACE = 0.2
with signals.StopRequest() as stop, stop.at_once():
    stop.last_words = lambda code: print("last words", code, flush=True)
    print("stuck", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes inside a library that lets go of Python's lock
"""


def test_a_process_inside_a_library_is_ended_from_outside() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        time.sleep(1)  # until it is inside
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "last words 75\n"
    assert process.returncode == 75


class Slow(CifarResNet):
    """An encoder whose evaluation takes long, and says that it has begun."""

    def __init__(self, begun: Path, run: str) -> None:
        super().__init__(8)
        self.begun, self.trained = begun, Path(run) / "checkpoints" / "latest"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and self.trained.is_file() and self.trained.read_text().strip() == "6":
            self.begun.touch()
            time.sleep(0.5)
        return super().forward(x)


def _evaluated_slowly(rank: int, world: int, arguments: list[str], begun: str, where: str, port: int) -> Any:
    if world > 1:
        torch.distributed.barrier()  # the other rank may still be connecting to this one
        torch.distributed.destroy_process_group()
        os.environ["MASTER_PORT"] = str(port)

    def slow(features: Any, labels: Any) -> float:
        Path(begun).touch()
        time.sleep(600)
        return 0.0

    settings = {key: value for key, _, value in (word.partition("=") for word in arguments[2:])}
    settings = {**settings, "evaluate": {"at_end": True, "protocol": "full"}}
    run = rkdo_dist.train(
        arguments[1],
        settings=settings,
        encoder=Slow(Path(begun), settings["run.dir"]) if where == "features" else None,
        metrics={"slow": slow} if where == "scores" else None,
    )
    return run.exit_code


@pytest.mark.parametrize(("where", "rank"), [("features", 1), ("scores", 0)])
def test_a_signal_stops_an_evaluation_on_all_ranks(small: list[str], tmp_path: Path, where: str, rank: int) -> None:
    run, begun = run_of(small), tmp_path / "begun"
    with Ranks(_evaluated_slowly, 2, (small, str(begun), where, free_port()), timeout=60) as ranks:
        wait_for(begun.exists, ranks.running)
        os.kill(ranks.processes[rank].pid, signal.SIGTERM)
        answers = ranks.answers()
    assert [answers[r][1] for r in range(2)] == [75, 75], answers
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["step"]) == ("preempted", 6)
    assert (run / "checkpoints" / "latest").read_text().strip() == "6"
    assert not list((run / "evaluations").glob("*.json"))
    code, text = command([*small, "run.resume=auto", "evaluate.at_end=true"])
    if where == "scores":  # the encoder of the other is no configuration's
        assert code == 0, text
        assert (run / "evaluations" / "6.json").is_file()


def test_a_signal_before_the_first_step_ends_the_start(small: list[str], tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "slow.py").write_text(f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(600)\n")
    with subprocess.Popen(
        [sys.executable, "-m", "rkdo_dist", *small, "encoder.backbone=slow:make"],
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        cwd=tmp_path,
    ) as process:
        wait_for(begun.exists, lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "stopped by a signal before the first step" in process.stderr.read()
    assert process.returncode == 75
    assert not (run_of(small) / "status.json").exists()
