"""NaN in an embedding or a gradient on one rank: all ranks take the same decision, and no weight ever becomes NaN."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rkdo_dist.training.step import Step
from tests.jobs import command, fingerprint, metrics, run_of
from tests.ranks import run_ranks

BAD_LANE = 3  # the last rank's


def _poisoned(rank: int, world: int, arguments: list[str], kind: str, bad_steps: list[int]) -> tuple[int, str]:
    """`rkdo train` where one lane of some steps has a NaN, in its images or in its gradient alone."""
    whole = Step._embed

    def embed(self, lane, number, at, again=False):  # type: ignore[no-untyped-def]
        found = whole(self, lane, number, at, again)
        if at.step in bad_steps and at.first_lane + number == BAD_LANE:
            if kind == "embedding":
                return type(found)(found.u * float("nan"), found.v, found.statistics)
            found.u.register_hook(lambda gradient: gradient * float("inf"))
        return found

    Step._embed = embed  # type: ignore[method-assign]
    try:
        return command(arguments)
    finally:
        Step._embed = whole  # type: ignore[method-assign]


@pytest.mark.parametrize("reduction", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["embedding", "gradient"])
def test_one_bad_lane_stops_all_ranks_and_is_named(small: list[str], kind: str, reduction: str) -> None:
    run = run_of(small)
    arguments = [*small, f"run.reduction={reduction}"]
    answers = run_ranks(_poisoned, 2, arguments, kind, [3])
    for code, text in answers:
        assert code == 2
        words = " ".join(text.split())
        assert "step 4 is not finite" in words
        assert "train.skip_nonfinite" in words
        assert "rank 1" in words or reduction == "fast"
        assert "lane 3" in words or reduction == "fast"
    assert len(metrics(run)) == 3
    assert all(torch.isfinite(t).all() for t in load_file(run / "checkpoints" / "2" / "model.safetensors").values())


@pytest.mark.parametrize("kind", ["embedding", "gradient"])
def test_skipping_is_the_same_on_any_ranks_and_leaves_finite_numbers(small: list[str], kind: str) -> None:
    run = run_of(small)
    arguments = [*small, "train.skip_nonfinite=2"]
    assert _poisoned(0, 1, arguments, kind, [1, 2])[0] == 0
    two = run.with_name("two")
    assert [c for c, _ in run_ranks(_poisoned, 2, [*arguments, f"run.dir={two}"], kind, [1, 2])] == [0, 0]
    assert fingerprint(run, 6) == fingerprint(two, 6)
    records = metrics(run)
    assert [r["loss"] is None for r in records] == [False, True, True, False, False, False]
    assert "not finite" in records[1]["skipped"]
    for name in ("model", "optimizer"):
        tensors = load_file(run / "checkpoints" / "6" / f"{name}.safetensors")
        assert all(torch.isfinite(t).all() for t in tensors.values())


def test_too_many_in_a_row_stop_the_run_also_across_a_restart(small: list[str]) -> None:
    run = run_of(small)
    arguments = [*small, "train.skip_nonfinite=2", "train.checkpoint_every=1"]
    assert _poisoned(0, 1, [*arguments, "train.max_steps=3"], "embedding", [1, 2])[0] == 0
    code, text = _poisoned(0, 1, [*arguments, "run.resume=auto"], "embedding", [1, 2, 3])
    assert code == 2
    assert "step 4" in " ".join(text.split())
    assert len(metrics(run)) == 3
