"""Configuration: files, overrides, and errors that name the key and the remedy."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from rkdo_dist import config as c
from rkdo_dist import parts

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name in ("configs", "paper"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("field:\n  objective: icon\ntrain:\n  learning_rate: 1e-4\n")
    return path


def test_file_and_overrides(file: Path) -> None:
    config = c.load(file, ["train.epochs=7", "views.crop_scale=[0.5, 1]", "train.max_steps=null", "run.seed=5"])
    assert config.field.objective == "icon"
    assert config.train.learning_rate == pytest.approx(1e-4)  # YAML reads 1e-4 as text
    assert (config.train.epochs, config.views.crop_scale, config.train.max_steps, config.run.seed) == (
        7,
        (0.5, 1.0),
        None,
        5,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_config_loads(path: Path) -> None:
    config = c.load(path)
    assert config.field.objective == ("icon" if "icon" in path.stem else "rkdo")
    assert config.data.shards == f"data/{path.stem.split('-')[0]}"
    c.check_world(config, 1)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "study").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_study_config_loads(path: Path) -> None:
    c.check_world(c.load(path), 1)


def test_the_names_that_scripts_rely_on_are_shipped() -> None:
    names = {str(p.relative_to(ROOT / "configs")) for p in CONFIGS}
    paper = {"paper/cifar10-rkdo.yaml", "paper/cifar10-icon.yaml"}
    assert names == {"digits-rkdo.yaml", "cifar10-rkdo.yaml", "cifar100.yaml", "stl10.yaml"} | paper
    others = [p for p in (ROOT / "configs").rglob("*") if p.is_file() and p.parent.name != "recipes"]
    assert len(others) <= 15  # each the only copy of what it says; recipes are judged by tests/test_recipes.py


def test_the_resolved_file_says_the_same(file: Path, tmp_path: Path) -> None:
    config = c.load(file, ["views.jitter=[0.1,0.2,0.3,0.4]", "data.image_size=32"])
    again = tmp_path / "resolved.yaml"
    again.write_text(c.to_yaml(config))
    assert c.load(again) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epohcs=5", ["train.epohcs", "train.epochs"]),
        ("trian.epochs=5", ["trian", "train"]),
        ("epochs=5", ["train.epochs=5"]),
        ("train.epochs=many", ["train.epochs", "whole number", "many"]),
        ("train.epochs=2.5", ["train.epochs", "2.5"]),
        ("train.recompute=1", ["train.recompute", "true or false"]),
        ("field.objective=rkd", ["field.objective", "rkdo"]),
        ("field.temperature=0", ["field.temperature", "at least 0.0001", "got 0"]),
        ("field.temperature=-1", ["field.temperature"]),
        ("field.temperature=.nan", ["field.temperature"]),
        ("field.coupling=1.5", ["field.coupling", "[0, 1]"]),
        ("field.coupling=-0.1", ["field.coupling", "[0, 1]"]),
        ("field.cooling=1", ["field.cooling"]),
        ("field.depth=0", ["field.depth"]),
        ("train.global_batch=100", ["train.global_batch", "train.micro_batch"]),
        ("train.global_batch=1", ["train.global_batch"]),
        ("views.crop_scale=[0.9,0.2]", ["views.crop_scale"]),
        ("views.crop_scale=0.2", ["views.crop_scale", "list"]),
        ("views.jitter=[0.4,0.4,0.4,0.9]", ["views.jitter", "hue"]),
        ("views.jitter=[-1,0,0,0]", ["views.jitter", "-1"]),
        ("views.flip=1.1", ["views.flip", "1.1"]),
        ("views.std=0", ["views.std", "at least 0.001"]),
        ("data.image_size=0", ["data.image_size", "at least 1"]),
        ("encoder.embedding_dim=0", ["encoder.embedding_dim", "at least 1"]),
        ("encoder.backbone=resnet81", ["encoder.backbone", "resnet81", "resnet18"]),
        ("encoder.backbone=[vgg11]", ["encoder.backbone", "text"]),
        ("field.coupling_end=-1", ["field.coupling_end", "[0, 1]", "-1"]),
        ("field.debias=2", ["field.debias", "[0, 1]"]),
        ("train.learning_rate=0", ["train.learning_rate", "above 0"]),
        ("train.learning_rate=.inf", ["train.learning_rate", "inf"]),
        ("train.evaluate_at=[1,0]", ["train.evaluate_at", "at least 1", "got 0"]),
        ("run.threads=0", ["run.threads", "at least 1"]),
        ("field.switch_at=2", ["field.switch_at", "at least 0 and at most 1"]),
        ("run.dir=5", ["run.dir", "text"]),
        ("train.epochs=[", ["train.epochs"]),
    ],
)
def test_mistakes_are_named(file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(c.ConfigError) as caught:
        parts.check(c.load(file, [override]))
    for word in words:
        assert word in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(c.ConfigError, match=r"nowhere\.yaml"):
        c.load(tmp_path / "nowhere.yaml")
    for text, word in (
        ("train: [1", "valid"),
        ("- a", "sections"),
        ("train: 5", "mapping"),
        ("train:\n  epochs: 1\n  epochs: 2", "twice"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(c.ConfigError, match=word):
            c.load(path)


def test_yaml_cannot_execute(tmp_path: Path) -> None:
    path, canary = tmp_path / "bad.yaml", tmp_path / "canary"
    path.write_text(f"run:\n  dir: !!python/object/apply:os.system ['touch {canary}']\n")
    with pytest.raises(c.ConfigError):
        c.load(path)
    assert not canary.exists()


def test_digest_ignores_what_does_not_affect_results(file: Path) -> None:
    base = c.digest(c.load(file))
    assert base == c.digest(
        c.load(file, ["data.workers=3", "run.dir=x", "train.recompute=true", "train.checkpoint_every=2"])
    )
    assert base != c.digest(c.load(file, ["run.seed=1"]))
    assert base != c.digest(c.load(file, ["train.micro_batch=32"]))


@pytest.mark.parametrize("world", [3, 8])
def test_ranks_must_divide_the_lanes(file: Path, world: int) -> None:
    with pytest.raises(c.ConfigError, match=f"{world} ranks.*4 lanes"):
        c.check_world(c.load(file), world)


def test_the_error_suggests_a_micro_batch_that_works(file: Path) -> None:
    with pytest.raises(c.ConfigError, match=r"train\.micro_batch=32"):
        c.check_world(c.load(file), 8)
    c.check_world(c.load(file, ["train.micro_batch=32"]), 8)


def test_exact_reduction_needs_a_power_of_two(file: Path) -> None:
    twelve = ["train.global_batch=384", "train.micro_batch=32"]
    with pytest.raises(c.ConfigError, match="power of two"):
        c.check_world(c.load(file, twelve), 3)
    c.check_world(c.load(file, [*twelve, "run.reduction=fast"]), 3)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "more than 10000 values"),
        (BOMB + "train: {epochs: *i}\n", "more than 10000 values"),
        ("train: &t {epochs: *t}\n", "more than 10000 values"),
        ("train: {epochs: " + "[" * 3000 + "]" * 3000 + "}\n", "nested too deeply"),
        ("# " + "x" * (1 << 20), "more than 1048576 bytes"),
    ],
    ids=["bomb", "bomb in a section", "recursive", "nested", "long"],
)
def test_a_configuration_that_would_fill_the_memory_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(c.ConfigError, match=said) as error:
        c.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 400


def test_aliases_within_reason_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: {epochs: &n 3, evaluate_at: [1, *n]}\n")
    assert c.load(path).train.evaluate_at == (1, 3)


def test_a_pipe_or_a_device_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.yaml")
    for path in (tmp_path / "c.yaml", Path("/dev/zero")):
        with pytest.raises(c.ConfigError, match=f"cannot read the configuration {path}: it is a pipe or a device"):
            c.load(path)
