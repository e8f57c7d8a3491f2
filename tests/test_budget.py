"""The budget of a step on an accelerator, counted on one that is not there (`tests.mock_device`).

Numbers are the most that is allowed; where they are above the goal, it stands beside them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from rkdo_dist.batch_norm import BatchStatistics
from rkdo_dist.encoders.backbones import make_backbone
from rkdo_dist.training import exact
from tests.device_evaluation import collecting, embedding, scoring, whole
from tests.device_steps import RELATION, Case, of_a_lane, operators_of, second_step
from tests.mock_device import CUDA, by_file, mock_device

BOTH = ("exact", "fast")
STEPS = [Case(w, r, c) for w in (1, 8) for r in BOTH for c in (False, True)]
OTHERS = [
    *(Case(w, r, objective="persistent", rows=(c, "cuda:0")) for w in (1, 8) for r in BOTH for c in ("batch", "bank")),
    *(Case(w, objective="persistent", rows=("bank", "cpu")) for w in (1, 8)),
    *(
        Case(8, objective="restart", relation=replace(RELATION, columns=c, queue=256))
        for c in ("batch", "queue", "bank")
    ),
    *(Case(8, r, objective="supcon") for r in BOTH),
    *(Case(1, r, more=True) for r in BOTH),
]


def require(found: Counter[str], most: int, what: str) -> None:
    """Names every place if there are more than allowed."""
    total, places = sum(found.values()), "\n".join(f"{n:6d}  {place}" for place, n in found.most_common() if n)
    assert total <= most, f"{total} {what}, {most} are allowed:\n{places}"


def split(counts: Counter[str], *begin: str) -> tuple[Counter[str], Counter[str]]:
    """The places that begin so, and the others."""
    those = Counter({place: n for place, n in counts.items() if place.startswith(begin)})
    return those, counts - those


@pytest.mark.parametrize("case", [*STEPS, *OTHERS], ids=str)
def test_a_step(case: Case) -> None:
    lane, rest = of_a_lane(case)
    require(lane.waits, 0, "synchronisations of a lane")
    require(rest.waits, 3 if case.rows[1] == "cpu" else 1, "synchronisations of a step")
    require(lane.unsafe + rest.unsafe, 0, "copies to the host that nothing waits for")
    views = 2 * (1 + case.recompute) + (case.objective == "restart")
    draws, images = split(lane.copies, "data/pixels")
    require(images, 1, "copies of images of a lane")
    require(draws, views, "copies of draws of a lane")  # one with the images would copy these on the host first
    assert all(copy.endswith(" pinned") for copy in lane.copies), lane.copies
    require(lane.collectives, 0, "collectives of a lane")
    assert all(entry.endswith(" cuda") for entry in rest.collectives), rest.collectives
    operators = operators_of(lane)
    assert operators["views"] <= 125 * views, operators
    # In one call over all lanes what is left are products, whose kernel a library chooses by their shape.
    assert operators["field"] <= (5 if case.objective == "rkdo" else 240), operators
    assert operators["step"] <= (45 if case.objective == "persistent" else 30), operators
    require(split(rest.operators, "batch_norm")[0], 20, "operators for running statistics")


@pytest.mark.parametrize("case", [case for case in STEPS if case.world > 1], ids=str)
def test_collectives(case: Case) -> None:
    device = second_step(case, 2)
    kinds = Counter(entry.split(" ", 1)[1] for entry in device.collectives.elements())
    exact = {"allgather_base float32": 2, "alltoall_base float32": 2, "allgather_base float64": 1}
    fast = {"allgather_base float32": 1, "reduce_scatter_base float32": 1, "allreduce float64": 1}
    wanted = {"allgather_base int64": 1} | (exact if case.reduction == "exact" else fast)  # besides DDP's buckets
    assert kinds == {f"{kind} cuda": n for kind, n in wanted.items()}


@pytest.mark.parametrize("learned", [False, True])
def test_columns_on_a_ring(learned: bool) -> None:
    """A learned temperature is read once there, and its slope is gathered."""
    device = second_step(Case(8, "fast", more=learned, exchange="ring"), 2)
    require(device.waits, 1 + learned, "synchronisations of a step")
    require(device.unsafe, 0, "copies to the host that nothing waits for")
    passed, others = split(device.collectives, "exchange/columns.py")
    assert {entry.split(" ", 1)[1] for entry in passed} == {"send float32 cuda", "recv float32 cuda"}
    require(others, 2 + learned, "collectives besides columns that are passed on")


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_running_statistics_of_any_network(network: str) -> None:
    with mock_device() as device:
        statistics = BatchStatistics(make_backbone(network).network.to(CUDA))
        for _ in range(2):
            device.clear()
            statistics.update(torch.ones(statistics.size, dtype=torch.float64).to(CUDA))
    require(split(device.operators, "batch_norm")[0], 20, "operators for running statistics")
    require(split(device.waits, "batch_norm")[0], 0, "synchronisations")


@pytest.mark.parametrize("world", [1, 8])
def test_embedding_a_split_waits_for_no_batch(world: int) -> None:
    few, more = embedding(world, 2), embedding(world, 5)
    require(few.waits, 1, "synchronisations of a split")
    require(more.waits - few.waits, 0, "synchronisations of batches of images")
    require(more.unsafe, 0, "copies to the host that nothing waits for")
    require(more.copies - few.copies, 3 * 2, "copies of three batches, images and crops")
    assert all(copy.endswith(" pinned") for copy in more.copies), more.copies
    told = more.collectives - few.collectives  # whether to go on, on the host
    require(told, 3 * (world > 1), "collectives of three batches")
    assert all(entry.endswith(" cpu") for entry in told), told


@pytest.mark.parametrize("world", [1, 8])
def test_features_travel_in_rounds_with_one_look_each(world: int) -> None:
    few, more = collecting(world, 4000), collecting(world, 8000)  # of each rank, 4,096 rows of all a round
    require(few.waits, 1 + (1 if world == 1 else 8), "synchronisations of one round a rank")
    require(more.waits - few.waits, 1 if world == 1 else 8, "synchronisations of one round more a rank")
    require(more.copies, 0, "copies")


def test_scores_wait_once_a_point_of_the_fit() -> None:
    """k-NN and neighbourhoods of more queries, and fits of more samples: not one synchronisation more."""
    (few, _, points), (more, found, tried), (of_eight, _, same) = (scoring(*x) for x in ((1, 200), (1, 600), (8, 600)))
    assert 0.4 < found["linear_accuracy"] < 0.8
    assert min(points, tried) > 10
    require(few.waits, points + 50, "synchronisations of an evaluation's scores")
    require(more.waits - few.waits, max(0, tried - points), "synchronisations of more samples")
    require(of_eight.waits, same + 50, "synchronisations on eight ranks")
    require(split(few.waits, "evaluate/linear.py")[0], points + 10, "synchronisations of two fits")
    blocks = Counter(entry.split(" ", 1)[1] for entry in of_eight.collectives.elements())
    queries = 3 * 38  # two searches of test samples in train, one of test samples in test, 16 queries of a rank at once
    assert blocks["alltoall_base float64 cuda"] == queries
    assert blocks["broadcast float64 cuda"] == same + 2


def test_a_whole_evaluation_and_probes(reference: Path, tmp_path: Path) -> None:
    """As they are called, on one rank: nothing is asked of the device that grows with the images."""
    shutil.copytree(reference, tmp_path / "run")
    words = "evaluate.protocol=full", "evaluate.probes=[linear,knn]"
    evaluation, probes = whole(tmp_path / "run", *words)
    for found, most in ((evaluation, 20), (probes, 8)):
        scored, rest = split(found.waits, "evaluate/linear.py", "evaluate/full_protocol.py")
        assert bool(scored) == (found is evaluation)  # probes are scored on the host
        require(rest, most, "synchronisations besides the scores'")
        require(found.unsafe, 0, "copies to the host that nothing waits for")


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
