"""Files and checkpoints of the first edition are read: its settings under their names of now."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from rkdo_dist import config as configuration
from rkdo_dist.config import ConfigError
from rkdo_dist.config import former as former_settings
from rkdo_dist.config.former import FORMER
from tests.jobs import command, metrics

# `digest` of the first edition for all defaults, and for one change each; as that edition printed them.
DIGESTS = {
    (): "7c7fb5612ece2ee5374c65a6f3d47bf4ece672a3fc00708306517045605ac2dc",
    ("field.exchange=ring", "run.reduction=fast"): "557dc4baa0d0",
    ("field.symmetric=true",): "833216048c39",
    ("encoder.views=apart",): "cf4ea926e55d",
}


@pytest.mark.parametrize(("former", "now"), [
    ("field.exchange=ring run.reduction=fast", "run.reduction=ring"),
    ("field.exchange=ring run.reduction=ring", "run.reduction=ring"),
    ("field.symmetric=true", "field.pairing=symmetric"),
    ("field.symmetric=true field.pairing=cross", "field.pairing=symmetric"),
    ("encoder.views=apart", "train.views=apart"),
])  # fmt: skip
def test_a_renamed_setting_works_and_says_its_new_name(former: str, now: str, caplog: pytest.LogCaptureFixture) -> None:
    base = configuration.Config()
    former_settings._said.clear()
    with caplog.at_level(logging.WARNING):
        assert _tree(former) == configuration.change(base, [now])
        assert configuration.change(base, former.split()) == configuration.change(base, [now])
    assert len(caplog.messages) == 1  # once a process
    assert former.split("=")[0] in caplog.text
    assert now in caplog.text


def _tree(words: str) -> configuration.Config:
    tree: dict[str, dict[str, object]] = {}
    for word in words.split():
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = yaml.safe_load(value)
    return configuration.from_tree(tree)


def test_the_uniform_share_in_a_file_that_a_run_wrote_was_that_of_icon_alone() -> None:
    written = {"coupling": 0.5, "debias": 0.2, "switch_at": 0.5}
    assert configuration.from_tree({"field": {"objective": "rkdo", **written}}).field.debias is None
    assert configuration.from_tree({"field": {"objective": "icon", **written}}).field.debias == 0.2
    assert configuration.from_tree({"field": {"objective": "rkdo", "switch_to": "icon", **written}}).field.debias == 0.2
    assert configuration.from_tree({"field": {"objective": "rkdo", "debias": 0.2}}).field.debias == 0.2  # said by hand
    assert configuration.from_tree({"field": {"supervisor": None, **written}}).field.debias == 0.2  # written now


def test_an_override_by_a_former_name_changes_what_a_file_says() -> None:
    ring = configuration.change(configuration.Config(), ["run.reduction=ring", "train.views=apart"])
    back = configuration.change(ring, ["field.exchange=gather", "encoder.views=together"])
    assert (back.run.reduction, back.train.views) == ("fast", "together")
    same = configuration.change(ring, ["field.symmetric=false"])
    assert same.field.pairing == "cross"


@pytest.mark.parametrize("key", FORMER)
def test_a_former_default_is_accepted_without_a_word(key: str, caplog: pytest.LogCaptureFixture) -> None:
    section, _, name = key.partition(".")
    with caplog.at_level(logging.WARNING):
        assert configuration.from_tree({section: {name: FORMER[key].default}}) == configuration.Config()
    assert not caplog.messages


@pytest.mark.parametrize(("words", "message"), [
    ("field.exchange=ring", r"field.exchange=ring contradicts run.reduction=exact"),
    ("field.symmetric=true field.pairing=joint", r"field.symmetric=True contradicts field.pairing=joint"),
    ("encoder.views=apart train.views=together", r"encoder.views=apart contradicts train.views=together"),
    ("evaluate.neighbours=7", r"evaluate.neighbours is no longer a setting, it is always 5"),
    ("field.exchange=rign", r"field.exchange=rign is unknown.*run.reduction"),
])  # fmt: skip
def test_what_cannot_be_meant_any_more_is_named(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _tree(words)


@pytest.mark.parametrize("former", DIGESTS, ids=lambda words: " ".join(words) or "defaults")
def test_digests_are_those_of_the_first_edition(former: tuple[str, ...]) -> None:
    assert configuration.digest_of_first_edition(_tree(" ".join(former))).startswith(DIGESTS[former])


def test_a_run_of_the_first_edition_goes_on(small: list[str]) -> None:
    run = Path(small[-1].removeprefix("run.dir="))
    assert command([*small, "train.max_steps=2", "train.views=apart"])[0] == 0
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["encoder"]["views"] = tree["train"].pop("views")
    for key, former in FORMER.items():
        section, _, name = key.partition(".")
        tree[section].setdefault(name, former.default)
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    code, text = command([*small, "train.max_steps=3", "encoder.views=apart", "run.resume=auto"])
    assert code == 0, text
    assert len(metrics(run)) == 3
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["views"] == "apart"
