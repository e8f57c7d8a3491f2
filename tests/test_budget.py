"""The budget of a step on an accelerator, counted on one that is not there (`tests.mock_device`).

Numbers are the most that is allowed; where they are above the goal, it stands beside them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch

from rkdo_dist.training import exact
from tests.device_steps import Case, of_a_lane, operators_of, second_step
from tests.mock_device import CUDA, by_file, mock_device

STEPS = [Case(w, r, c) for w in (1, 8) for r in ("exact", "fast") for c in (False, True)]
PERSISTENT = [
    Case(w, r, objective="persistent", rows=(columns, "cuda:0"))
    for w in (1, 8)
    for r in ("exact", "fast")
    for columns in ("batch", "bank")
]


def require(found: Counter[str], most: int, what: str) -> None:
    """Names every place if there are more than allowed."""
    total, places = sum(found.values()), "\n".join(f"{n:6d}  {place}" for place, n in found.most_common() if n)
    assert total <= most, f"{total} {what}, {most} are allowed:\n{places}"


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_step(case: Case) -> None:
    lane, rest = of_a_lane(case)
    require(lane.waits, 0, "synchronisations of a lane")
    require(rest.waits, 4, "synchronisations of a step")  # goal 2
    require(lane.collectives, 0, "collectives of a lane")
    require(rest.collectives, {1: 0, 8: {"exact": 6, "fast": 4}[case.reduction]}[case.world], "collectives of a step")
    assert all(entry.endswith(" cuda") for entry in rest.collectives), rest.collectives
    require(lane.unsafe + rest.unsafe, 0, "copies to the host that nothing waits for")
    again = 2 if case.recompute else 1
    pinned = Counter({place: n for place, n in lane.copies.items() if place.endswith("pinned")})
    draws = Counter({place: n for place, n in pinned.items() if place.startswith("data/pixels")})
    require(pinned - draws, again, "copies of images of a lane")
    require(draws, 2 * again, "copies of the draws of two views")  # goal 1 with the images
    require(lane.copies - pinned, 0, "copies from pageable memory of a lane")
    operators = operators_of(lane)
    assert operators["views"] <= 250 * again, operators
    assert operators["field"] <= 5, operators  # products, whose kernel a library chooses by their shape
    assert operators["step"] <= 85, operators


@pytest.mark.parametrize("case", PERSISTENT, ids=str)
def test_a_step_with_persistent_rows(case: Case) -> None:
    lane, rest = of_a_lane(case)
    require(lane.waits, 0, "synchronisations of a lane")
    require(lane.unsafe + rest.unsafe, 0, "copies to the host that nothing waits for")
    tiles = Counter({place: n for place, n in rest.waits.items() if place.startswith("field/nearest")})
    most = {1: 13, 8: 1}[case.world] * 6 if case.rows[0] == "bank" else 0  # goal 0
    require(tiles, most, "synchronisations over the tiles of the bank")
    require(rest.waits - tiles, 12, "synchronisations of a step")  # goal 5


def test_rows_on_the_host_are_read_when_they_have_arrived() -> None:
    for world in (1, 8):
        case = Case(world, objective="persistent", rows=("bank", "cpu"))
        require(second_step(case, 2).unsafe, 0, "copies to the host that nothing waits for")


def test_a_look_at_a_number_is_named() -> None:
    def curious(tensors: Any) -> torch.Tensor:
        norm = whole(tensors)
        norm.item()
        return norm

    whole, case = exact.norm_of_all, Case()
    allowed = sum(second_step(case, 2).waits.values())
    with mock.patch.object(exact, "norm_of_all", curious):
        device = second_step(case, 2)
    assert by_file(device.waits)["training/exact.py _local_scalar_dense"] == 1
    with pytest.raises(AssertionError, match=r"1  training/exact\.py:\d+ _local_scalar_dense"):
        require(device.waits, allowed, "synchronisations of a step")


def test_the_mock_device_sees_what_a_gpu_would_do() -> None:
    with mock_device() as device:
        x, on_host = torch.arange(6.0).to(CUDA), torch.arange(6)
        pinned = on_host.pin_memory()
        assert x.device == CUDA
        assert x.is_cuda
        looks: dict[str, Any] = {
            "item": lambda: x.sum().item(), "bool": lambda: bool((x > 0).any()), "float": lambda: float(x[0]),
            "cpu": lambda: x.cpu(), "tolist": lambda: x.tolist(), "equal": lambda: torch.equal(x, x),
            "nonzero": lambda: x.nonzero(), "mask": lambda: x[x > 1], "upload": lambda: on_host.to(CUDA),
            "index of the host": lambda: x[on_host], "number": lambda: torch.tensor(1.0, device=CUDA),
        }  # fmt: skip
        for name, look in looks.items():
            device.clear()
            look()
            assert sum(device.waits.values()) == 1, name
        harmless: dict[str, Any] = {
            "sum": lambda: x.sum(), "pinned": lambda: pinned.to(CUDA, non_blocking=True),
            "zeros": lambda: torch.zeros(3, device=CUDA), "where": lambda: torch.where(x > 1, x, 0.0),
            "masked value": lambda: x.masked_fill_(x > 2, 0.0), "slice": lambda: x[1:3].double(),
        }  # fmt: skip
        for name, act in harmless.items():
            device.clear()
            act()
            assert not device.waits, name
        device.clear()
        pinned.to(CUDA, non_blocking=True), on_host.to(CUDA, non_blocking=True)
        assert device.copies == Counter({"elsewhere pinned": 1, "elsewhere pageable": 1})
        into = torch.empty(6, pin_memory=True)
        into.copy_(x, non_blocking=True)
        assert sum(device.unsafe.values()) == 1
        for wrong in (lambda: x + on_host, lambda: torch.cat([x, on_host])):
            with pytest.raises(RuntimeError, match="over tensors of cuda:0 and cpu"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
