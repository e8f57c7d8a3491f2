"""A second Ctrl-C ends a job at once, wherever its processes are; signals of a terminal reach all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rkdo_dist.ranks import signals
from rkdo_dist.rundir import RunDirectory
from tests.conftest import ROOT
from tests.jobs import command, fingerprint, metrics, run_of, steps, wait_for
from tests.launching import environment

LONG = 2**31 - 1  # rounds of a hash: half an hour inside a library, which lets go of Python's lock


ECHO = """
import os, signal, time
from rkdo_dist.ranks import signals

def interrupted(wait):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(wait)  # the thread that counts them has its turn

with signals.StopRequest() as stop:
    interrupted(0.0)
    interrupted(0.2)
    assert stop.code == 130
signals.PATIENCE = 1.0
with signals.StopRequest():
    interrupted(1.5)
    try:
        interrupted(60)
    except KeyboardInterrupt:
        print("the second", flush=True)
    interrupted(0.2)  # the launcher's echo of the second: what ends now is not interrupted in its turn
    print("its echo", flush=True)
"""


def test_an_echo_of_the_first_interrupt_is_not_a_second() -> None:
    """In a process of its own, since an interrupt that is not expected would end the tests."""
    words = [sys.executable, "-c", ECHO]
    answer = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=120)
    assert (answer.returncode, answer.stdout) == (0, "the second\nits echo\n"), answer.stderr


STUCK = f"""
import hashlib, time
from rkdo_dist.ranks import signals
signals.PATIENCE = 0.5
with signals.StopRequest() as stop:
    stop.last_words = lambda code: (print("last words", code, flush=True), time.sleep(600))
    print("stuck", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", {LONG})
"""


def test_a_process_inside_a_library_is_ended_by_the_second_not_by_the_first() -> None:
    words = [sys.executable, "-c", STUCK]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        time.sleep(1)  # until it is inside
        process.send_signal(signal.SIGINT)
        time.sleep(signals.GRACE + 1)
        assert process.poll() is None  # a step is finished first
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "last words 130\n"  # though the last words never end
    assert process.returncode == 130


ENCODER = f"""
import hashlib, os, pathlib
import torch
from rkdo_dist.encoders import CifarResNet

class Long(CifarResNet):
    "In the fourth step, rank zero goes into a library for long; once."

    def forward(self, x):
        begun, run = pathlib.Path("begun"), pathlib.Path("run/metrics.jsonl")
        if not begun.exists() and os.environ.get("RANK", "0") == "0" and run.is_file():
            if run.read_bytes().count(b"\\n") == 3:
                begun.touch()
                hashlib.pbkdf2_hmac("sha256", b"", b"", {LONG})
        return super().forward(x)

def make():
    return Long(8)
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_two_interrupts_end_a_long_step_and_the_run_goes_on_to_the_same_bits(
    small: list[str], reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    run = run_of(small)
    assert run == tmp_path / "run"
    (tmp_path / "long.py").write_text(ENCODER)
    arguments = [*small, "encoder.backbone=long:make", "train.keep_checkpoints=9"]
    words = [sys.executable, "-m", "rkdo_dist", *arguments]
    if world > 1:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--multi_gpu"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(world)]
        words = [*launcher, "--main_process_port", "0", "-m", "rkdo_dist", *arguments]
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment(), "PYTHONPATH": path},
        cwd=tmp_path,
        start_new_session=True,
    ) as process:
        try:
            wait_for((tmp_path / "begun").exists, lambda: process.poll() is None)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
            time.sleep(signals.PATIENCE + 1)
            os.killpg(process.pid, signal.SIGINT)
            text, _ = process.communicate(timeout=120)  # all have ended that could write to it
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (130 if world == 1 else 1), text
    assert RunDirectory(run).status() == {"status": "interrupted", "step": 3, "checkpoint": 2}
    assert steps(run) == 3
    assert "run.resume=auto" in text
    assert "forcefully" not in text  # the launcher's words for SIGKILL, 30 seconds later
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert command([*arguments, "run.resume=auto"])[0] == 0
    assert metrics(run) == metrics(reference)
    assert fingerprint(run, 6) == fingerprint(reference, 6)
