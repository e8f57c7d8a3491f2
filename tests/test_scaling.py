"""`rkdo scale`: honest tables, a page that needs no other file, and refusals before anything is started."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rkdo_dist.measure import scaling
from rkdo_dist.measure.scaling import Plan, ScalingError
from rkdo_dist.measure.wire import step_payloads
from rkdo_dist.studies import scaling_tables
from rkdo_dist.training.shape import StepShape
from tests.jobs import command
from tests.launching import environment

SHAPE = StepShape(
    world=1, lanes=64, micro_batch=16, dimension=64, parameters=1_000_000, channels=5000,
    column_views=1, report=9, walks=2, forwards=1, strategy="single", reduction="exact", exchange="gather",
    recompute=False,
)  # fmt: skip


def made_point(way: str, world: int) -> dict[str, Any]:
    """A point as `rkdo measure` leaves it, on 4 cores."""
    reduction, exchange = {"exact": ("exact", "gather"), "fast": ("fast", "gather"), "ring": ("fast", "ring")}[way]
    strategy = "single" if world == 1 else "ddp"
    shape = dataclasses.replace(SHAPE, world=world, reduction=reduction, exchange=exchange, strategy=strategy)
    book = step_payloads(shape)
    return {
        "way": way,
        "world": world,
        "machines": 1,
        "device": "a core",
        "device_kind": "cpu",
        "cores": 4,
        "threads": 1,
        "precision": "no",
        "shape": dataclasses.asdict(shape),
        "seconds": 2.0 / world + 0.1,
        "phases": {"data": 0.2, "forward/backward": 2.0 / world - 0.2, "exchange": 0.1},
        "wire": [[*entry, size, book.calls[entry]] for entry, size in sorted(book.payload.items())],
        "peak_bytes": [10**9] * world,
        "losses": [2.0, 1.5 + (1e-6 * world if way != "exact" else 0.0)],
        "batch_digests": ["a", "b"],
    }


def made_results(mode: str = "strong") -> dict[str, Any]:
    points = [made_point(way, world) for way in ("exact", "fast", "ring") for world in (1, 2, 4, 8)]
    return json.loads(json.dumps({"mode": mode, "points": points}))


def row(results: dict[str, Any], way: str, world: int) -> scaling.Row:
    return next(r for r in scaling.study(results).rows if (r.way, r.world) == (way, world))


def test_rows_say_what_scaling_bought() -> None:
    results = made_results()
    first, second = row(results, "exact", 1), row(results, "exact", 2)
    assert first.efficiency == 1
    assert second.efficiency == pytest.approx(first.seconds / second.seconds / 2)
    assert (first.same, second.same) == ("reference", "yes, every bit")
    assert row(results, "ring", 2).same == "samples; losses to 7e-07"
    assert second.exact_bytes is True
    assert not second.oversubscribed


def test_shared_cores_are_not_called_scaling() -> None:
    study = scaling.study(made_results())
    assert [r.world for r in study.rows if r.oversubscribed] == [8, 8, 8]
    measured, _ = scaling_tables.tables(study)
    assert all(("shares cores" in cells) == (cells[1] == "8") for cells in measured.rows)
    assert any("8 processes share 4 cores" in note for note in scaling_tables.notes(study))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p["losses"].__setitem__(1, 1.6), "NO: losses to 7e-02"),
        (lambda p: p["batch_digests"].__setitem__(0, "c"), "NO: other samples"),
        (lambda p: p["wire"][0].__setitem__(2, 1), "yes, every bit"),
    ],
)
def test_what_is_not_the_same_is_said(change: Any, said: str) -> None:
    results = made_results()
    change(next(p for p in results["points"] if (p["way"], p["world"]) == ("exact", 4)))
    changed = row(results, "exact", 4)
    assert changed.same == said
    study = scaling.study(results)
    differ = any("FORMULA AND LEDGER DIFFER in exact on 4" in note for note in scaling_tables.notes(study))
    assert differ == (changed.exact_bytes is False) == (said == "yes, every bit")


def test_a_page_without_other_files(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(made_results()))
    code, text = command(["scale", "--from", str(tmp_path)])
    assert code == 0, text
    flat = " ".join(text.split())
    for words in ("agree exactly in all 12 measurements", "8 processes share 4 cores", "every bit"):
        assert words in flat, words
    page = (tmp_path / "scaling.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 5
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "://" not in page
    for words in ("agree exactly in all 12 measurements", "every bit", "shares cores"):
        assert words in page, words
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_files_of_a_cluster_are_put_together(tmp_path: Path) -> None:
    """Several launches have each left a file of `rkdo measure`."""
    results = made_results()
    for world in (1, 2, 4):
        points = [p for p in results["points"] if p["world"] == world]
        (tmp_path / f"of-{world}.json").write_text(json.dumps({"points": points}))
    found = scaling.read(tmp_path)
    assert found["mode"] == "strong"
    assert len(found["points"]) == 9
    grown = copy.deepcopy(found["points"][0])
    grown["shape"]["lanes"] *= 2
    (tmp_path / "more.json").write_text(json.dumps({"points": [grown]}))
    assert scaling.read(tmp_path)["mode"] == "weak"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--world-sizes", "1,3"], "3 ranks cannot share a step of 4 lanes"),
        (["--world-sizes", "1,x"], "--world-sizes: needs whole numbers"),
        (["--world-sizes", "2,2"], "different positive numbers"),
        (["--ways", "exact,star"], "unknown value 'star' for run.reduction"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["train.epoch=3"], "train.epochs"),
        (["--from", "nowhere"], "either a CONFIG to run, or --from"),
    ],
)
def test_refused_before_anything_is_started(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("started a process")

    monkeypatch.setattr("rkdo_dist.measure.scaling.subprocess.run", never)
    code, text = command(["scale", *small[1:], "--out", str(tmp_path / "out"), *arguments])
    assert code == 2, text
    assert words in " ".join(text.split())
    assert not (tmp_path / "out").exists()


def test_folders_without_measurements_are_refused(tmp_path: Path) -> None:
    for content in (None, "{", '{"points": []}', '{"points": [{"way": "exact"}]}'):
        if content is not None:
            (tmp_path / "a.json").write_text(content)
        code, text = command(["scale", "--from", str(tmp_path)])
        assert code == 2, text
        assert "measure" in text


def test_weak_scaling_grows_the_batch(small: list[str]) -> None:
    plan = Plan(Path(small[1]), tuple(small[2:]), (2, 4), True, 1, ("fast",))
    base = scaling.check(plan)
    assert scaling._overrides(plan, base, 2)[-1] == "train.global_batch=32"
    assert scaling._overrides(plan, base, 4)[-1] == "train.global_batch=64"
    with pytest.raises(ScalingError, match="smallest size"):
        scaling.check(Plan(Path(small[1]), tuple(small[2:]), (3, 4), True, 1, ("fast",)))


@pytest.mark.slow
def test_a_study_from_start_to_page(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "study"
    options = ["--world-sizes", "1,2", "--steps", "2", "--ways", "exact,ring", "--out", str(out)]
    code, text = command(["scale", *small[1:], *options])
    assert code == 0, text
    study = scaling.study(json.loads((out / "results.json").read_text()))
    assert [(r.way, r.world, r.exact_bytes) for r in study.rows] == [
        (way, world, True) for way in ("exact", "ring") for world in (1, 2)
    ]
    assert [r.same for r in study.rows][:2] == ["reference", "yes, every bit"]
    assert (out / "scaling.html").is_file()
