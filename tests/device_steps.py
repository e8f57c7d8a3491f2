"""Steps of training on the mock device, and what they ask of it; run as a program, a table of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rkdo_dist.data.stream import MicroBatch
from rkdo_dist.data.views import Views
from rkdo_dist.encoders import Encoder
from rkdo_dist.exchange.store import RowStore
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.presets import Relation
from rkdo_dist.lars import LARS
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.training.average import WeightAverage
from rkdo_dist.training.loop import train_step
from rkdo_dist.training.persistent import PersistentField
from rkdo_dist.training.relation import RelationalField
from rkdo_dist.training.step import Step, StepSettings
from tests.mock_device import CUDA, Device, by_file, mock_device

MICRO, WIDTH, STORED = 8, 128, 6
RELATION = Relation(view="weak")  # whose keys are embedded apart


@dataclass(frozen=True)
class Case:
    """One kind of step.

    Attributes:
        world: ranks; this is rank zero.
        objective: name of a preset.
        rows: for "persistent", where rows recur, in the "batch" or the "bank", and where they are, "cuda:0" or "cpu".
        relation: for "restart".
        more: whether everything that adds work takes part: LARS, clipping, an average of the weights and a learned
            temperature.
        exchange: how columns travel: "gather", or in fast mode "ring".
    """

    world: int = 1
    reduction: str = "exact"
    recompute: bool = False
    objective: str = "rkdo"
    backbone: str = "cifar_resnet8"
    rows: tuple[str, str] = ("batch", "cuda:0")
    relation: Relation = RELATION
    more: bool = False
    exchange: str = "gather"
    samples: int = 1200

    def __str__(self) -> str:
        words = [self.objective, self.reduction, str(self.world)]
        words += [*self.rows] if self.objective == "persistent" else []
        words += [self.relation.columns] if self.objective == "restart" else []
        return "-".join([*words, *(name for name in ("recompute", "more") if getattr(self, name))])


class WithoutDDP(Runtime):
    """Buckets are Accelerate's, and left out."""

    def wrap(self, encoder: nn.Module) -> nn.Module:
        return encoder

    def without_sync(self, wrapped: nn.Module) -> Any:
        return contextlib.nullcontext()


def second_step(case: Case, lanes: int) -> Device:
    """What the second step of a run asks of the device; the first also makes what is kept from step to step."""
    with mock_device(case.world) as device:
        step, objective = _made(case, lanes)
        for number in range(2):
            device.clear()
            facts, update = train_step(step, _lanes(lanes, case, number), objective, 0, number)
            assert not update.skipped, update.skipped
            assert facts.loss > 0
        return device


def of_a_lane(case: Case) -> tuple[Device, Device]:
    """A step's counts split into those of one lane and those of the step itself, from steps of one lane and of two."""
    one, two, lane, rest = second_step(case, 1), second_step(case, 2), Device(), Device()
    for name in ("waits", "operators", "copies", "unsafe", "collectives"):
        few, more = getattr(one, name), getattr(two, name)
        setattr(lane, name, more - few)
        setattr(rest, name, few - getattr(lane, name))
    return lane, rest


def operators_of(device: Device) -> Counter[str]:
    """Operators by who is answerable for them: views, field, encoder, optimizer, the rest of the step."""
    found: Counter[str] = Counter()
    for file, count in by_file(device.operators).items():
        folder = file.split("/")[0]
        owner = {"data": "views", "field": "field", "losses.py": "field", "encoder": "encoder"}.get(folder, "step")
        found["optimizer" if file in ("optimizer", "lars.py") else owner] += count
    return found


def _made(case: Case, lanes: int) -> tuple[Step, Objective]:
    torch.manual_seed(0)
    encoder, views, batch = Encoder(case.backbone, "released", WIDTH).to(CUDA), Views(size=16), lanes * MICRO
    parameters = list(encoder.parameters())
    optimizer = LARS(parameters, lr=1e-3) if case.more else torch.optim.Adam(parameters, lr=1e-3, foreach=True)
    launch = "ddp" if case.world > 1 else "single"
    runtime = WithoutDDP(None, 0, case.world, CUDA, "no", launch, case.reduction)  # type: ignore[arg-type]
    settings = StepSettings(
        1, case.reduction, case.recompute, True, case.exchange, 0.1 if case.more else None, learn_temperature=case.more
    )
    persistent, relational, objective = None, None, Objective.of(case.objective)
    if case.objective == "persistent":
        columns, place = case.rows
        width = WIDTH if columns == "bank" else None
        store = RowStore(case.samples, STORED, width, torch.device(place), computes=CUDA)
        persistent = PersistentField(store, columns, 0.1, lambda step: _samples(step, batch * case.world, case), CUDA)
    if case.objective == "restart":
        relational = RelationalField(case.relation, case.samples, WIDTH, True, CUDA)
        objective = replace(objective, relation=case.relation)

    def make_view(images: torch.Tensor, ids: torch.Tensor, epoch: int, view: int) -> torch.Tensor:
        return views(images, ids, 1, epoch, view)

    average = WeightAverage(encoder, 0.9) if case.more or case.relation.teacher == "ema" else None
    return Step(encoder, make_view, runtime, settings, optimizer, persistent, average, relational), objective


def _samples(step: int, batch: int, case: Case) -> torch.Tensor:
    """Of the global batch; neighbouring steps share half of them."""
    return (torch.arange(batch) + step * batch // 2) % case.samples


def _lanes(lanes: int, case: Case, number: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(number)
    ids = _samples(number, lanes * MICRO * case.world, case)[: lanes * MICRO].split(MICRO)
    images = torch.randint(0, 256, (lanes, MICRO, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return [MicroBatch([str(int(i)) for i in k], k, x.pin_memory(), k % 3) for k, x in zip(ids, images, strict=True)]


def main() -> None:
    """The table that docs/accelerators.md is made of."""
    print("| step | ranks | waits: lane, step | collectives | a lane's operators: views, field, rest | a step's own |")
    print("|---|---|---|---|---|---|")
    persistent = [Case(8, objective="persistent", rows=(columns, "cuda:0")) for columns in ("batch", "bank")]
    for case in (*(Case(w, r, backbone="resnet18") for w in (1, 8) for r in ("exact", "fast")), *persistent):
        lane, rest = of_a_lane(case)
        each, own = operators_of(lane), operators_of(rest)
        waits, collectives = (sum(x.waits.values()) for x in (lane, rest)), sum(rest.collectives.values())
        shares = ", ".join(str(each[owner]) for owner in ("views", "field", "step"))
        print(
            "|", case, "|", case.world, "|", *waits, "|", collectives, "|", shares, "|", own["step"] + own["field"], "|"
        )


if __name__ == "__main__":
    main()
