"""The settings: the list of them is frozen here, documented in docs/settings.md and shown by the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rkdo_dist import config as configuration
from rkdo_dist.config import ConfigError, listing
from tests.jobs import command

ROOT = Path(__file__).resolve().parent.parent
# A new setting is one more thing for everybody to know: is there none that it could replace, or a value that fits all?
SETTINGS = {
    "field": "objective supervisor delivery features walk recursion columns queue relation relation_weight "
    "relation_schedule relation_end relation_start_epoch teacher snapshot_every relation_momentum relation_mean "
    "teacher_temperature neighbours mutual confidence affinity sigma degrees_of_freedom learned_share normaliser "
    "stored store depth coupling coupling_schedule coupling_end coupling_start_epoch coupling_every temperature "
    "learn_temperature cooling clock pairing supervisor_grad debias switch_to switch_at",
    "data": "source shards allow_remote split image_size shuffle_buffer workers on_corrupt",
    "views": "crop_scale flip jitter grayscale blur solarize teacher mean std",
    "encoder": "backbone stem head embedding_dim head_width head_depth weights freeze",
    "train": "global_batch micro_batch epochs batches_per_epoch max_steps views recompute compile skip_nonfinite "
    "optimizer learning_rate scale_lr weight_decay decay_norms clip_gradient schedule warmup_steps warmup_epochs ema "
    "early_stop_slope early_stop_window checkpoint_every keep_checkpoints evaluate_every evaluate_at",
    "evaluate": "protocol train_split test_split at_end weights probes probe_every",
    "run": "dir seed resume branch reduction threads timeout matmul_precision trackers",
}


def test_the_list_of_settings_is_frozen() -> None:
    frozen = [f"{section}.{name}" for section, names in SETTINGS.items() for name in names.split()]
    assert list(configuration.flatten(configuration.Config())) == frozen


def test_every_setting_says_what_it_does() -> None:
    for section in dataclasses.fields(configuration.Config):
        for item in dataclasses.fields(type(section.default)):
            assert len(item.metadata["about"]) > 8, item.name


def test_the_page_of_settings_is_fresh() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == listing.as_markdown() + "\n", "run `make settings`"


def test_the_command_line_shows_settings_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text = command(["settings"])
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    keys = [line.split("=")[0].strip() for line in text.splitlines() if line.startswith("  ") and "=" in line[:30]]
    assert keys == list(configuration.flatten(configuration.Config()))
    code, helped = command(["train", "--help"])
    assert code == 0
    assert text.strip() in helped
    assert max(map(len, helped.splitlines())) <= 80


def test_the_command_line_finds_settings_by_name_and_by_what_they_do() -> None:
    assert command(["settings", "CHECKPOINTS"])[1].split()[0] == "train.checkpoint_every=null"
    assert "train.warmup_steps=0" in command(["settings", "WARM-UP"])[1]
    code, text = command(["settings", "tempreature"])
    assert code == 2
    assert "did you mean 'field.temperature'" in text
    assert command(["settings", "--markdown"])[1] == listing.as_markdown() + "\n"


@pytest.mark.parametrize(("words", "both"), [
    ("train.global_batch=100 train.micro_batch=64", ["train.global_batch=100", "train.micro_batch=64"]),
    ("field.coupling_start_epoch=11 train.epochs=10", ["field.coupling_start_epoch", "11", "train.epochs=10"]),
    ("train.warmup_steps=5 train.warmup_epochs=1", ["train.warmup_steps=5", "train.warmup_epochs=1"]),
    ("train.warmup_epochs=11 train.epochs=10", ["train.warmup_epochs", "11", "train.epochs=10"]),
    ("train.evaluate_at=[1,11] train.epochs=10", ["train.evaluate_at", "11", "train.epochs=10"]),
    ("run.dir=runs/a run.resume=runs/a", ["run.resume=runs/a", "run.dir", "run.resume=auto"]),
    ("field.recursion=persistent field.objective=icon", ["field.recursion=persistent", "field.objective=icon"]),
    ("field.recursion=persistent field.pairing=joint field.columns=bank", ["field.pairing=joint", "columns=batch"]),
    ("field.recursion=persistent field.pairing=symmetric", ["field.recursion=persistent", "field.pairing=cross"]),
    ("field.recursion=persistent run.reduction=ring", ["field.recursion=persistent", "run.reduction=exact"]),
    ("field.recursion=persistent data.on_corrupt=skip", ["field.recursion=persistent", "data.on_corrupt=abort"]),
    ("field.symmetric=true field.pairing=joint", ["field.symmetric", "field.pairing=joint"]),
    ("field.exchange=ring run.reduction=exact", ["field.exchange=ring", "run.reduction=exact"]),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_one_line_that_names_both(words: str, both: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.change(configuration.Config(), words.split())
    assert "\n" not in str(caught.value)
    for word in both:
        assert word in str(caught.value)


def test_a_stem_that_a_backbone_does_not_have_names_both() -> None:
    from rkdo_dist import parts

    with pytest.raises(ConfigError, match=r"^encoder.stem \"cifar\" exists for ResNets only .*, not for 'vgg11'"):
        parts.check(configuration.change(configuration.Config(), ["encoder.stem=cifar", "encoder.backbone=vgg11"]))
