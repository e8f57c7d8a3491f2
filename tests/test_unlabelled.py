"""Runs on data without labels or without a test split: said before step 1, evaluated as far as that goes, exit 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rkdo_dist.evaluate.scores import class_counts, unscorable, without_scores
from rkdo_dist.rundir import SCORE_TITLES
from tests.conftest import SMALL
from tests.jobs import command
from tests.pictures import image_folder, picture

SIZE = ["train.global_batch=8", "train.micro_batch=4", "train.batches_per_epoch=2", "evaluate.at_end=true"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RKDO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small.yaml").write_text(SMALL)
    return str(tmp_path / "small.yaml")


def _evaluated(tmp_path: Path, config: str, source: Path, *settings: str) -> tuple[str, dict]:
    code, text = command(["train", config, *SIZE, f"data.source={source}", f"run.dir={tmp_path / 'run'}", *settings])
    assert code == 0, text
    return text, json.loads((tmp_path / "run" / "evaluations" / "2.json").read_text())


@pytest.mark.parametrize("protocol", ["full", "paper"])
def test_a_flat_folder_without_labels(tmp_path: Path, config: str, protocol: str) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for k in range(20):
        (flat / f"{k}.jpg").write_bytes(picture(k))
    text, found = _evaluated(tmp_path, config, flat, f"evaluate.protocol={protocol}")
    before, _, after = text.partition("step 2/2")
    assert "evaluation without labels (there is no split 'test')" in before
    assert "no scores that need labels" in after
    assert found["protocol"] == protocol
    assert {found[name] for name in SCORE_TITLES} == {None}
    assert found["yardsticks"]["infonce"] > 0
    assert 1 <= found["yardsticks"]["effective_rank"] <= 16
    code, text = command(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")])
    assert code == 0, text
    assert "effective rank" in (tmp_path / "report.html").read_text()
    code, text = command(["evaluate", str(tmp_path / "run")])
    assert code == 0, text


def test_splits_without_labels(tmp_path: Path, config: str) -> None:
    for split, count in (("train", 20), ("test", 9)):
        (tmp_path / "f" / split).mkdir(parents=True)
        for k in range(count):
            (tmp_path / "f" / split / f"{k}.png").write_bytes(picture(k, kind="PNG"))
    text, found = _evaluated(tmp_path, config, tmp_path / "f")
    assert "the split 'test' has no labels" in text.partition("step 2/2")[0]
    assert found["yardsticks"]["pairs"] == 9
    assert found["unscored"] == "the split 'test' has no labels"


def test_labels_that_do_not_suffice_are_no_failure(tmp_path: Path, config: str) -> None:
    text, found = _evaluated(tmp_path, config, image_folder(tmp_path / "one", train=18, test=8, classes=("cat",)))
    assert found["unscored"] == "the samples have one class only"
    assert found["linear_accuracy"] is None
    assert "done" in text


def test_a_split_that_was_asked_for_is_missed_before_the_first_step(tmp_path: Path, config: str) -> None:
    folder = image_folder(tmp_path / "f", train=18, test=6)
    for setting in ("evaluate.test_split=valid", "evaluate.train_split=nope"):
        run = tmp_path / setting
        code, text = command(
            ["train", config, *SIZE, f"data.source={folder}", f"run.dir={run}", setting, "evaluate.protocol=full"]
        )
        assert code == 2
        assert "has no split" in text
        assert not (run / "metrics.jsonl").exists()


def test_what_labels_allow() -> None:
    import numpy as np

    two, none, few = np.array([0, 1] * 10), np.full(20, -1), np.array([0, 1, 1, -1, -1])
    two, none, few, one = (class_counts(labels) for labels in (two, none, few, np.zeros(20, int)))
    assert unscorable(two) is None
    assert unscorable(two, two) is None
    assert unscorable(none) == "the test split has no labels"
    assert unscorable(two, none) == "the train split has no labels"
    assert unscorable(one) == "the samples have one class only"
    assert unscorable(few, two) == "the test split has 3 labelled samples only"
    fields = without_scores("full", "why")
    assert fields["unscored"] == "why"
    assert fields["knn_accuracy_backbone"] is None
