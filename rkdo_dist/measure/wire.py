"""Traffic of a training step by formula: the payload of every collective, exact to the byte.

With W ranks, L lanes of m samples (B = L m, b = B / W per rank), P trainable parameters, C channels of tracked batch
norms, V column views ("v", or "uv" for joint and symmetric pairings), F forwards per lane (1, or 2 with views apart),
K numbers in a report (the loss and its parts), embeddings (m, d) and gradients in float32:

| purpose | exact | fast |
|---|---|---|
| columns | all-gather of 2 b d 4 | gather: all-gather of V b d 4; ring: walks x (W - 1) sends of V b d 4 |
| column gradients | all-to-all of V B d 4 | gather: reduce-scatter of V B d 4; ring: W sends of V b d 4 |
| parameter gradients | all-to-all of P' 4, all-gather of P' 4 / W (P' = P rounded up to W) | all-reduce of P 4 (DDP) |
| batch statistics | all-gather of F 3C 8 | all-reduce of F 3C 8 |
| facts | all-gather of 8 words of 4 + l (4 + 2 + K), l = L / W | all-gather of 8 words of 4 + l (4 + 1) + 1 + K |

Bytes that a rank sends for a payload are `measure.ledger.sent_bytes`. DeepSpeed's traffic is given by its formula
(ZeRO paper, Rajbhandari et al. 2020, section 7: reduce-scatter of gradients and all-gather of parameters; stage 3
gathers parameters for every forward and backward instead) and cannot be counted here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rkdo_dist.config import Config
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.tiled import FieldRows
from rkdo_dist.measure.ledger import (
    COLUMN_GRADIENTS,
    COLUMNS,
    GRADIENTS,
    SMALL,
    STATISTICS,
    Ledger,
)

PARAMETERS = "parameters"  # what only sharding strategies send
_HOST, _DIGEST = 4, 4  # words of 8 bytes: what a host tells, and a lane's digest (`training.facts`)


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
        micro_batch=config.train.micro_batch,
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
        relational=objective.relation is not None,
    )


def step_payloads(shape: StepShape) -> Ledger:
    """The ledger of one training step on one rank, as the table of this module says; empty on one rank."""
    book = Ledger()
    if shape.world == 1:
        return book
    if shape.reduction == "exact":
        _exact(book, shape)
    else:
        _fast(book, shape)
    local = shape.lanes // shape.world
    # Whether embeddings and gradients are finite, and the loss and its parts: by lane in exact mode, by rank otherwise.
    numbers = local + (local if shape.reduction == "exact" else 1) * (1 + shape.report)
    book.note((SMALL, "all_gather"), 8 * (_HOST + local * _DIGEST + numbers))
    if shape.labels:
        times = 1 if shape.reduction == "exact" else 2  # for the loss, and for its value at the ideal embeddings
        book.note((SMALL, "all_gather"), times * shape.rows * 8, times)
    return book


def bytes_agree(shape: StepShape, wire: Iterable[Sequence[Any]]) -> bool | None:
    """Whether `step_payloads` equals the counts of the ledger, purpose by purpose.

    None where it cannot: DeepSpeed's own traffic is not counted, and what rows of a persistent field send depends on
    the samples that meet.

    Args:
        wire: (purpose, operation, payload, calls) as `rkdo measure` writes them.
    """
    if shape.strategy.startswith("zero") or shape.persistent or shape.relational:
        return None
    return dict(step_payloads(shape).payload) == {(purpose, operation): size for purpose, operation, size, _ in wire}


def _exact(book: Ledger, shape: StepShape) -> None:
    book.note((COLUMNS, "all_gather"), 2 * shape.rows * shape.dimension * 4)
    book.note((COLUMN_GRADIENTS, "all_to_all"), shape.column_views * shape.batch * shape.dimension * 4)
    padded = (shape.parameters + -shape.parameters % shape.world) * 4
    book.note((GRADIENTS, "all_to_all"), padded)
    book.note((GRADIENTS, "all_gather"), padded // shape.world)
    book.note((STATISTICS, "all_gather"), shape.forwards * 3 * shape.channels * 8)


def _fast(book: Ledger, shape: StepShape) -> None:
    world, block = shape.world, shape.column_views * shape.rows * shape.dimension * 4
    if shape.exchange == "ring":
        sends = (shape.walks + 1) * (world - 1)
        book.note((COLUMNS, "send"), sends * block, sends)
        book.note((COLUMN_GRADIENTS, "send"), world * block, world)
    else:
        book.note((COLUMNS, "all_gather"), block)
        book.note((COLUMN_GRADIENTS, "reduce_scatter"), world * block)
    book.note((STATISTICS, "all_reduce"), shape.forwards * 3 * shape.channels * 8)
    if shape.strategy.startswith("zero"):
        _zero(book, shape)
    else:
        book.note((GRADIENTS, "all_reduce"), shape.parameters * 4)


def _zero(book: Ledger, shape: StepShape) -> None:
    numbers = shape.parameters * 4
    book.note((GRADIENTS, "reduce_scatter"), numbers)
    local = shape.lanes // shape.world * shape.forwards
    gathers = 1 if shape.strategy != "zero-3" else local * (3 if shape.recompute else 2)
    book.note((PARAMETERS, "all_gather"), gathers * numbers // shape.world, gathers)
