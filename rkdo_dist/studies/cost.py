"""What a step costs: a model with few constants, fitted to measured steps, judged on points left out, and projected.

Symbols as in `measure.wire`; s = max(1, ranks on a machine x threads / cores) is how much slower a rank computes where
several share a core. Seconds of a step on a rank, by phase:

    data              = s * t_data * b                         reading and drawing views of b pairs
    forward/backward  = s * t_pair * b                         encoder, both passes (+ DDP's exchange, not overlapped)
    field             = s * (t_entry * b * B * passes + t_visit * visits)
    optimizer         = s * t_optimizer * P
    exchange          = s * t_copy * P + alpha * steps + bytes / bandwidth
    other             = s * t_other                            bookkeeping

`steps` and `bytes` are summed over the collectives of a step (`measure.ledger.rounds`, `sent_bytes`): a ring
all-reduce takes 2 (W - 1) steps and 2 (W - 1) / W of its payload, and so does the exact tree sum (all-to-all and
all-gather); an all-gather takes W - 1 of each. The bytes are not fitted: they are those of `measure.wire`, which the
ledger confirms. The nine constants are fitted by least squares without negative values, each equation divided by the
seconds of its step. Small batches cannot tell what an entry of the field costs, so every measurement also times the
field alone on 512 x 4,096 entries: one more equation, t_entry * entries + t_visit = seconds.

A projection replaces alpha and bandwidth by published numbers of two kinds of links (`studies.links`) and s by 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from rkdo_dist.measure.ledger import GRADIENTS, Ledger, rounds, sent_bytes
from rkdo_dist.measure.wire import StepShape, step_payloads
from rkdo_dist.studies.links import Interconnect
from rkdo_dist.train.stopwatch import COMPUTE, DATA, EXCHANGE, FIELD, OPTIMIZER

OTHER = "other"
PHASES = (DATA, COMPUTE, FIELD, EXCHANGE, OPTIMIZER, OTHER)
CONSTANTS = {
    "t_data": "s per pair",
    "t_pair": "s per pair",
    "t_entry": "s per entry of the field",
    "t_visit": "s per visit of the field",
    "t_optimizer": "s per parameter",
    "t_copy": "s per parameter",
    "alpha": "s per message",
    "beta": "s per byte",
    "t_other": "s",
}
_NAMES = tuple(CONSTANTS)
Wire = list[tuple[str, str, int, int]]  # purpose, operation, payload, calls


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured step.

    Attributes:
        way: `run.reduction`: "exact", "fast" or "ring".
        shape: what it computes and sends.
        slowdown: s.
        phases: measured seconds by phase.
        seconds: of the whole step.
        wire: what was sent, as counted.
        probe: rows, columns and seconds of the field alone, measured beside the step; None if it was not.
    """

    way: str
    shape: StepShape
    slowdown: float
    phases: Mapping[str, float]
    seconds: float
    wire: Wire
    probe: tuple[int, int, float] | None = None

    @staticmethod
    def of(facts: Mapping[str, Any]) -> Point:
        """From the facts that `rkdo measure` has written."""
        numbers = dict(facts["shape"])
        shape = StepShape(**{**numbers, "sync_channels": tuple(numbers["sync_channels"])})
        ranks = shape.world / facts["machines"]
        on_cpu = facts["device_kind"] == "cpu"
        slowdown = max(1.0, ranks * facts["threads"] / facts["cores"]) if on_cpu else 1.0
        wire: Wire = [(p, o, size, calls) for p, o, size, calls in facts["wire"]]
        probe = facts["field_probe"]
        alone = (probe["rows"], probe["columns"], probe["seconds"])
        return Point(facts["way"], shape, slowdown, facts["phases"], facts["seconds"], wire, alone)


def wire_of(book: Ledger) -> Wire:
    """A ledger as rows."""
    return [(p, o, size, book.calls[p, o]) for (p, o), size in sorted(book.payload.items())]


def sent(wire: Wire, world: int) -> float:
    """Bytes that a rank sends in a step."""
    return sum(sent_bytes(operation, size, world) for _, operation, size, _ in wire)


def bytes_agree(point: Point) -> bool | None:
    """Whether the formulas of `measure.wire` give exactly what the ledger has counted, purpose by purpose.

    None where they cannot: DeepSpeed's own traffic is not counted, and what rows of a persistent field travel depends
    on the samples that meet.
    """
    if point.shape.strategy.startswith("zero") or point.shape.persistent:
        return None
    predicted = {(p, o): size for p, o, size, _ in wire_of(step_payloads(point.shape))}
    return predicted == {(p, o): size for p, o, size, _ in point.wire}


@dataclasses.dataclass(frozen=True)
class CostModel:
    """The fitted constants, by the names of `CONSTANTS`."""

    constants: Mapping[str, float]

    def phases(self, shape: StepShape, slowdown: float, wire: Wire) -> dict[str, float]:
        """Predicted seconds by phase."""
        theta = np.array([self.constants[name] for name in _NAMES])
        rows = _equations(shape, slowdown, wire)
        return {name: float(rows[name] @ theta) for name in PHASES}

    def seconds(self, point: Point) -> float:
        """Predicted seconds of a measured step."""
        return sum(self.phases(point.shape, point.slowdown, point.wire).values())

    def projected(self, shape: StepShape, wire: Wire, links: Interconnect, speed: float = 1.0) -> dict[str, float]:
        """Seconds by phase on other links, each device `speed` times as fast as those measured and its own."""
        found = {name: value / speed for name, value in self.phases(shape, 1.0, []).items()}
        for purpose, operation, size, calls in wire:
            seconds = links.seconds(operation, size, calls, shape.world)
            found[COMPUTE if _inside_backward(shape, purpose) else EXCHANGE] += seconds
        return found


def _inside_backward(shape: StepShape, purpose: str) -> bool:
    """DDP exchanges gradients during the backward pass; the model lets it hide nothing."""
    return purpose == GRADIENTS and shape.reduction != "exact"


def _equations(shape: StepShape, slowdown: float, wire: Wire) -> dict[str, NDArray[np.float64]]:
    """For each phase, what each constant is multiplied by."""

    def row(**values: float) -> NDArray[np.float64]:
        return np.array([values.get(name, 0.0) for name in _NAMES])

    s, b, world = slowdown, shape.rows, shape.world
    within = [entry for entry in wire if _inside_backward(shape, entry[0])]
    rest = [entry for entry in wire if not _inside_backward(shape, entry[0])]
    copies = s * shape.parameters if shape.reduction == "exact" else 0.0
    return {
        DATA: row(t_data=s * b),
        COMPUTE: row(t_pair=s * b, alpha=_steps(within, world), beta=sent(within, world)),
        FIELD: row(t_entry=s * b * shape.batch * shape.passes, t_visit=s * shape.visits),
        OPTIMIZER: row(t_optimizer=s * shape.parameters),
        EXCHANGE: row(t_copy=copies, alpha=_steps(rest, world), beta=sent(rest, world)),
        OTHER: row(t_other=s),
    }


def _steps(wire: Wire, world: int) -> float:
    return float(sum(calls * rounds(operation, world) for _, operation, _, calls in wire))


def fit(points: Sequence[Point]) -> CostModel:
    """The constants that explain the measured phases best.

    Raises:
        ValueError: without a point.
    """
    if not points:
        raise ValueError("a cost model needs at least one measured step")
    matrix, right = [], []
    for point in points:
        rows = _equations(point.shape, point.slowdown, point.wire)
        for name in PHASES:
            matrix.append(rows[name] / point.seconds)
            right.append(point.phases.get(name, 0.0) / point.seconds)
        if point.probe is not None:
            rows_, columns, seconds = point.probe
            alone = {"t_entry": rows_ * columns, "t_visit": 1.0}
            matrix.append(np.array([point.slowdown * alone.get(name, 0.0) / seconds for name in _NAMES]))
            right.append(1.0)
    a = np.stack(matrix)
    scale = np.maximum(np.abs(a).max(axis=0), 1e-300)  # columns of one size: bytes and seconds differ by 1e9
    solution, _ = nnls(a / scale, np.array(right))
    return CostModel(dict(zip(_NAMES, (solution / scale).tolist(), strict=True)))


def left_out(points: Sequence[Point]) -> list[float | None]:
    """For each point, predicted by a model that has not seen it: predicted / measured - 1.

    None where the others cannot know: a point that exchanges, when no other does.
    """
    errors: list[float | None] = []
    for number, point in enumerate(points):
        others = [p for n, p in enumerate(points) if n != number]
        known = bool(others) and (not point.wire or any(p.wire for p in others))
        errors.append(fit(others).seconds(point) / point.seconds - 1 if known else None)
    return errors


@dataclasses.dataclass(frozen=True)
class Projection:
    """A step at a size that was not run.

    Attributes:
        mode: "strong" (one global batch) or "weak" (the same lanes on every device).
        sent: bytes, by each device.
        efficiency: pairs per second and device, as a share of one device alone with its batch.
    """

    way: str
    mode: str
    world: int
    batch: int
    sent: float
    phases: dict[str, float]
    efficiency: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.phases.values())


def project(
    model: CostModel, base: Point, worlds: Sequence[int], weak: bool, links: Interconnect, speed: float = 1.0
) -> list[Projection]:
    """Project a way to other sizes; those among which the lanes of a step cannot be shared are left out.

    Args:
        base: a measured step of the way; its global batch (strong) or lanes per rank (weak) are kept.
        speed: how many times as fast a device of the target is.
    """
    alone = base.shape.at(1, base.shape.lanes // base.shape.world if weak else base.shape.lanes)
    one = sum(model.projected(alone, [], links, speed).values())
    found = []
    for world in worlds:
        shape = base.shape.at(world, alone.lanes * world if weak else alone.lanes)
        if shape.lanes % world:
            continue
        wire = wire_of(step_payloads(shape))
        phases = model.projected(shape, wire, links, speed)
        ideal = one * shape.batch / alone.batch / world
        found.append(
            Projection(
                base.way,
                "weak" if weak else "strong",
                world,
                shape.batch,
                sent(wire, world),
                phases,
                ideal / sum(phases.values()),
            )
        )
    return found
