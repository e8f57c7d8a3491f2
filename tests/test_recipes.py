"""Published recipes: each loads, says its source and trains; a whole recipe has the same bits on any ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rkdo_dist import checkpoint, parts
from rkdo_dist import config as configuration
from tests.jobs import command, fingerprint, metrics, on_ranks, run_of
from tests.ranks import Ranks
from tests.test_restart import _killed_at

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
# Two steps of any of them in a second: another network and other images, a hundredth of the batch.
TINY = ["encoder.backbone=cifar_resnet8", "encoder.stem=imagenet", "encoder.embedding_dim=16", "data.image_size=null",
        "train.global_batch=16", "train.micro_batch=8", "train.epochs=20", "train.batches_per_epoch=1",
        "train.max_steps=2", "evaluate.at_end=false", "data.workers=0"]  # fmt: skip


def test_all_of_them_are_here() -> None:
    assert [path.stem for path in RECIPES] == ["clip", "moco", "rkdo", "simclr", "supcon"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_says_its_source_and_trains(path: Path, digits: Path, tmp_path: Path) -> None:
    text = path.read_text()
    for words in ("arXiv", "# Source: ", "# What differs: "):
        assert words in text, words
    config = configuration.load(path)
    parts.check(config)
    configuration.check_world(config, 2)
    assert config.run.dir == f"runs/recipes/{path.stem}"
    words = [*TINY, f"data.shards={digits}", f"run.dir={tmp_path / 'run'}"]
    code, told = command(["train", str(path), *words])
    assert code == 0, told
    records = metrics(tmp_path / "run")
    assert len(records) == 2
    assert all(np.isfinite([record["loss"], record["gradient_norm"]]).all() for record in records)


EVERYTHING = ["train.optimizer=lars", "train.learning_rate=0.3", "train.scale_lr=sqrt", "train.warmup_epochs=0.5",
              "train.clip_gradient=0.01", "train.ema=0.8", "views.blur=[1.0,0.1]", "views.solarize=[0.0,0.2]",
              "views.mean=[0.4,0.5,0.6]", "field.learn_temperature=true", "field.temperature=0.3"]  # fmt: skip


def test_a_whole_recipe_has_the_same_bits_on_any_ranks_and_after_a_kill(small: list[str], tmp_path: Path) -> None:
    """One process, against two that are killed as they save, and four that go on from there."""
    one, other = tmp_path / "one", tmp_path / "other"
    words = [*small, *EVERYTHING]
    code, text = command([*words, f"run.dir={one}"])
    assert code == 0, text
    words += [f"run.dir={other}", "run.resume=auto", "run.timeout=20"]
    with Ranks(_killed_at, 2, (words, "rkdo_dist.checkpoint.store:_put_in_place", 2, (0,)), timeout=60) as ranks:
        ranks.answers()
    saved = checkpoint.load_latest(other / "checkpoints")
    assert saved is not None
    assert saved.step == 2
    assert saved.parts == ("average", "temperature")
    assert [code for code, _ in on_ranks(4, words)] == [0] * 4
    assert fingerprint(one, 6) == fingerprint(other, 6)
    assert metrics(one) == metrics(other)
    for part in saved.parts:
        left, right = (load_file(run / "checkpoints" / "6" / "parts" / f"{part}.safetensors") for run in (one, other))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), part
    assert all(record["gradient_norm"] > 0.01 for record in metrics(one))  # every step was clipped
    assert len({record["temperature"] for record in metrics(one)}) == 6


@pytest.mark.parametrize(("words", "told"), [
    ("views.blur=1.5", "views.blur must be a probability, got 1.5"),
    ("views.blur=[0.1,0.2,0.3]", "views.blur must be one number or 2, one for each view, got [0.1, 0.2, 0.3]"),
    ("views.solarize=[0.5,-1]", "views.solarize must be a probability, got (0.5, -1.0)"),
    ("views.mean=[0.5,0.5]", "views.mean must be one number or 3, one for each channel, got [0.5, 0.5]"),
    ("views.std=[1,0,1]", "views.std must be at least 0.001 and at most 1000, got 0.0"),
    ("views.mean=grey", "views.mean must be a number, got 'grey'"),
    ("train.clip_gradient=0", "train.clip_gradient must be at least 1e-09 and at most 1e+09, got 0"),
    ("train.optimizer=lasr", "unknown value 'lasr' for train.optimizer; did you mean 'lars'?"),
    ("train.scale_lr=root", "unknown value 'root' for train.scale_lr"),
    ("train.warmup_epochs=-1", "train.warmup_epochs must be at least 0, got -1"),
    ("field.temperature=0.001 field.learn_temperature=true", "keeps the temperature at 0.01 at least"),
])  # fmt: skip
def test_a_mistake_is_one_line(words: str, told: str, small: list[str]) -> None:
    code, text = command([*small, *words.split()])
    assert code == 2, text
    assert told in " ".join(text.split())
    assert "Traceback" not in text
    assert not run_of(small).exists()
