"""A rank that dies, fails or works for long by itself, with collectives that say nothing, as NCCL's, and others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import rkdo_dist
from rkdo_dist import cli
from rkdo_dist.exchange import group
from rkdo_dist.ranks.watch import Note
from rkdo_dist.training.step import Step
from tests.jobs import metrics, run_of
from tests.launching import free_port
from tests.like_nccl import SILENT
from tests.ranks import run_ranks

BACKENDS = ["gloo", SILENT]
ABORT = 20  # seconds until a collective that lost a peer aborts the process; nothing here may take so long
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


def _training(rank: int, world: int, folder: str, arguments: list[str], fault: str) -> int:
    """Training on as many hosts as ranks, in which rank 1 meets a fault at its fourth step."""
    socket.gethostname = lambda: f"node-{rank}"
    embed = Step.embed

    def faulty(self: Step, lanes: Any, at: Any, keys: Any = None) -> Any:
        if rank == 1 and at.step == 3:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError(NO_MEMORY) if fault == "memory" else TypeError("a fault of the program's")
        return embed(self, lanes, at, keys)

    Step.embed = faulty  # type: ignore[method-assign]
    with open(f"{folder}/{rank}", "w", buffering=1) as said, contextlib.redirect_stderr(said):
        try:
            cli.main(arguments)
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("killed", "closed the connection: it has ended"),
        ("memory", "failed: out of memory: lower train.micro_batch"),
        ("program", "failed: TypeError: a fault of the program's"),
    ],
)
def test_all_others_name_the_rank_that_is_lost_and_say_why(
    small: list[str], tmp_path: Path, backend: str, fault: str, reason: str
) -> None:
    world = 4 if (backend, fault) == (SILENT, "killed") else 2
    answers = run_ranks(_training, world, str(tmp_path), small, fault, timeout=ABORT, check=False, backend=backend)
    ended = {"killed": "exit code -9", "memory": "2", "program": "TypeError"}[fault]
    assert ended in str(answers[1])
    status = json.loads((run_of(small) / "status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", 3)
    for rank in set(range(world)) - {1}:
        assert answers[rank] == 1 or answers[rank].endswith("exit code 1"), answers
        text = " ".join((tmp_path / str(rank)).read_text().split())
        assert text.count("error:") == 1
        assert "error: rank 1 on node-1 (127.0.0.1) " + reason in text
    assert status["message"].startswith("rank 1 on node-1 (127.0.0.1) " + reason)


def _unreachable(rank: int, world: int, port: int) -> tuple[str, str, str]:
    """Ranks that have met through rank 0, which then answers nothing any more, as if its cable were cut."""
    group.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    note = Note("job")
    first = int(str(group.gather_objects(os.getpid())[0]))
    if rank == 0:
        time.sleep(10 * ABORT)
    os.kill(first, signal.SIGSTOP)
    threads = Path(f"/proc/{first}/task")
    while any("\nState:\tT" not in thread.read_text() for thread in threads.glob("*/status")):
        time.sleep(0.01)  # they stop one after the other, the store's perhaps last
    said = note.read(), note.leave("lost"), note.read(1.0)
    os.kill(first, signal.SIGKILL)
    return said


def test_a_note_is_not_waited_for_where_the_store_is_silent() -> None:
    answers = run_ranks(_unreachable, 2, free_port(), timeout=ABORT, check=False)
    assert answers[1] == ("", "lost", "")


PATIENCE = 7.0  # run.timeout where ranks work for longer by themselves


def _evaluated(rank: int, world: int, arguments: list[str]) -> int:
    def slow(features: Any, labels: Any) -> float:
        time.sleep(1.5 * PATIENCE)
        return 0.5

    settings = {key: value for key, _, value in (word.partition("=") for word in arguments[2:])}
    settings |= {"evaluate.at_end": True, "run.timeout": int(PATIENCE)}
    return rkdo_dist.train(arguments[1], settings=settings, metrics={"slow": slow}).exit_code or 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_evaluation_may_outlast_the_timeout(small: list[str], reference: Path, backend: str) -> None:
    assert run_ranks(_evaluated, 2, small, timeout=PATIENCE, backend=backend) == [0, 0]
    assert json.loads((run_of(small) / "evaluations" / "6.json").read_text())["slow"] == 0.5
    assert metrics(run_of(small)) == metrics(reference)


def _busy(rank: int, world: int) -> list[Any]:
    """Ranks that are busy by themselves for different times, one of which fails."""
    group.open_control(PATIENCE)
    answers: list[Any] = []
    for fails in (False, True):

        def work(fails: bool = fails) -> int:
            time.sleep([0.0, 1.2, 0.6][rank] * PATIENCE)
            if fails and rank == 2:
                raise ValueError("no such file")
            return rank

        try:
            answers.append(group.together(work, "looking"))
        except group.RankError as error:
            answers.append(str(error))
    group.close_control()
    return answers


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_wait_for_those_that_are_busy_and_learn_their_errors(backend: str) -> None:
    error = "looking failed on 1 of 3 ranks: rank 2: no such file"
    assert run_ranks(_busy, 3, timeout=PATIENCE, backend=backend) == [[rank, error] for rank in range(3)]
