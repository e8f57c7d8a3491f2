"""Whole runs with a persistent field: any number of ranks, killed and continued, schedules, snapshots, mistakes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rkdo_dist import checkpoint, parts
from rkdo_dist import config as configuration
from rkdo_dist.config import ConfigError
from rkdo_dist.data.index import load_index
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.stream import evaluation_stream
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.studies import field_figure
from tests.jobs import command, kill_and_resume, metrics, on_ranks, run_of

DIAGNOSTICS = ("row_positive", "row_entropy", "row_stored", "row_mass", "row_drift", "p_positive")
# Two epochs of three steps: batches of neighbouring epochs overlap.
FIELD = ["field.recursion=persistent", "field.stored=24", "train.epochs=2", "train.batches_per_epoch=3"]


def everything(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of every tensor file of a checkpoint, rows included."""
    folder = run / "checkpoints" / str(step)
    files = sorted(folder.rglob("*.safetensors"))
    assert any(f.parent.name == "parts" for f in files), f"no rows in {folder}"
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("columns", ["batch", "bank"])
def test_one_run_on_1_2_and_4_processes(small: list[str], columns: str) -> None:
    arguments = [*small, *FIELD, f"field.columns={columns}"]
    code, text = command(arguments)
    assert code == 0, text
    run = run_of(arguments)
    whole, journal = everything(run, 6), metrics(run)
    assert all(record[name] >= 0 for record in journal for name in DIAGNOSTICS)
    assert journal[0]["row_positive"] == journal[0]["p_positive"] == journal[0]["row_stored"] == 1
    assert journal[-1]["row_positive"] < 1  # rows of the second epoch remember the first
    assert journal[0]["loss_at_uniform"] > journal[-1]["loss_at_uniform"]  # rows that are not certain
    assert {record["objective"] for record in journal} == {"persistent"}
    for world, extra in ((2, []), (4, ["train.recompute=true"])):
        other = [*arguments, *extra, f"run.dir={run}-{world}"]
        answers = on_ranks(world, other)
        assert [code for code, _ in answers] == [0] * world, answers
        assert everything(run_of(other), 6) == whole
        assert metrics(run_of(other)) == journal
        shown = "rows/6.json"
        assert (run_of(other) / shown).read_text() == (run / shown).read_text()


def test_killed_runs_continue_bit_for_bit_on_other_numbers_of_processes(small: list[str]) -> None:
    arguments = [*small, *FIELD, "field.columns=bank", "train.checkpoint_every=1"]
    run = run_of(arguments)
    straight = [*arguments, f"run.dir={run}-straight"]
    assert command(straight)[0] == 0
    kill_and_resume(arguments, [(2, 1), (4, 3), (1, 4)])
    answers = on_ranks(2, [*arguments, "run.resume=auto"])
    assert [code for code, _ in answers] == [0, 0], answers
    assert everything(run, 6) == everything(run_of(straight), 6)
    assert metrics(run) == metrics(run_of(straight))


def test_ddp_agrees_with_exact(small: list[str]) -> None:
    run = run_of(small)
    exact = [*small, *FIELD]
    assert command([*exact, "train.max_steps=2"])[0] == 0
    fast = [*small, *FIELD, "run.reduction=fast", f"run.dir={run}-fast", "field.columns=bank"]
    answers = on_ranks(2, fast)
    assert [code for code, _ in answers] == [0, 0], answers
    first, other = metrics(run)[0], metrics(run_of(fast))[0]
    for name in ("loss", "loss_at_uniform", "loss_at_ideal", *DIAGNOSTICS[:4]):
        assert other[name] == pytest.approx(first[name], rel=1e-6), name
    assert metrics(run_of(fast))[-1]["row_positive"] < 1


def test_coupling_zero_is_infonce(small: list[str]) -> None:
    run = run_of(small)
    settings = ["train.max_steps=4", "field.temperature=0.3"]
    none = [*small, *FIELD, *settings, "field.coupling=0", "field.cooling=0", "field.stored=7"]
    assert command(none)[0] == 0
    infonce = [*small, *settings, "field.objective=infonce", f"run.dir={run}-infonce", *FIELD[2:]]
    assert command(infonce)[0] == 0
    for mine, theirs in zip(metrics(run), metrics(run_of(infonce)), strict=True):
        for name in ("kl_1", "positive_mass", "loss_at_uniform", "loss_at_ideal"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
        assert mine["row_drift"] == 0


def test_rows_begin_to_move_with_the_schedule_and_rest_after_the_switch(small: list[str]) -> None:
    schedule = ["field.coupling_start_epoch=1", "field.switch_to=icon", "field.switch_at=0.8"]
    code, text = command([*small, *FIELD, *schedule, "train.checkpoint_every=1", "train.keep_checkpoints=9"])
    assert code == 0, text
    journal, run = metrics(run_of(small)), run_of(small)
    assert [record["objective"] for record in journal] == ["persistent"] * 5 + ["icon"]
    assert [record["row_drift"] > 0 for record in journal[:5]] == [False] * 3 + [True] * 2
    assert "row_drift" not in journal[5]
    parts = [{k: v for k, v in everything(run, step).items() if "parts" in k} for step in (3, 5, 6)]
    assert parts[0] != parts[1] == parts[2]


def test_snapshots_show_the_same_rows_at_every_checkpoint(small: list[str]) -> None:
    assert command([*small, *FIELD])[0] == 0
    shown = RunDirectory(run_of(small)).rows()
    assert [snapshot["step"] for snapshot in shown] == [2, 4, 6]
    watched = [[row["sample"] for row in snapshot["rows"]] for snapshot in shown]
    assert watched[0] == watched[1] == watched[2]
    assert len(watched[0]) == 6
    for row in shown[-1]["rows"]:
        listed = [p for _, p in row["nearest"]]
        assert listed == sorted(listed, reverse=True)
        assert sum(listed) + row["rest"] <= 1 + 1e-5
        assert 0 <= row["positive"] <= 1


def test_the_figure_shows_the_images_that_the_rows_name(small: list[str], digits: Path) -> None:
    assert command([*small, *FIELD])[0] == 0
    run = run_of(small)
    shown = field_figure.evolution(run)
    assert shown.steps == [2, 4, 6]
    assert len(shown.curves["row_positive"][0]) == 6
    listed = {sample for rows in shown.rows for row in rows for sample, _ in field_figure.neighbours(row)}
    assert listed <= set(shown.pictures)
    blocks = [block for _, block in evaluation_stream(load_index(digits), "train", 64)]
    images, labels = (torch.cat([getattr(b, name) for b in blocks]) for name in ("images", "labels"))
    for sample, picture in shown.pictures.items():
        assert picture.label == int(labels[sample])
        assert np.array_equal(picture.image, images[sample].permute(1, 2, 0).numpy())
    code, text = command(["field", str(run), "--out", f"{run}-figure"])
    assert code == 0, text
    assert Path(f"{run}-figure/field.png").stat().st_size > 10_000
    code, text = command(["report", str(run), "--out", f"{run}.html"])
    assert code == 0, text
    assert "Rows of the persistent field, seed 42" in Path(f"{run}.html").read_text()
    code, text = command(["field", str(run.parent)])
    assert code == 2
    assert "is not a run directory" in " ".join(text.split())


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "icon"}, "field.recursion=persistent is a form of field.objective=rkdo"),
        ({"pairing": "joint", "columns": "bank"}, "field.pairing=joint needs field.columns=batch, got bank"),
        ({"pairing": "symmetric"}, "needs field.pairing=cross or joint, got symmetric"),
        ({"coupling": 1.5}, r"field.coupling must lie in \[0, 1\], got 1.5"),
        ({"stored": 0}, "field.stored must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parts.check(configuration.from_tree({"field": {"recursion": "persistent", **settings}}))
    configuration.from_tree({"field": {"recursion": "persistent", "objective": "icon", "switch_to": "rkdo"}})


def test_replaced_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs data\.on_corrupt=abort, got skip"):
        configuration.from_tree({"field": {"recursion": "persistent"}, "data": {"on_corrupt": "skip"}})


def test_more_entries_than_samples_are_refused_on_every_rank(small: list[str]) -> None:
    for code, text in on_ranks(2, [*small, *FIELD, "field.stored=99999"]):
        assert code == 2
        assert "field.stored=99999, but split 'train'" in " ".join(text.split())
    assert not run_of(small).exists()


def test_no_room_is_said_before_the_first_step(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkdo_dist.training.persistent.available_bytes", lambda device: 1 << 16)
    code, text = command([*small, *FIELD, "field.columns=bank"])
    assert code == 2
    assert "are free: lower field.stored" in " ".join(text.split())
    assert not run_of(small).exists()


def test_another_data_set_under_an_existing_field_is_refused_and_nothing_is_lost(
    small: list[str], tmp_path: Path
) -> None:
    settings = [*small, *FIELD, "field.cooling=0"]  # so that nothing depends on the length of the run
    assert command([*settings, "train.max_steps=4"])[0] == 0
    before = everything(run_of(small), 4)
    other = tmp_path / "others"
    prepare("digits", other, seed=5)
    words = [*settings, "train.max_steps=6", "run.resume=auto", f"data.shards={other}"]
    code, text = command(words)
    assert code == 2
    assert "was trained on other data" in " ".join(text.split())
    assert everything(run_of(small), 4) == before
    assert len(metrics(run_of(small))) == 4


def test_a_checkpoint_without_rows_is_refused(small: list[str]) -> None:
    settings = [*small, *FIELD, "field.cooling=0"]
    assert command([*settings, "train.max_steps=2"])[0] == 0
    run = run_of(small)
    whole = checkpoint.load(run / "checkpoints" / "2")
    shutil.rmtree(run / "checkpoints")
    checkpoint.save(run / "checkpoints", 2, whole.model, whole.optimizer, whole.extra)
    code, text = command([*settings, "train.max_steps=4", "run.resume=auto"])
    assert code == 2
    assert "do not match this run" in " ".join(text.split())
    assert json.loads((run / "rows" / "2.json").read_text())["step"] == 2
