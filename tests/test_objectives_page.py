"""docs/objectives.md: every cell of I-Con's table that says settings trains a step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rkdo_dist.field.presets import PRESETS, choices
from tests.jobs import command, metrics, run_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "objectives.md"


def cells() -> list[str]:
    """The settings of the table's last column."""
    table = PAGE.read_text(encoding="utf-8").partition("## I-Con's table")[2]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [match[1] for row in rows if (match := re.match(r"`(field\.\S.*?)`", row.split(" | ")[-1]))]


def test_the_page_names_what_there_is() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(cells()) >= 15
    assert len(set(cells())) == len(cells())
    for name in ("infonce", "simclr", "clip", "icon", "supcon", "sne", "t-simclr", "clusters"):
        assert f"field.objective={name}`" in text, name
        assert name in choices()
    for affinity in {preset.affinity for preset in PRESETS.values()}:
        assert f"| {affinity} |" in text


@pytest.mark.parametrize("settings", cells())
def test_every_cell_that_says_settings_trains_a_step(settings: str, small: list[str]) -> None:
    code, text = command([*small, *settings.split(), "train.max_steps=1", "evaluate.at_end=false"])
    assert code == 0, text
    (record,) = metrics(run_of(small))
    assert record["loss"] > 0
