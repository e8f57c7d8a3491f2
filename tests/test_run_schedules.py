"""What changes during a run: coupling schedules, the hybrid's switch, the early stop; the same after a restart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkdo_dist import config as configuration
from rkdo_dist import parts
from rkdo_dist.field import schedules
from rkdo_dist.training.early_stop import EarlyStop, slope
from tests.jobs import command, fingerprint, metrics, on_ranks, run_of


def config(**field: object) -> configuration.Config:
    return configuration.from_tree({"field": field, "train": {"epochs": 10}})


# --- the objective of a step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules.COUPLING_SCHEDULES)
def test_the_coupling_of_every_level_follows_its_schedule(name: str) -> None:
    settings = config(coupling=0.8, coupling_end=0.2, coupling_schedule=name)
    for progress in (0, 0.3, 0.5, 1):
        objective = parts.make_objective(settings, progress)
        assert set(objective.couplings) == {schedules.coupling(name, 0.8, 0.2, progress * 10, 10)}


def test_coupling_starts_with_the_first_step_of_its_epoch_also_in_a_short_run() -> None:
    settings = config(coupling_start_epoch=3.0)
    for steps_per_epoch in (7, 11, 782):
        for epochs in (10, 4):  # train.max_steps may cut a run
            total = epochs * steps_per_epoch
            step = 3 * steps_per_epoch
            steps = (0, step - 1, step, total)
            found = [parts.coupling_at(settings, s / total, total / steps_per_epoch) for s in steps]
            assert found == [0, 0, 0.5, 0.5]


def test_a_run_cut_before_the_start_has_no_coupling() -> None:
    settings = config(coupling_start_epoch=3.0)
    assert parts.coupling_at(settings, 19 / 20, 2) == 0


def test_the_hybrid_is_rkdo_first_and_icon_later() -> None:
    settings = config(switch_to="icon", switch_at=0.3, debias=0.1)
    kinds = [parts.make_objective(settings, step / 110).name for step in range(110)]
    assert kinds == ["rkdo"] * 33 + ["icon"] * 77
    assert parts.make_objective(settings, 0.3).debias == 0.1
    assert parts.make_objective(config(objective="icon", switch_to="rkdo"), 0.5).name == "rkdo"
    assert parts.make_objective(config(), 1.0).name == "rkdo"


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"field": {"coupling_end": 1.5}}, "field.coupling_end"),
        ({"field": {"switch_at": -0.1}}, "field.switch_at"),
        ({"field": {"switch_to": "supervised"}}, "field.switch_to"),
        ({"field": {"coupling_start_epoch": 11.0}}, "field.coupling_start_epoch"),
        ({"train": {"evaluate_at": [1, 11]}}, "train.evaluate_at"),
        ({"train": {"evaluate_at": 3}}, "train.evaluate_at"),
        ({"train": {"early_stop_slope": -1.0}}, "train.early_stop_slope"),
        ({"train": {"early_stop_window": 2}}, "train.early_stop_window"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_mistakes_name_the_key(tree: dict, key: str) -> None:
    with pytest.raises(configuration.ConfigError, match=key):
        parts.check(configuration.from_tree(tree))


# --- the slope of L(t) --------------------------------------------------------------------------------------------


@given(
    st.floats(-1, 1),
    st.lists(st.floats(-5, 5), min_size=3, max_size=30),
)
def test_the_slope_is_that_of_least_squares(tilt: float, noise: list[float]) -> None:
    values = [tilt * t + x for t, x in enumerate(noise)]
    n = len(values)
    best = slope(values)
    mean_t, mean = (n - 1) / 2, sum(values) / n

    def error(candidate: float) -> float:
        return sum((value - mean - candidate * (t - mean_t)) ** 2 for t, value in enumerate(values))

    assert error(best) <= min(error(best + 1e-3), error(best - 1e-3))


def test_a_straight_line_has_its_own_slope() -> None:
    assert slope([3 - 0.25 * t for t in range(9)]) == pytest.approx(-0.25)


def test_it_stops_where_a_geometric_decay_has_flattened() -> None:
    """L(t) = L* + r^t (eq. 14): the mean slope over the window falls below the threshold at a known step."""
    watch, losses = EarlyStop(0.01, 5), [1.0 + 0.8**t for t in range(60)]
    stopped = []
    for loss in losses:
        watch.add("rkdo", loss)
        stopped.append(watch.reached)
    first = stopped.index(True)
    assert -slope(losses[first - 4 : first + 1]) < 0.01 <= -slope(losses[first - 5 : first])
    assert all(stopped[first:])
    assert 12 < first < 30


def test_nothing_stops_before_a_whole_window_or_across_a_change_of_objective() -> None:
    watch = EarlyStop(0.5, 4)
    for loss in (1.0, 1.0, 1.0, None):  # a skipped step has no loss
        watch.add("rkdo", loss)
    assert not watch.reached
    for loss in (2.0, 2.0, 2.0):
        watch.add("icon", loss)
        assert not watch.reached
    watch.add("icon", 2.0)
    assert watch.reached
    off = EarlyStop(None, 3)
    for _ in range(9):
        off.add("rkdo", 1.0)
    assert not off.reached


def test_its_state_goes_on_exactly() -> None:
    losses = [1 / (t + 3) for t in range(40)]
    straight, broken = EarlyStop(0.001, 6), EarlyStop(0.001, 6)
    for number, loss in enumerate(losses):
        straight.add("rkdo", loss)
        broken.add("rkdo", loss)
        state = broken.state()
        broken = EarlyStop(0.001, 6)
        broken.restore(state)
        assert broken.reached == straight.reached, number
    assert straight.reached


# --- whole runs ---------------------------------------------------------------------------------------------------


def as_if_killed_at(run: Path, step: int) -> None:
    """Only the checkpoint of `step` is left, and a journal that went on further."""
    for path in (run / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    (run / "checkpoints" / "latest").write_text(f"{step}\n")


@pytest.mark.parametrize("killed", [2, 4])
def test_a_hybrid_with_a_schedule_resumes_bitwise_across_its_switch(small: list[str], killed: int) -> None:
    run = run_of(small)
    hybrid = ["field.switch_to=icon", "field.coupling_schedule=cosine", "field.coupling_end=0.1"]
    arguments = [*small, *hybrid, "train.keep_checkpoints=9"]
    code, text = command(arguments)
    assert code == 0, text
    whole, journal = fingerprint(run, 6), metrics(run)
    assert [record["objective"] for record in journal] == ["rkdo"] * 3 + ["icon"] * 3
    couplings = [record["coupling"] for record in journal]
    assert couplings[:3] == sorted(couplings[:3], reverse=True)
    assert len(set(couplings[:3])) == 3
    assert couplings[3:] == [0.2] * 3
    as_if_killed_at(run, killed)
    answers = on_ranks(2, [*arguments, "run.resume=auto"])
    assert [code for code, _ in answers] == [0, 0], answers
    assert fingerprint(run, 6) == whole
    assert metrics(run) == journal


def test_a_run_that_depends_on_its_length_does_not_grow(small: list[str]) -> None:
    hybrid = ["field.switch_to=icon", "train.checkpoint_every=3"]
    command([*small, *hybrid, "train.epochs=1"])
    code, text = command([*small, *hybrid, "train.epochs=2", "run.resume=auto"])
    assert code == 2
    assert "train.epochs: 1 -> 2" in " ".join(text.split())


def test_early_stop_is_the_same_on_two_ranks_and_after_a_restart(small: list[str]) -> None:
    """A slope that no loss reaches stops at the first whole window; evaluated and complete there."""
    run = run_of(small)
    stop = ["train.early_stop_slope=9", "train.early_stop_window=5", "train.keep_checkpoints=9"]
    code, text = command([*small, *stop, "evaluate.at_end=true"])
    assert code == 0, text
    assert "early_stop_slope" in text
    whole, journal = fingerprint(run, 5), metrics(run)
    assert len(journal) == 5
    assert (run / "evaluations" / "5.json").is_file()
    as_if_killed_at(run, 4)
    answers = on_ranks(2, [*small, *stop, "run.resume=auto"])
    assert [code for code, _ in answers] == [0, 0], answers
    assert (fingerprint(run, 5), metrics(run)) == (whole, journal)
    assert command([*small, *stop, "run.resume=auto"])[0] == 0  # complete: nothing more happens
    assert (fingerprint(run, 5), metrics(run)) == (whole, journal)


def test_evaluations_at_listed_epochs(small: list[str]) -> None:
    run = run_of(small)
    listed = ["train.epochs=4", "train.batches_per_epoch=1", "train.evaluate_at=[1,3]", "evaluate.at_end=true"]
    code, text = command([*small, *listed])
    assert code == 0, text
    assert sorted(int(p.stem) for p in (run / "evaluations").iterdir()) == [1, 3, 4]
