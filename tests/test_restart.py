"""kill -9 at any moment, restart without cleaning anything, on another number of ranks: the run is the same run."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pkgutil
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import command, fingerprint, metrics, run_of, steps, wait_for
from tests.ranks import Ranks


def settings(epochs: int, batches: int) -> list[str]:
    return [f"train.epochs={epochs}", f"train.batches_per_epoch={batches}", "train.evaluate_every=1",
            "evaluate.at_end=true"]  # fmt: skip


def completed_like_one_that_was_never_broken(arguments: list[str], epochs: int, batches: int) -> None:
    run = run_of(arguments)
    straight = run.with_name("straight")
    assert command([*arguments, f"run.dir={straight}"])[0] == 0
    code, text = command([*arguments, "run.resume=auto"])
    assert code == 0, text
    assert fingerprint(run, epochs * batches) == fingerprint(straight, epochs * batches)
    assert metrics(run) == metrics(straight)
    names = {f"{epoch * batches}.json" for epoch in range(1, epochs + 1)}
    assert {p.name for p in (run / "evaluations").iterdir()} == names
    for name in names:
        assert (run / "evaluations" / name).read_text() == (straight / "evaluations" / name).read_text()


def journal_is_sound(run: Path) -> bool:
    """Whole lines are the records 1, 2, 3, ... without gap or double."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
    return found == list(range(1, len(found) + 1))


# --- seven kills at named points ----------------------------------------------------------------------------------

# What is being done; the function that does it; at which call of it; ranks, and which of them are killed.
POINTS = [
    ("start-up", "rkdo_dist.encoders:Encoder.__init__", 1, 2, (0, 1)),
    ("a step", "torch.optim:Adam.step", 4, 1, (0,)),
    ("a restore", "rkdo_dist.checkpoint:tensors_to_optimizer", 1, 2, (0, 1)),
    ("a save, all files written", "rkdo_dist.checkpoint.store:_put_in_place", 2, 4, (0,)),
    ("an evaluation", "rkdo_dist.evaluate.evaluation:own_features", 1, 1, (0,)),
    ("a step of one rank", "torch.optim:Adam.step", 5, 4, (2,)),
    ("a step of all ranks", "torch.optim:Adam.step", 4, 2, (0, 1)),
]


def _killed_at(
    rank: int, world: int, arguments: list[str], where: str, number: int, victims: tuple[int, ...]
) -> tuple[int, str]:
    """`rkdo train` that is killed as it calls a function for the n-th time."""
    owner_name, _, name = where.rpartition("." if where.count(".", where.index(":")) else ":")
    owner: Any = pkgutil.resolve_name(owner_name)
    whole, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(whole)
    def last(*words: Any, **options: Any) -> Any:
        if rank in victims and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*words, **options)

    setattr(owner, name, last)
    return command(arguments)


def test_seven_kills_at_named_points_change_nothing(small: list[str]) -> None:
    arguments = [*small, *settings(4, 6)]
    run = run_of(small)
    for what, where, number, world, victims in POINTS:
        words = [*arguments, "run.resume=auto", "run.timeout=20"]
        with Ranks(_killed_at, world, (words, where, number, victims), timeout=60) as ranks:
            answers = ranks.answers()  # the survivors end by themselves
            for victim in victims:
                ranks.processes[victim].join(30)
                assert ranks.processes[victim].exitcode == -signal.SIGKILL, (what, answers)
        assert all(answers[r][1][0] not in (0, None) for r in set(range(world)) - set(victims)), (what, answers)
        assert journal_is_sound(run), what
    assert 12 <= steps(run) < 24
    completed_like_one_that_was_never_broken(arguments, 4, 6)


# --- 53 at random, with the seven 60 ------------------------------------------------------------------------------

KILLS, WORLDS, EPOCHS = 53, (2, 4, 1, 2), 18


@pytest.mark.nightly
def test_53_kills_at_random_change_nothing(small: list[str]) -> None:
    arguments = [*small, *settings(EPOCHS, 12)]
    run = run_of(small)
    dice, kills, attempts, killed_at = random.Random(7), 0, 0, []
    while kills < KILLS:
        attempts += 1
        world = WORLDS[attempts % len(WORLDS)]
        folder = run.with_name(f"attempt-{attempts}")
        folder.mkdir()
        words = [*arguments, "run.resume=auto", "run.timeout=20"]
        with Ranks(_seen, world, (words, str(folder)), timeout=60) as ranks:
            _wait_for_a_moment(run, dice, ranks, folder)
            if not ranks.running():
                break  # the run is complete
            killed_at.append(steps(run))
            ranks.kill(range(world) if dice.random() < 0.5 else [dice.randrange(world)])
            ranks.answers()  # the survivors end by themselves
            kills += 1
        assert journal_is_sound(run)
    assert kills == KILLS, killed_at
    completed_like_one_that_was_never_broken(arguments, EPOCHS, 12)


def _seen(rank: int, world: int, arguments: list[str], folder: str) -> tuple[int, str]:
    """`rkdo train` that says when this rank is in the group: before, others would wait for one that never came."""
    Path(folder, str(rank)).touch()
    return command(arguments)


def _wait_for_a_moment(run: Path, dice: random.Random, ranks: Ranks, folder: Path) -> None:
    """Start-up, a save, a step, or any time: chosen by the dice."""
    wait_for(lambda: len(list(folder.iterdir())) == len(ranks.processes), ranks.running)
    kind, goal = dice.choice(["start-up", "save", "step", "any"]), steps(run) + dice.randint(1, 4)
    if kind == "start-up":
        time.sleep(dice.uniform(0.02, 0.5))
        return
    deadline = time.monotonic() + (dice.uniform(0.5, 2.5) if kind == "any" else 20)
    while time.monotonic() < deadline and ranks.running():
        if kind == "save" and any(p.name.startswith(".") for p in (run / "checkpoints").glob("*")):
            return
        if kind == "step" and steps(run) >= goal:
            return
        time.sleep(0.002)
