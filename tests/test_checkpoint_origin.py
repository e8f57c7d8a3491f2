"""A checkpoint belongs to its run: another run's is refused, naming what differs; a lost one is not passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rkdo_dist import config as configuration
from rkdo_dist.checkpoint import manifest
from rkdo_dist.data.prepare import prepare
from tests.jobs import command, fingerprint, metrics, run_of


@pytest.fixture
def run(small: list[str]) -> Path:
    """A run of two of its six steps."""
    assert command([*small, "train.max_steps=2"])[0] == 0
    return run_of(small)


def refused(arguments: list[str], *words: str) -> None:
    code, text = command(arguments)
    text = " ".join(text.split())
    assert code == 2, text
    assert "Traceback" not in text
    for word in words:
        assert word in text


def files(run: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_checkpoint_says_readably_what_it_belongs_to(run: Path) -> None:
    state = json.loads((run / "checkpoints" / "2" / "state.json").read_text())["extra"]
    assert state["configuration"]["field"]["objective"] == "rkdo"
    assert state["configuration"]["run"]["seed"] == state["seed"] == 42
    assert "shards" not in state["configuration"]["data"]  # an address may be secret, and may change
    assert len(state["data"]) == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("run.seed=7", "run.seed: 7 -> 42"),
        ("field.objective=infonce", "field.objective: infonce -> rkdo"),
        ("encoder.embedding_dim=8", "encoder.embedding_dim: 8 -> 16"),
    ],
)
def test_another_runs_checkpoint_is_refused(small: list[str], run: Path, change: str, words: str) -> None:
    other = run.with_name("other")
    assert command([*small[:-1], f"run.dir={other}", "train.max_steps=2", change])[0] == 0
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    before = files(run)
    refused([*small, "run.resume=auto"], words, str(run / "checkpoints" / "2"))
    refused(["evaluate", str(run)], words)
    refused([*small[:-1], f"run.dir={run.with_name('branch')}", f"run.resume={run}"], words)
    assert files(run) == before
    assert not (run.with_name("branch") / "config.yaml").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed: 42", "seed: 43", "run.seed: 42 -> 43"),
        ("objective: rkdo", "objective: infonce", "field.objective: rkdo -> infonce"),
        ("embedding_dim: 16", "embedding_dim: 32", "encoder.embedding_dim: 16 -> 32"),
        ("learning_rate: 0.001", "learning_rate: 0.002", "train.learning_rate: 0.001 -> 0.002"),
    ],
)
def test_an_edited_config_is_refused(run: Path, old: str, new: str, words: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))
    before = files(run)
    refused(["train", str(run / "config.yaml"), "run.resume=auto"], words)
    refused(["evaluate", str(run)], words)
    assert files(run) == before


def test_other_data_are_refused(small: list[str], run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    prepare("digits", other, shard_size=100)
    refused([*small, f"data.shards={other}", "run.resume=auto"], "other data than data.shards now holds")


def test_what_changes_no_result_may_change_and_a_run_may_grow(small: list[str], run: Path) -> None:
    code, text = command([*small, "run.resume=auto", "train.max_steps=4", "train.keep_checkpoints=3", "data.workers=1"])
    assert code == 0, text
    assert len(metrics(run)) == 4
    scheduled = [*small[:-1], f"run.dir={run.with_name('cosine')}", "train.schedule=cosine", "train.epochs=2"]
    assert command([*scheduled, "train.max_steps=2"])[0] == 0
    refused([*scheduled, "run.resume=auto"], "train.max_steps: 2 -> None")


def test_a_run_is_not_continued_to_fewer_steps_than_it_has(small: list[str], run: Path) -> None:
    (run / "evaluations").mkdir()
    (run / "evaluations" / "\u0663.json").write_text("{}")  # a three that is no name of a step
    before, fewer = files(run), f"{run} has done 2 steps, more than the 1 that are asked for"
    refused([*small, "run.resume=auto", "train.max_steps=1"], fewer, "train.max_steps")
    refused([*small[:-1], f"run.dir={run.with_name('less')}", f"run.resume={run}", "train.max_steps=1"], fewer)
    assert command(["compare", str(run)])[0] == 0
    assert files(run) == before
    assert not (run.with_name("less") / "config.yaml").exists()


def as_the_first_edition_wrote_it(run: Path, step: int, **changes: Any) -> None:
    """The checkpoint with the digest of its settings alone."""
    root = run / "checkpoints" / str(step)
    state = json.loads((root / "state.json").read_text())
    settings = configuration.digest_of_first_edition(configuration.from_tree(state["extra"].pop("configuration")))
    state["extra"] |= {"settings": settings, **changes}
    (root / "state.json").write_bytes(manifest.to_json(state))
    (root / "manifest.json").write_bytes(manifest.manifest_of(root, step))


def test_a_checkpoint_of_the_first_edition_goes_on_if_its_digest_fits(small: list[str], run: Path) -> None:
    straight = run.with_name("straight")
    assert command([*small[:-1], f"run.dir={straight}"])[0] == 0
    as_the_first_edition_wrote_it(run, 2)
    assert command([*small, "run.resume=auto", "train.max_steps=3"])[0] == 0  # grown
    as_the_first_edition_wrote_it(run, 3)
    assert command(["evaluate", str(run)])[0] == 0
    assert command([*small, "run.resume=auto"])[0] == 0
    assert metrics(run) == metrics(straight)
    assert fingerprint(run, 6) == fingerprint(straight, 6)
    as_the_first_edition_wrote_it(run, 6, settings="0" * 64)
    refused([*small, "run.resume=auto"], "other settings", "digest")


# --- a lost checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
def test_lost_checkpoints_are_not_passed_over(small: list[str], run: Path, empty: bool) -> None:
    shutil.rmtree(run / "checkpoints")
    if empty:
        (run / "checkpoints").mkdir()
    before = files(run)
    refused([*small, "run.resume=auto"], "holds no checkpoint", "2 steps", "one of step 2", "choose another run.dir")
    assert files(run) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(small: list[str], run: Path) -> None:
    (run / "checkpoints").rename(run.with_name("aside"))
    (run / "status.json").write_text(json.dumps({"status": "running", "step": 0}))
    code, text = command([*small, "run.resume=auto"])
    assert code == 0, text
    assert "ended before its first checkpoint: its 2 steps are trained again" in " ".join(text.split())
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_a_run_that_was_killed_later_is_missed_too(small: list[str], run: Path) -> None:
    status = json.loads((run / "status.json").read_text())
    assert status["checkpoint"] == 2
    (run / "status.json").write_text(json.dumps({**status, "status": "running"}))
    shutil.rmtree(run / "checkpoints")
    refused([*small, "run.resume=auto"], "one of step 2")


# --- evaluations ------------------------------------------------------------------------------------------------


def test_an_evaluation_counts_only_for_the_weights_it_was_made_from(small: list[str], run: Path) -> None:
    judged = [*small, "train.max_steps=2", "evaluate.at_end=true", "run.resume=auto"]
    file = run / "evaluations" / "2.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"step": 2, "protocol": "paper", "linear_accuracy": 1.0}))
    assert command(judged)[0] == 0
    own = json.loads(file.read_text())
    assert own["linear_accuracy"] != 1.0
    manifest_file = json.loads((run / "checkpoints" / "2" / "manifest.json").read_text())
    assert own["weights"] == manifest_file["files"]["model.safetensors"]["sha256"]
    stamp = file.stat().st_mtime_ns
    assert command(judged)[0] == 0
    assert file.stat().st_mtime_ns == stamp  # its own is not made again
    for foreign in ({**own, "weights": "0" * 64}, [], {}):
        file.write_text(json.dumps(foreign))
        assert command(judged)[0] == 0
        assert json.loads(file.read_text()) == own


def test_settings_survive_the_way_into_a_checkpoint_and_back() -> None:
    config = configuration.change(
        configuration.Config(), ["views.crop_scale=[0.5, 1.0]", "train.learning_rate=1e-3", "data.image_size=16"]
    )
    stored = json.loads(json.dumps(configuration.decisive_tree(config)))
    assert configuration.decisive(configuration.from_tree(stored)) == configuration.decisive(config)
