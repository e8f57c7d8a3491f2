"""Shape of a step: the sizes that its memory and its traffic follow from."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rkdo_dist.config import Config
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.rows import FieldRows


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What decides how much a step computes and sends; plain numbers, so that it can be written down and changed.

    Attributes:
        strategy: "single", "ddp", "zero-1", ...
        reduction, exchange: in effect.
        parameters: trainable numbers P.
        channels: of tracked batch norms, C.
        column_views: V.
        report: numbers in a report, K.
        walks: of a ring before the one home.
        forwards: per lane, F.
        labels: whether the labels of the batch travel.
        persistent: whether rows of a persistent field travel too, which has no formula here.
        relational: whether a teacher's keys travel too, which has none either.
    """

    world: int
    lanes: int
    micro_batch: int
    dimension: int
    parameters: int
    channels: int
    column_views: int
    report: int
    walks: int
    forwards: int
    strategy: str
    reduction: str
    exchange: str
    recompute: bool
    labels: bool = False
    persistent: bool = False
    relational: bool = False

    @property
    def batch(self) -> int:
        """B."""
        return self.lanes * self.micro_batch

    @property
    def rows(self) -> int:
        """Samples per rank, b."""
        return self.batch // self.world


def shape_of(config: Config, encoder: nn.Module, objective: Objective, world: int, launch: dict[str, str]) -> StepShape:
    """The shape of a run's steps.

    Args:
        encoder: as `parts` makes it (also on the meta device), not wrapped.
        objective: of any step.
        world: ranks.
        launch: `Runtime.launch`: strategy, precision and reduction in effect.
    """
    norms = [m for m in encoder.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    nothing = {name: torch.zeros(2, 1) for name in "uv"}
    return StepShape(
        world=world,
        lanes=config.train.lanes,
        micro_batch=config.train.lane_size,
        dimension=config.encoder.embedding_dim,
        parameters=sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        channels=sum(m.num_features for m in norms),
        column_views=len(objective.column_views),
        report=len(objective.part_names) + 1 + config.field.learn_temperature,
        walks=len(FieldRows(objective, nothing, 2, 0, 2, torch.zeros(2, dtype=torch.int64)).walks),
        forwards=1 if config.train.views == "together" else 2,
        strategy=launch["strategy"],
        reduction=launch["reduction"],
        exchange="ring" if config.run.reduction == "ring" else "gather",
        recompute=config.train.recompute,
        labels=objective.needs_labels,
        persistent=config.field.recursion == "persistent",
        relational=objective.relation is not None and objective.relation.teacher != "snapshot",
    )
