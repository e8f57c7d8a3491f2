"""`rkdo sweep`: axes, names, tables and figures of made-up runs, and real runs that are not made twice."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rkdo_dist import config as configuration
from rkdo_dist.config import ConfigError
from rkdo_dist.studies import grid, runner, sweep
from rkdo_dist.studies.runner import Planned
from rkdo_dist.studies.sweep_figures import _values, figures
from tests.jobs import command, metrics
from tests.runs import Forked, made_up

DEPTH, COUPLING = grid.axis("field.depth=1,3,5"), grid.axis("field.coupling=0.1,0.5")


def asked(out: Path, *axes: grid.Axis, seeds: tuple[int, ...] = (1, 2, 3), metric: str = "nmi") -> grid.Sweep:
    base = configuration.from_tree({"train": {"epochs": 2, "batches_per_epoch": 4}})
    return grid.Sweep(base, axes, seeds, out, metric)


def test_axes() -> None:
    assert grid.axis("field.depth=1, 3,5") == grid.Axis("field.depth", (1, 3, 5))
    assert grid.axis("views.crop_scale=[0.2,1],[0.5,1]").values == ([0.2, 1], [0.5, 1])
    assert grid.axis("field.supervisor_grad=flow,stop").texts == ["flow", "stop"]
    assert grid.axis("train.max_steps=null,5").texts == ["null", "5"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("depth=1,2", "section.key=value,value"),
        ("field.depth", "section.key=value,value"),
        ("field.depth=", "not a list of values"),
        ("field.depth=[1", "not a list of values"),
        ("field.depth=1,1", "twice"),
        ("run.seed=1,2", "--seeds"),
        ("run.dir=a,b", "--out"),
    ],
)
def test_axes_that_cannot_be_meant(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        grid.axis(text)


def test_every_combination_has_its_own_directory_whatever_the_order_of_the_axes(tmp_path: Path) -> None:
    places = grid.axis("data.split=a/b,a_b,a:b")
    one, other = asked(tmp_path, DEPTH, places), asked(tmp_path, places, DEPTH)
    first = {one.directory(c, s) for c in one.combinations() for s in one.seeds}
    assert len(first) == 3 * 3 * 3
    assert first == {other.directory(c, s) for c in other.combinations() for s in other.seeds}
    assert all(path.parent == tmp_path / "runs" and len(path.name) < 200 for path in first)
    plain = asked(tmp_path, DEPTH, COUPLING)
    assert plain.directory((1, 0), 7).name == "field.coupling=0.1,field.depth=3,seed=7"


def test_a_combination_changes_the_configuration_and_a_mistake_names_it(tmp_path: Path) -> None:
    config = asked(tmp_path, DEPTH, COUPLING).config((2, 1), 9)
    assert (config.field.depth, config.field.coupling, config.run.seed, config.run.resume) == (5, 0.5, 9, "auto")
    wrong = asked(tmp_path, DEPTH, grid.axis("field.coupling=0.5,1.5"))
    with pytest.raises(ConfigError, match=r"field.depth=1, field.coupling=1.5: field.coupling must lie in"):
        [wrong.config(combination, 1) for combination in wrong.combinations()]


def test_variants_are_one_axis_of_several_settings_each(tmp_path: Path) -> None:
    bank = "bank 0.1: field.recursion=persistent  field.columns=bank field.coupling=0.1"
    arms = grid.variants(["InfoNCE: field.objective=infonce", bank])
    assert arms.texts == ["InfoNCE", "bank 0.1"]
    wanted = asked(tmp_path, arms)
    one, other = (wanted.config(combination, 1) for combination in wanted.combinations())
    assert (one.field.objective, other.field.objective, other.field.coupling) == ("infonce", "rkdo", 0.1)
    assert (one.field.recursion, other.field.recursion, other.field.columns) == ("in_batch", "persistent", "bank")
    rows = grid.results(wanted, runs_of(wanted, lambda c, seed: 0.3 + 0.1 * c[0] + 0.01 * seed))
    sheet = sweep.table(wanted, rows)
    assert [row[0] for row in sheet.rows] == arms.texts
    assert "bank 0.1: field.recursion=persistent field.columns=bank field.coupling=0.1." in sheet.caption
    assert [path.name for path in figures(wanted, rows, tmp_path / "figures", "Sweep")] == ["variant.png"]


@pytest.mark.parametrize(
    "text", ["infonce", "infonce:", ": field.depth=1", "a: field.depth", "a: 'field.depth=1", "a: run.seed=3"]
)
def test_variants_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(ConfigError, match="--variant"):
        grid.variants([text])
    with pytest.raises(ConfigError, match="twice"):
        grid.variants(["a: field.depth=1", "a: field.depth=2"])


def test_some_of_the_variants_alone_keep_their_settings_and_directories(tmp_path: Path) -> None:
    arms = grid.variants(["a: field.depth=1", "b: field.depth=2", "c: field.depth=3"])
    some = grid.only(arms, ("c", "a"))
    assert (some.texts, some.changes(1)) == (["a", "c"], ("field.depth=3",))
    assert asked(tmp_path, some).directory((1,), 7) == asked(tmp_path, arms).directory((2,), 7)
    with pytest.raises(ConfigError, match="--only d: no --variant has this name; choose from a, b, c"):
        grid.only(arms, ("a", "d"))


def test_a_table_and_figures_for_every_metric(tmp_path: Path) -> None:
    wanted = dataclasses.replace(asked(tmp_path, DEPTH), more_metrics=("linear_accuracy", "yardsticks.infonce"))
    rows = grid.results(wanted, runs_of(wanted, lambda c, seed: 0.3 + 0.01 * seed))
    sweep.write(wanted, rows, Console(file=io.StringIO()))
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*") if "runs" not in path.parts}
    assert {"table.md", "table-linear_accuracy.csv", "figures-yardsticks.infonce/field.depth.png"} <= names
    wrong = dataclasses.replace(wanted, more_metrics=("accuracy",))
    with pytest.raises(ConfigError, match="accuracy: no evaluation has it"):
        sweep.write(wrong, rows, Console(file=io.StringIO()))


def runs_of(wanted: grid.Sweep, nmi: Any, missing: tuple[Any, ...] = ()) -> list[Planned]:
    planned = []
    for combination in wanted.combinations():
        for seed in wanted.seeds:
            config = wanted.config(combination, seed)
            planned.append(Planned(config, 8))
            if (combination, seed) not in missing:
                scores = {"linear_accuracy": 0.5, "nmi": nmi(combination, seed), "yardsticks": {"infonce": 2.5}}
                made_up(config, [2.0, 1.8 - 0.1 * combination[0]], lambda epoch, s=scores: s, steps_per_epoch=4)
    return planned


def test_the_table_has_a_row_per_combination_and_tests_against_the_first(tmp_path: Path) -> None:
    wanted = asked(tmp_path, DEPTH)
    nmi = {0: [0.30, 0.31, 0.32], 1: [0.41, 0.42, 0.44], 2: [0.29, 0.32, 0.33]}
    planned = runs_of(wanted, lambda c, seed: nmi[c[0]][seed - 1], missing=(((2,), 3),))
    rows = grid.results(wanted, planned)
    assert [len(row.runs) for row in rows] == [3, 3, 2]
    sheet = sweep.table(wanted, rows)
    assert "protocol full" in sheet.title
    assert [row[0] for row in sheet.rows] == ["1", "3", "5"]
    assert sheet.data[1]["nmi"] == pytest.approx(sum(nmi[1]) / 3)
    assert sheet.data[1]["attained"] == pytest.approx((2.1396 - 1.7) / (2.1396 - 0.7520))
    assert sheet.rows[0][-1] == "-"
    assert sheet.rows[1][-1].startswith("this higher by 0.1133")
    assert sheet.rows[2][-1] == "no evidence of a difference"
    assert sheet.rows[1][-2] == f"+0.1133 ± {sheet.data[1]['difference_margin']:.4f}"
    assert sheet.data[1]["bootstrap_low"] <= sheet.data[1]["difference"] <= sheet.data[1]["bootstrap_high"]
    assert sheet.data[1]["holm_p"] == pytest.approx(2 * sheet.data[1]["t_p"])
    assert grid.score(rows[0].runs[1], "yardsticks.infonce") == 2.5
    assert grid.score(rows[0].runs[1], "yardsticks.nothing") is None
    own = sweep.table(
        dataclasses.replace(wanted, metric="loss"), rows
    )  # no score at all: the loss stands in its column again
    assert {len(row) for row in own.rows} == {len(own.columns)}


def test_figures_for_one_key_two_and_three(tmp_path: Path) -> None:
    for name, axes, files in (
        ("one", (DEPTH,), ["field.depth.png"]),
        ("two", (DEPTH, COUPLING), ["field.depth-field.coupling.png"]),
        (
            "three",
            (DEPTH, COUPLING, grid.axis("field.supervisor_grad=flow,stop")),
            [
                "field.depth-field.coupling.png",
                "field.depth-field.supervisor_grad.png",
                "field.coupling-field.supervisor_grad.png",
            ],
        ),
    ):
        wanted = asked(tmp_path / name, *axes, seeds=(1, 2))
        planned = runs_of(wanted, lambda c, seed: 0.3 + 0.05 * sum(c) + 0.01 * seed)
        rows = grid.results(wanted, planned)
        paths = figures(wanted, rows, tmp_path / name / "figures", "Sweep")
        assert [path.name for path in paths] == files
        assert all(p.stat().st_size > 5000 and p.with_suffix(".svg").stat().st_size > 5000 for p in paths)
    # A cell of a heat map averages over the third key, seed by seed: depth 5, coupling 0.5, both gradients.
    assert _values(rows, (0, 1), (2, 1), "nmi") == pytest.approx([0.3 + 0.05 * 3.5 + 0.01, 0.3 + 0.05 * 3.5 + 0.02])


def test_a_sweep_runs_what_is_missing_only(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hybrid, a schedule and an early stop among the settings that are swept."""
    monkeypatch.setattr(runner, "start", Forked)
    shards = next(word for word in small if word.startswith("data.shards="))
    base = ["sweep", small[1], "--set", shards, "--set", "evaluate.at_end=true", "--set", "train.batches_per_epoch=3"]
    base += ["--out", str(tmp_path / "out"), "--processes", "2", "--metric", "knn_accuracy"]
    code, text = command([*base, "--vary", "field.switch_to=none,icon"])
    assert code == 0, text
    first = tmp_path / "out" / "runs" / "field.switch_to=icon,seed=42"
    assert [record["objective"] for record in metrics(first)] == ["rkdo", "rkdo", "icon"]
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["field.switch_to"] for row in rows] == ["none", "icon"]
    judged = json.loads((first / "evaluations" / "3.json").read_text())
    inside = [name.removeprefix("yardsticks.") for name in sweep._names(judged)]
    assert {name for name in inside if not name.startswith(sweep._PLACED)} <= sweep._METRICS
    assert float(rows[1]["knn_accuracy"]) == judged["knn_accuracy"]
    assert (rows[1]["protocol"], math.isnan(float(rows[1]["attained"]))) == ("paper", False)
    journal = (first / "metrics.jsonl").read_bytes()
    code, text = command([*base, "--vary", "field.switch_to=none,icon", "--processes", "1024"])
    assert code == 0
    assert "2 of 2 runs are complete already" in text
    assert (first / "metrics.jsonl").read_bytes() == journal


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--vary", "field.depth=1,0"], "field.depth=0: field.depth must be at least 1"),
        (["--vary", "field.dept=1,2"], "field.dept"),
        (["--vary", "field.depth=1", "--vary", "field.depth=2"], "twice"),
        (["--vary", "field.depth=1,1.0"], "field.depth=1.0 is the run of field.depth=1"),
        (["--variant", "a: field.depth=1", "--variant", "b: field.depth=1"], "variant=b is the run of variant=a"),
        (["--vary", "field.depth=1,2", "--seeds", "1,1"], "--seeds"),
        (["--vary", "field.depth=1,2", "--processes", "0"], "--processes"),
        ([], "say what to vary"),
        (["--variant", "a: field.depht=1"], "variant=a"),
        (["--variant", "a: field.depth=1", "--only", "b"], "--only b"),
        (["--vary", "field.depth=1,2", "--only", "a"], "--only chooses among variants"),
        (["--vary", "field.depth=1,2", "--metric", ""], "--metric"),
        (["--vary", "field.depth=1,2", "--metric", "linear_acuracy"], "(did you mean linear_accuracy?)"),
        (["--vary", "field.depth=1,2", "--metric", "nmi,yardsticks.nonsense"], "yardsticks.nonsense: no evaluation"),
    ],
)
def test_mistakes_end_before_anything_runs(small: list[str], tmp_path: Path, arguments: list[str], word: str) -> None:
    shards = next(text for text in small if text.startswith("data.shards="))
    code, text = command(["sweep", small[1], "--set", shards, "--out", str(tmp_path / "out"), *arguments])
    assert code == 2
    assert word in " ".join(text.split())
    assert not (tmp_path / "out").exists()
