"""Trackers beside metrics.jsonl, and a console on which every warning is one line, with its rank."""

from __future__ import annotations

import json
import logging
import sys
import types
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


def test_mlflow_continues_its_run(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 6 with the last checkpoint at 4, and continued: every step once, in one run."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    import shutil

    run, arguments = run_of(small), [*small, "run.trackers=[mlflow]"]
    assert command(arguments)[0] == 0
    shutil.rmtree(run / "checkpoints" / "6")
    (run / "checkpoints" / "latest").write_text("4\n")
    assert command([*arguments, "run.resume=auto", "train.batches_per_epoch=6"])[0] == 0
    (found,) = mlflow.search_runs(experiment_names=[tracking.PROJECT], output_format="list")
    points = mlflow.MlflowClient().get_metric_history(found.info.run_id, "train/loss")
    assert [(p.step, p.value) for p in points] == [(r["step"], r["loss"]) for r in metrics(run)]
    assert found.data.params["field.objective"] == "rkdo"


class StandIn(types.ModuleType):
    """The part of MLflow that is called: remembers what it is told, and knows a run of before, if there is one."""

    def __init__(self, before: list[int]) -> None:
        super().__init__("mlflow")
        self.called: list[tuple[str, Any]] = []
        self.utils = types.SimpleNamespace(
            validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )
        experiment = types.SimpleNamespace(experiment_id="7")
        run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="old"))
        self.MlflowClient = lambda: types.SimpleNamespace(
            get_experiment_by_name=lambda name: experiment if before else None,
            search_runs=lambda ids, condition, max_results: [run] if "rkdo_dist.run" in condition else [],
            get_metric_history=lambda run_id, key: [types.SimpleNamespace(step=step) for step in before],
        )
        self.search_experiments = lambda filter_string: [experiment]

    def __getattr__(self, name: str) -> Any:
        if name not in ("set_tracking_uri", "start_run", "log_params", "log_metrics", "end_run"):
            raise AttributeError(name)
        return lambda *words, **more: self.called.append((name, (words, more)))

    def named(self, name: str) -> list[Any]:
        return [given for called, given in self.called if called == name]


@pytest.mark.parametrize("before", [[], [1, 2]])
def test_mlflow_is_told_each_number_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[int]
) -> None:
    stand_in = StandIn(before)
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    trackers = tracking.Trackers(["mlflow"], tmp_path, 0, {"field.depth": 3})
    for step in (2, 3):
        trackers.log(step, {"step": step, "loss": 1.5, "objective": "rkdo", "probe_knn": None}, "train/")
    trackers.log(2, {"nmi": 0.5}, "evaluate/")
    trackers.close()
    assert stand_in.named("set_tracking_uri") == [(((tmp_path / "mlflow").as_uri(),), {})]
    ((_, started),) = stand_in.named("start_run")
    assert started["run_id"] == ("old" if before else None)
    assert stand_in.named("log_params") == ([] if before else [(({"field.depth": 3},), {})])
    steps = [3] if before else [2, 3]
    expected = [(({"train/loss": 1.5},), {"step": step}) for step in steps] + [(({"evaluate/nmi": 0.5},), {"step": 2})]
    assert stand_in.named("log_metrics") == expected
    assert stand_in.called[-1][0] == "end_run"


def test_a_tracker_that_is_not_installed_ends_the_run_before_the_first_step(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    for name, extra in (("wandb", "tracking"), ("mlflow", "mlflow")):
        code, text = command([*small, f"run.trackers=[{name}]"])
        assert code == 2
        assert name in text
        assert f"rkdo_dist[{extra}]" in " ".join(text.split())
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
