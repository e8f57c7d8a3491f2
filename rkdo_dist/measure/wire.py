"""Traffic of a training step by formula: the payload of every collective, exact to the byte.

With W ranks, L lanes of m samples (B = L m, b = B / W per rank), P trainable parameters, C channels of tracked batch
norms, V column views ("v", or "uv" for joint and symmetric pairings), F forwards per lane (1, or 2 with views apart),
K numbers in a report (the loss and its parts), embeddings (m, d) and gradients in float32:

| purpose | exact | fast |
|---|---|---|
| columns | all-gather of V b d 4 | gather: all-gather of V b d 4; ring: walks x (W - 1) sends of V b d 4 |
| column gradients | all-to-all of V B d 4 | gather: reduce-scatter of V B d 4; ring: W sends of V b d 4 |
| parameter gradients | all-to-all of P' 4, all-gather of P' 4 / W (P' = P rounded up to W) | all-reduce of P 4 (DDP) |
| batch statistics | all-gather of F 3C 8 | all-reduce of F 3C 8 |
| facts | all-gather of 8 words of 4 + l (4 + 2 + K), l = L / W | all-gather of 8 words of 4 + l (4 + 1) + 1 + K |
| labels, if used | all-gather of 8 b; b words more of facts | the same |

Bytes that a rank sends for a payload are `measure.ledger.sent_bytes`. DeepSpeed's traffic is given by its formula
(ZeRO paper, Rajbhandari et al. 2020, section 7: reduce-scatter of gradients and all-gather of parameters; stage 3
gathers parameters for every forward and backward instead) and cannot be counted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rkdo_dist.measure.ledger import (
    COLUMN_GRADIENTS,
    COLUMNS,
    GRADIENTS,
    SMALL,
    STATISTICS,
    Ledger,
)
from rkdo_dist.training.shape import StepShape

PARAMETERS = "parameters"  # what only sharding strategies send
_HOST, _DIGEST = 4, 4  # words of 8 bytes: what a host tells, and a lane's digest (`training.facts`)


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
    labels = shape.rows if shape.labels else 0
    book.note((SMALL, "all_gather"), 8 * (_HOST + local * _DIGEST + numbers + labels))
    if shape.labels:
        book.note((SMALL, "all_gather"), labels * 8)
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
    book.note((COLUMNS, "all_gather"), shape.column_views * shape.rows * shape.dimension * 4)
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
