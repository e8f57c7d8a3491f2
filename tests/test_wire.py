"""What a step sends: the formulas of `measure.wire` are the ledger's bytes, in every way and at every size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rkdo_dist.measure.ledger import sent_bytes
from rkdo_dist.measure.wire import bytes_agree
from rkdo_dist.training.shape import StepShape
from tests.jobs import command, on_ranks

WAYS = "exact,fast,ring"


def measured(small: list[str], world: int, folder: Path, *changes: str, ways: str = WAYS) -> list[dict[str, Any]]:
    """What `rkdo measure` finds on forked ranks."""
    out = folder / f"measured-{world}.json"
    arguments = ["measure", *small[1:], *changes, "--steps", "1", "--ways", ways, "--out", str(out)]
    answers = on_ranks(world, arguments) if world > 1 else [command(arguments)]
    assert all(code == 0 for code, _ in answers), answers
    points: list[dict[str, Any]] = json.loads(out.read_text())["points"]
    return points


def shape_of(facts: dict[str, Any]) -> StepShape:
    return StepShape(**facts["shape"])


@pytest.fixture(scope="module")
def strong(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> list[dict[str, Any]]:
    """One global batch of four lanes on 1, 2 and 4 ranks, in every way."""
    from tests.conftest import SMALL

    folder = tmp_path_factory.mktemp("strong")
    (folder / "small.yaml").write_text(SMALL)
    small = ["train", str(folder / "small.yaml"), f"data.shards={digits}"]
    return [point for world in (1, 2, 4) for point in measured(small, world, folder)]


def test_formula_and_ledger_agree_to_the_byte(strong: list[dict[str, Any]]) -> None:
    assert len(strong) == 9
    for facts in strong:
        assert bytes_agree(shape_of(facts), facts["wire"]), facts["wire"]
        assert bool(facts["wire"]) == (facts["world"] > 1)


def test_wrong_formulas_do_not(strong: list[dict[str, Any]]) -> None:
    """Controls: each number of a shape matters."""
    for facts in strong:
        shape = shape_of(facts)
        wrong = ["dimension", "parameters", "channels", "report", "lanes"]
        wrong += ["walks"] if facts["way"] == "ring" else ["column_views"]
        for name in wrong if shape.world > 1 else ():
            other = dataclasses.replace(shape, **{name: getattr(shape, name) * 2})
            assert not bytes_agree(other, facts["wire"]), (facts["way"], name)


@pytest.mark.parametrize(
    ("world", "ways", "changes"),
    [
        (4, WAYS, ["train.global_batch=128"]),  # weak: as many lanes on a rank as one had alone
        (2, WAYS, ["train.global_batch=64", "field.pairing=joint", "train.views=apart"]),
        (2, "fast", ["field.pairing=symmetric", "train.recompute=true"]),
        (2, "ring", ["field.objective=icon", "field.temperature=0.02"]),
    ],
)
def test_they_agree_in_other_shapes(
    small: list[str], tmp_path: Path, world: int, ways: str, changes: list[str]
) -> None:
    for facts in measured(small, world, tmp_path, *changes, ways=ways):
        assert bytes_agree(shape_of(facts), facts["wire"]), (facts["way"], facts["wire"])


def test_exact_sums_make_the_same_losses_at_every_size(strong: list[dict[str, Any]]) -> None:
    exact = [facts for facts in strong if facts["way"] == "exact"]
    assert len({json.dumps(facts["losses"]) for facts in exact}) == 1
    assert len({json.dumps(facts["batch_digests"]) for facts in strong}) == 1


def test_phases_add_up_to_the_step(strong: list[dict[str, Any]]) -> None:
    for facts in strong:
        assert all(seconds >= 0 for seconds in facts["phases"].values())
        assert facts["phases"]["forward/backward"] > 0
        # With one measured step the means over ranks add up to about rank zero's step.
        assert 0.3 < sum(facts["phases"].values()) / facts["seconds"] < 3
        assert len(facts["peak_bytes"]) == facts["world"]


def test_bytes_of_the_textbook() -> None:
    assert sent_bytes("all_reduce", 100, 4) == 150
    assert sent_bytes("all_gather", 100, 4) == 300
    assert sent_bytes("all_to_all", 100, 4) == sent_bytes("reduce_scatter", 100, 4) == 75
    assert all(sent_bytes(op, 100, 1) == 0 for op in ("all_reduce", "all_gather", "send"))
