"""Host work of a step at 8 to 4,096 ranks: one rank of a group whose collectives give back what they were given.

What is counted are calls of Python and C functions, and operators; no test asserts a time.
"""

from __future__ import annotations

import linecache
import logging
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from rkdo_dist.data.order import EpochPlan, GlobalBatches
from rkdo_dist.data.stream import MicroBatch
from rkdo_dist.exchange.group import ExactAllReduce, TreeSum, tree_sum
from rkdo_dist.exchange.store import RowStore
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.presets import Relation
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.training.facts import Told
from rkdo_dist.training.loop import train_step
from rkdo_dist.training.persistent import PersistentField
from rkdo_dist.training.relation import RelationalField
from rkdo_dist.training.step import Step, StepSettings
from tests.device_steps import WithoutDDP
from tests.strategies import Network
from tests.test_step import make_view

WORLDS, ENDS = (8, 64, 512, 4096), (8, 4096)
MICRO, LANES = 2, 2  # lanes of a rank
EXACT = StepSettings(seed=3, reduction="exact", recompute=False, views_together=True, exchange="gather")


@contextmanager
def one_rank_of(world: int) -> Iterator[Runtime]:
    """This process as rank zero of a group of `world` ranks of which there is no other."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    equal_parts = dist.all_to_all_single

    def all_to_all(output: torch.Tensor, input: torch.Tensor, *splits: list[int], **options: Any) -> Any:
        """The stand-in for parts of unequal lengths, which the group does not have: what arrives is zero."""
        if not splits:
            return equal_parts(output, input, **options)
        assert (len(output), len(input)) == tuple(map(sum, splits))
        assert {*map(len, splits)} == {world}
        output.zero_()
        return SimpleNamespace(wait=lambda: None)

    try:
        dist.all_to_all_single = all_to_all
        yield WithoutDDP(cast(Any, None), 0, world, torch.device("cpu"), "no", "ddp", "exact")
    finally:
        dist.all_to_all_single = equal_parts
        dist.destroy_process_group()


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def calls(work: Callable[[], object]) -> int:
    """Calls of Python and C functions that `work` makes, but for the stack that torch writes down when it is seeded."""
    found, unseen = 0, (traceback.__file__, linecache.__file__)

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call") and frame.f_code.co_filename not in unseen

    logging.disable()  # torch notes every collective where somebody listens, as pytest does
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        logging.disable(logging.NOTSET)
    return found


def steps_of(world: int, reduction: str, recursion: str, columns: str) -> Iterator[Callable[[], object]]:
    """Steps of a run on one of `world` ranks, from the plan of the epoch to the facts.

    Args:
        recursion: "batch", "persistent" or "restart".
        columns: of the last two: "batch", "bank", and for "restart" "queue".
    """
    lanes = LANES * world
    plan = EpochPlan((48,) * world, 1, 0, lanes, MICRO, window=16)
    batches = GlobalBatches(plan)
    with one_rank_of(world) as runtime:
        memory, relational, objective = None, None, Objective.rkdo()
        if recursion == "restart":
            relation = Relation(view="weak", columns=columns, queue=2 * lanes * MICRO, neighbours=2)
            relational = RelationalField(relation, plan.samples, 15, True, runtime.device)
            objective = replace(Objective.of("restart"), relation=relation)
        elif recursion == "persistent":
            store = RowStore(plan.samples, 8, 15 if columns == "bank" else None)
            schedule = lambda step: torch.from_numpy(batches.ids(step)) if step < plan.steps else None  # noqa: E731
            memory = PersistentField(store, columns, 0.2, schedule, runtime.device)
            objective = Objective.persistent(0.3, 0.4)
        torch.manual_seed(0)
        encoder = Network()
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01)
        settings = replace(EXACT, reduction=reduction)
        step = Step(
            encoder, make_view, replace(runtime, reduction=reduction), settings, optimizer, memory, None, relational
        )
        for number in range(plan.steps):

            def one(number: int = number) -> None:
                mine = []
                for lane in range(LANES):
                    ids = torch.from_numpy(plan.micro_batch_ids(number, lane))
                    images = torch.full((MICRO, 3, 8, 8), number + lane, dtype=torch.uint8)
                    mine.append(MicroBatch([str(i) for i in ids.tolist()], ids, images, ids % 5))
                told = Told(digests=bytes(32 * LANES))
                facts, update = train_step(step, mine, objective, 0, number, lambda: told)
                assert not facts.not_finite
                assert not update.skipped

            yield one


@pytest.mark.parametrize(
    ("reduction", "recursion", "columns", "worlds"),
    [
        ("exact", "batch", "batch", WORLDS),
        ("exact", "persistent", "batch", WORLDS),
        ("exact", "persistent", "bank", WORLDS),
        ("fast", "batch", "batch", ENDS),
        ("fast", "persistent", "bank", ENDS),
        *(("exact", "restart", columns, ENDS) for columns in ("batch", "queue", "bank")),
    ],
)
def test_host_work_of_a_step_less_than_doubles_from_8_to_4096_ranks(
    reduction: str, recursion: str, columns: str, worlds: Sequence[int]
) -> None:
    found, operators = {}, {}
    for world in worlds:
        steps = steps_of(world, reduction, recursion, columns)
        next(steps)()  # buffers are made
        found[world] = calls(next(steps))
        with _Operators() as counted:
            next(steps)()
        operators[world] = counted.found.total()
        steps.close()  # type: ignore[attr-defined]
    print(f"calls {found}, operators {operators}")  # for the table of docs/scaling.md: pytest -s
    assert max(found.values()) < 2 * found[8]
    assert max(operators.values()) < 2 * operators[8]


def test_the_exact_tree_is_log2_operators() -> None:
    """The control: the same sum one part after another is as many operators as there are ranks."""
    for world, levels in zip(WORLDS, (3, 6, 9, 12), strict=True):
        with one_rank_of(world):
            reduce = ExactAllReduce(3 * world, torch.zeros(1))
            reduce.vector.fill_(1.0)
            with _Operators() as tree:
                reduce.reduce()
        assert tree.found["aten.add_.Tensor"] == levels
        assert torch.equal(reduce.vector, torch.full((3 * world,), float(world)))
        one_by_one: TreeSum[torch.Tensor] = TreeSum(world)
        parts = torch.randn(world, 5)
        with _Operators() as sequence:
            for part in parts.clone():
                one_by_one.add(part)
        assert sequence.found["aten.add_.Tensor"] == world - 1
        assert torch.equal(one_by_one.total(), tree_sum(parts))
