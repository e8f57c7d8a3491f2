"""The record of a run: epochs, attained share, scores; what counts as complete; how groups are named and coloured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rkdo_dist.history import attained_share
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies.palette import of_objective
from rkdo_dist.studies.report.groups import overview, read_groups
from rkdo_dist.studies.runner import Planned, complete
from tests.jobs import command
from tests.reports import fake_run, scores_of


def test_epochs_leave_out_skipped_steps_and_time_does_not(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", "rkdo", 1, [2.0, 1.8], {4: scores_of(0.2), 8: scores_of(0.3, 5.5)})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1]["loss"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = RunDirectory(run).history()
    assert (found.steps, found.skipped, found.steps_per_epoch) == (8, 1, 4)
    kept = [line["loss"] for line in lines[:4] if line["loss"] is not None]
    assert found.epochs[0].loss == pytest.approx(sum(kept) / 3)
    assert [epoch.seconds for epoch in found.epochs] == [2.0, 4.0]
    last = found.epochs[1]
    assert last.attained == pytest.approx((last.at_uniform - last.loss) / (last.at_uniform - last.at_ideal))
    assert found.after_epoch(2)["linear_accuracy"] == found.score("linear_accuracy") == 0.3
    assert found.score("infonce", 4) == found.score("yardsticks.infonce", 4) == 5.0
    assert found.score("infonce.nothing") is None
    assert len(found.curve("loss")) == 7


def test_an_objective_that_nothing_improves_has_no_attained_share() -> None:
    assert attained_share(1.0, 2.0, 0.0) == 0.5
    assert attained_share(0.0, 0.0, 0.0) is None


def test_complete_is_what_the_status_says_unless_more_is_asked_for(tmp_path: Path) -> None:
    path = fake_run(tmp_path / "run", "rkdo", 1, [2.0, 1.8])
    config = RunDirectory(path).config([f"run.dir={path}"])
    planned = Planned(config, 8)
    assert not complete(planned), "there is no status.json yet"
    for word, step, expected in (("running", 8, False), ("preempted", 4, False), ("complete", 8, True)):
        RunDirectory(path).write_status(word, step)
        assert complete(planned) == expected
    RunDirectory(path).write_status("complete", 4)
    assert complete(planned), "the same settings and fewer steps: an early stop"
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=config.train.epochs + 1))
    assert not complete(Planned(longer, 12)), "a shorter run of this directory goes on"


def test_a_persistent_run_is_called_what_it_is(tmp_path: Path) -> None:
    paths = [
        fake_run(tmp_path / "a", "rkdo", 1, [2.0], {4: scores_of(0.2)}),
        fake_run(tmp_path / "b", "rkdo", 1, [2.0], {4: scores_of(0.3)}, "field.recursion=persistent"),
    ]
    groups, _ = read_groups(paths)
    assert [group.label for group in groups] == ["RKDO", "RKDO, persistent"]
    assert [group.style for group in groups] == [of_objective("rkdo"), of_objective("persistent")]
    rows = {row[0]: row[1:] for row in overview(groups).rows}
    assert rows["linear accuracy (embedding)"] == ["0.2000", "0.3000"]


def test_compare_prints_the_first_table_of_the_report(tmp_path: Path) -> None:
    paths = [
        fake_run(tmp_path / f"{name}-{seed}", name, seed, [2.0], {4: scores_of(0.2 + 0.1 * seed)})
        for name in ("rkdo", "icon")
        for seed in (1, 2)
    ]
    words = [str(path) for path in paths]
    code, compared = command(["compare", *words, "--figure", str(tmp_path / "new" / "loss.svg")])
    assert code == 0, compared
    assert "0.3500 ± 0.0707" in compared
    assert (tmp_path / "new" / "loss.svg").read_text().count("Attained share") == 1
    code, reported = command(["report", *words, "--out", str(tmp_path / "page.html")])
    assert code == 0, reported
    table = compared[: compared.index("Mean ± sd over 2 seeds")]
    assert "attained share" in table
    assert table in reported
    code, refusal = command(["compare", *words, "--figure", str(tmp_path / "loss.nothing")])
    assert (code, refusal.count("\n")) == (2, 1)  # before the table
