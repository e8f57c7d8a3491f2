"""kill -9 at any moment, restart without cleaning anything, on another number of ranks: the run is the same run."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from tests.jobs import command, fingerprint, metrics, rank_command
from tests.ranks import Ranks

STEPS, KILLS, WORLDS = 48, 20, (2, 4, 1, 2)


@pytest.mark.slow
def test_twenty_kills_change_nothing(small: list[str]) -> None:
    settings = ["train.epochs=4", "train.batches_per_epoch=12", "train.evaluate_every=1", "evaluate.at_end=true"]
    arguments = [*small, *settings]
    run = Path(small[-1].removeprefix("run.dir="))
    straight = run.with_name("straight")
    assert command([*arguments, f"run.dir={straight}"])[0] == 0

    dice, kills, attempts, killed_at = random.Random(7), 0, 0, []
    while kills < KILLS:
        attempts += 1
        world = WORLDS[attempts % len(WORLDS)]
        with Ranks(rank_command, world, ([*arguments, "run.resume=auto", "run.timeout=20"],), timeout=60) as ranks:
            _wait_for_a_moment(run, dice, ranks)
            if not ranks.running():
                break  # the run is complete
            killed_at.append(_steps(run))
            ranks.kill(range(world) if dice.random() < 0.5 else [dice.randrange(world)])
            ranks.answers()  # the survivors end by themselves
            kills += 1
        assert _journal_is_sound(run)
    assert kills >= 10, killed_at
    code, text = command([*arguments, "run.resume=auto"])
    assert code == 0, text
    assert fingerprint(run, STEPS) == fingerprint(straight, STEPS)
    assert metrics(run) == metrics(straight)
    assert sorted(p.name for p in (run / "evaluations").iterdir()) == ["12.json", "24.json", "36.json", "48.json"]
    for name in ("12.json", "24.json", "36.json", "48.json"):
        assert (run / "evaluations" / name).read_text() == (straight / "evaluations" / name).read_text()


def _wait_for_a_moment(run: Path, dice: random.Random, ranks: Ranks) -> None:
    """Start-up, a save, a step, or any time: chosen by the dice."""
    kind, goal = dice.choice(["start-up", "save", "step", "any"]), _steps(run) + dice.randint(1, 4)
    if kind == "start-up":
        time.sleep(dice.uniform(0.02, 0.5))
        return
    deadline = time.monotonic() + (dice.uniform(0.5, 2.5) if kind == "any" else 20)
    while time.monotonic() < deadline and ranks.running():
        if kind == "save" and any(p.name.startswith(".") for p in (run / "checkpoints").glob("*")):
            return
        if kind == "step" and _steps(run) >= goal:
            return
        time.sleep(0.002)


def _steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _journal_is_sound(run: Path) -> bool:
    """Whole lines are the records 1, 2, 3, ... without gap or double."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
    return steps == list(range(1, len(steps) + 1))
