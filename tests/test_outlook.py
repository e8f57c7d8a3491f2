"""What may be expected of supervisors: dilution, and rows that forget their positive."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rkdo_dist import config as configuration
from rkdo_dist.training.outlook import expectations, positive_left
from tests.jobs import command

PERSISTENT = ["field.recursion=persistent", "train.global_batch=128", "train.micro_batch=128"]


def settings(*changes: str) -> configuration.Config:
    return configuration.change(configuration.Config(), [*PERSISTENT, *changes])


def test_the_rows_of_the_visits_study_are_warned_of_and_no_others() -> None:
    """2,000 images, twelve visits: 0.5 harmed; 0.1, and 0.5 over four visits of 6,000 images, did not."""
    harmful = settings("train.epochs=12", "field.coupling=0.5")
    assert positive_left(harmful, 2000, 15) == pytest.approx(0.5 ** (12 * 15 * 128 / 2000))
    said = expectations(harmful, 2000, 15)
    assert len(said) == 2
    assert "6.35%" in said[0]
    assert "94.0%" in said[0]
    assert said[1].startswith("forgetting: field.coupling=0.5 leaves 0.00034 ")
    for gentle in (
        settings("train.epochs=12", "field.coupling=0.1"),
        settings("train.epochs=12", "field.coupling=0.5", "field.coupling_start_epoch=8"),
    ):
        assert [line.split(":")[0] for line in expectations(gentle, 2000, 15)] == ["dilution"]
    assert expectations(configuration.change(configuration.Config(), ["train.epochs=12"]), 2000, 15) == []


def test_dilution_is_what_random_batches_keep() -> None:
    """Counted: the mass of a row, spread over others, that falls into a batch with its sample."""
    n, batch = 200, 32
    generator = torch.Generator().manual_seed(3)
    row = torch.rand(n, generator=generator, dtype=torch.float64)
    row[0] = 0
    row /= row.sum()
    kept = np.mean([float(row[torch.randperm(n - 1, generator=generator)[: batch - 1] + 1].sum()) for _ in range(4000)])
    assert kept == pytest.approx((batch - 1) / (n - 1), rel=0.02)
    said = expectations(settings("train.global_batch=32", "train.micro_batch=32", "field.coupling=0.1"), n, 6)
    assert f"{(batch - 1) / (n - 1):.2%}" in said[0]


def test_a_run_says_it_before_its_first_step(small: list[str]) -> None:
    code, text = command(
        [*small, "field.recursion=persistent", "field.coupling=0.9", "train.epochs=60", "train.max_steps=1"]
    )
    assert code == 0
    text = " ".join(text.split())
    assert "dilution: a batch of 32 out of 1,438 samples keeps 2.16%" in text
    assert text.index("forgetting: field.coupling=0.9") < text.index("step 1/1")


def test_a_warm_up_that_a_run_does_not_live_to_see_is_said(small: list[str]) -> None:
    words = [*small, "train.max_steps=2", "train.warmup_steps=3"]
    code, text = command(words)
    assert code == 0, text
    assert "the warm-up of 3 steps is longer than the run of 2" in " ".join(text.split())
