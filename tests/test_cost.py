"""The cost model: its bytes are the ledger's, its constants are found again, its projections follow the formulas."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rkdo_dist.measure.ledger import rounds, sent_bytes
from rkdo_dist.measure.wire import StepShape, step_payloads
from rkdo_dist.studies import cost
from rkdo_dist.studies.cost import Point
from rkdo_dist.studies.links import interconnect
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
        point = Point.of(facts)
        assert cost.bytes_agree(point), facts["wire"]
        assert bool(point.wire) == (point.shape.world > 1)


def test_wrong_formulas_do_not(strong: list[dict[str, Any]]) -> None:
    """Controls: each number of a shape matters."""
    for facts in strong:
        point = Point.of(facts)
        wrong = ["dimension", "parameters", "channels", "report", "lanes"]
        wrong += ["walks"] if point.way == "ring" else ["column_views"]
        for name in wrong if point.shape.world > 1 else ():
            larger = {name: getattr(point.shape, name) * 2}
            other = dataclasses.replace(point, shape=dataclasses.replace(point.shape, **larger))
            assert not cost.bytes_agree(other), (point.way, name)


@pytest.mark.parametrize(
    ("world", "ways", "changes"),
    [
        (4, WAYS, ["train.global_batch=128"]),  # weak: as many lanes on a rank as one had alone
        (2, WAYS, ["train.global_batch=64", "field.pairing=joint", "train.views=apart"]),
        (2, "fast", ["field.pairing=symmetric", "encoder.batch_norm=sync", "train.recompute=true"]),
        (2, "ring", ["field.objective=icon", "field.temperature=0.02", "encoder.batch_norm=sync"]),
    ],
)
def test_they_agree_in_other_shapes(
    small: list[str], tmp_path: Path, world: int, ways: str, changes: list[str]
) -> None:
    for facts in measured(small, world, tmp_path, *changes, ways=ways):
        assert cost.bytes_agree(Point.of(facts)), (facts["way"], facts["wire"])


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


SHAPE = StepShape(
    world=1, lanes=64, micro_batch=16, dimension=64, parameters=1_000_000, channels=5000, sync_channels=(),
    column_views=1, report=9, walks=2, forwards=1, strategy="single", reduction="exact", exchange="gather",
    recompute=False,
)  # fmt: skip
TRUTH = {
    "t_data": 2e-5, "t_pair": 3e-3, "t_entry": 8e-9, "t_visit": 2e-4, "t_optimizer": 4e-9, "t_copy": 2e-9,
    "alpha": 5e-5, "beta": 1e-9, "t_other": 1e-3,
}  # fmt: skip


def made_point(way: str, world: int, noise: float = 0.0) -> Point:
    """A point that the model explains, but for `noise`."""
    reduction, exchange = {"exact": ("exact", "gather"), "fast": ("fast", "gather"), "ring": ("fast", "ring")}[way]
    shape = dataclasses.replace(SHAPE, reduction=reduction, exchange=exchange).at(world, 64)
    wire = cost.wire_of(step_payloads(shape))
    phases = cost.CostModel(TRUTH).phases(shape, max(1.0, world / 4), wire)
    phases = {name: value * (1 + noise) for name, value in phases.items()}
    slowdown = max(1.0, world / 4)
    probe = (512, 4096, slowdown * (512 * 4096 * TRUTH["t_entry"] + TRUTH["t_visit"]))
    return Point(way, shape, slowdown, phases, sum(phases.values()), wire, probe)


POINTS = [made_point(way, world) for way in ("exact", "fast", "ring") for world in (1, 2, 4, 8)]


def test_the_constants_are_found_again() -> None:
    found = cost.fit(POINTS).constants
    for name, value in TRUTH.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_a_point_left_out_is_predicted_and_an_odd_one_is_noticed() -> None:
    errors = cost.left_out(POINTS)
    assert all(error is not None and abs(error) < 0.01 for error in errors)
    odd = [*POINTS[:5], made_point("fast", 2, noise=1.0), *POINTS[6:]]
    errors = cost.left_out(odd)
    assert errors[5] == pytest.approx(-0.5, abs=0.05)
    assert max(abs(e or 0) for n, e in enumerate(errors) if n != 5) < 0.2


def test_what_cannot_be_known_is_not_predicted() -> None:
    """One size above 1: without it nothing is known about exchange."""
    errors = cost.left_out([made_point("exact", 1), made_point("exact", 2)])
    assert errors[1] is None
    assert cost.left_out([made_point("exact", 1)]) == [None]
    with pytest.raises(ValueError, match="at least one"):
        cost.fit([])


def test_no_constant_is_negative() -> None:
    strange = [made_point("exact", world, noise=0.5 * (-1) ** n) for n, world in enumerate((1, 2, 4, 8))]
    assert min(cost.fit(strange).constants.values()) >= 0


def test_two_kinds_of_links() -> None:
    """The formulas written out for 16 devices in two nodes, large messages: bandwidth decides."""
    net = interconnect("nvlink+ib400")
    size = 16 * 10**9
    ring = net.seconds("all_reduce", size, 1, 16)
    assert ring == pytest.approx(2 * 15 / 16 * size / 400e9, rel=0.01)  # eight ports of 50 GB/s, below 450
    assert net.seconds("all_reduce", size, 1, 8) == pytest.approx(2 * 7 / 8 * size / 450e9, rel=0.01)
    assert net.seconds("all_gather", size, 1, 16) == pytest.approx(15 * size / 400e9, rel=0.01)
    exchange = net.seconds("all_to_all", size, 1, 16)
    assert exchange == pytest.approx(size / 16 * (7 / 450e9 + 8 / 50e9), rel=0.01)
    assert net.seconds("send", size, 1, 16) == pytest.approx(size / 50e9, rel=0.01)
    assert net.seconds("send", size, 1, 8) == pytest.approx(size / 450e9, rel=0.01)


def test_small_messages_cost_latency() -> None:
    net = interconnect("nvlink+ib400")
    assert net.seconds("all_reduce", 8, 1, 16) == pytest.approx(6.6e-6 + 2 * (14 * 0.6e-6 + 2.7e-6), rel=0.01)
    assert net.seconds("all_reduce", 16, 2, 16) == pytest.approx(2 * net.seconds("all_reduce", 8, 1, 16))
    assert net.seconds("all_reduce", 8, 1, 1) == 0
    with pytest.raises(ValueError, match=r"nvlink\+ib400"):
        interconnect("nvlink+tokenring")


def test_projections_keep_what_was_asked() -> None:
    model, base = cost.CostModel(TRUTH), made_point("fast", 2)
    strong = cost.project(model, base, [8, 64, 512], weak=False, links=interconnect("nvlink+ib400"))
    assert [(p.world, p.batch) for p in strong] == [(8, 1024), (64, 1024)]  # 64 lanes cannot serve 512
    weak = cost.project(model, base, [8, 64, 512], weak=True, links=interconnect("nvlink+ib400"))
    assert [(p.world, p.batch) for p in weak] == [(w, 512 * w) for w in (8, 64, 512)]
    assert all(0 < p.efficiency <= 1 for p in (*strong, *weak))
    slow = cost.project(model, base, [64], weak=True, links=interconnect("pcie4+eth25"))[0]
    assert slow.seconds > weak[1].seconds
    fast = cost.project(model, base, [64], weak=True, links=interconnect("nvlink+ib400"), speed=100)[0]
    assert fast.seconds < weak[1].seconds
    assert fast.efficiency < weak[1].efficiency  # the network has not become faster
    assert fast.sent == weak[1].sent == cost.sent(cost.wire_of(step_payloads(base.shape.at(64, 64 * 32))), 64)


def test_bytes_and_messages_of_the_textbook() -> None:
    assert sent_bytes("all_reduce", 100, 4) == 150
    assert sent_bytes("all_gather", 100, 4) == 300
    assert sent_bytes("all_to_all", 100, 4) == sent_bytes("reduce_scatter", 100, 4) == 75
    assert [rounds(op, 4) for op in ("all_reduce", "all_gather", "all_to_all", "send")] == [6, 3, 3, 1]
    assert all(sent_bytes(op, 100, 1) == rounds(op, 1) == 0 for op in ("all_reduce", "all_gather", "send"))
