"""Trackers beside metrics.jsonl, and a console on which every warning is one line, with its rank."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest

from rkdo_dist.ranks import messages
from rkdo_dist.training import tracking
from tests.jobs import command, metrics, on_ranks, rank_command, run_of
from tests.ranks import run_ranks

pytest.importorskip("tensorboard")


def points(run: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run / "tensorboard"))
    shown.Reload()
    return [(event.step, event.value) for event in shown.Scalars(tag)]


def test_tensorboard_holds_the_numbers_of_the_journal(small: list[str]) -> None:
    arguments = [*small, "run.trackers=[tensorboard]", "evaluate.at_end=true"]
    answers = on_ranks(2, arguments)
    assert [code for code, _ in answers] == [0, 0], answers
    run = run_of(small)
    for key in ("loss", "kl_1", "learning_rate", "temperature"):
        expected = [(record["step"], record[key]) for record in metrics(run)]
        assert points(run, f"train/{key}") == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    scores = json.loads((run / "evaluations" / "6.json").read_text())
    assert points(run, "evaluate/nmi") == [(6, pytest.approx(scores["nmi"], rel=1e-6))]


def test_a_continued_run_shows_every_step_once(small: list[str]) -> None:
    """Killed after step 5 with the last checkpoint at 4: steps 5 and 6 are written again, by the continued run."""
    import shutil

    run, arguments = run_of(small), [*small, "run.trackers=[tensorboard]"]
    assert command(arguments)[0] == 0
    shutil.rmtree(run / "checkpoints" / "6")
    (run / "checkpoints" / "latest").write_text("4\n")
    assert command([*arguments, "run.resume=auto"])[0] == 0
    assert len(list((run / "tensorboard").iterdir())) == 2
    assert [step for step, _ in points(run, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_wandb_offline(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    code, text = command([*small, "run.trackers=[wandb]", "train.max_steps=2"])
    assert code == 0, text
    (offline,) = (run_of(small) / "wandb").glob("offline-run-*")
    assert next(offline.glob("*.wandb")).stat().st_size > 0
    assert "wandb:" not in text


def test_a_tracker_that_is_not_installed_ends_the_run_before_the_first_step(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    code, text = command([*small, "run.trackers=[wandb]"])
    assert code == 2
    assert "wandb" in text
    assert "rkdo_dist[tracking]" in " ".join(text.split())
    assert not run_of(small).exists()


def test_a_tracker_that_nobody_knows_is_refused(small: list[str]) -> None:
    code, text = command([*small, "run.trackers=[tensorbord]"])
    assert code == 2
    assert "tensorboard" in text
    code, text = command([*small, "run.trackers=tensorboard"])
    assert code == 2
    assert "list" in text


# --- the console --------------------------------------------------------------------------------------------------


def _warn_in_every_step(rank: int, world: int, arguments: list[str]) -> tuple[int, str]:
    """Training in which all ranks warn alike, and each of its own."""
    from rkdo_dist.training.job import Job

    told = Job.told

    def warned(job: Job, *details: Any) -> Any:
        warnings.warn("every rank says this", RuntimeWarning, stacklevel=1)
        logging.getLogger("somebody").warning("a log record of every rank")
        if rank == 1:
            warnings.warn("only one rank says this", UserWarning, stacklevel=1)
        return told(job, *details)

    Job.told = warned  # type: ignore[method-assign]  # in a forked process of its own
    return rank_command(rank, world, arguments)


def test_every_warning_is_one_line_and_names_its_rank(small: list[str]) -> None:
    (zero, text), (one, other) = run_ranks(_warn_in_every_step, 2, small)
    assert (zero, one) == (0, 0), text
    assert other == ""  # rank zero speaks for all
    lines = text.splitlines()
    assert [line for line in lines if "every rank says" in line] == [
        "rkdo: warning: every rank says this (RuntimeWarning)"
    ]
    assert [line for line in lines if "log record" in line] == ["rkdo: warning: a log record of every rank (somebody)"]
    assert [line for line in lines if "only one" in line] == ["rkdo [rank 1]: warning: only one rank says this"]


def test_long_paths_stay_in_one_piece(small: list[str], tmp_path: Path) -> None:
    """Scripts read the lines that name a file, and a terminal makes a link of a path only if it is whole."""
    run = tmp_path / ("a-long-name-" * 8) / "run"
    code, text = command([*small[:-1], f"run.dir={run}", "train.max_steps=1", "evaluate.at_end=true"])
    assert code == 0, text
    assert {f"done: {run}", f"evaluation: {run / 'evaluations' / '1.json'}"} <= set(text.splitlines())


def test_a_rank_that_leaves_says_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    shown, handlers = warnings.showwarning, list(logging.getLogger().handlers)
    with messages.collected(3):
        warnings.warn("the last words", UserWarning, stacklevel=1)
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err == "rkdo [rank 3]: warning: the last words\n"
    assert warnings.showwarning is shown
    assert logging.getLogger().handlers == handlers
