"""Rows of all training samples in a step: fixed ones in; of a persistent field, rows for later steps out.

A step asks for the supervisors of its lanes, and after the loss lets the rows recur. When its weights have moved, the
rows are written to their owners and those of the next step fetched, both while the next step embeds; rows of a step
that is skipped stay as they were. Everything is formed per lane, in shapes that do not depend on the number of ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rkdo_dist import parts
from rkdo_dist.checkpoint import Checkpoint
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.order import GlobalBatches
from rkdo_dist.exchange import group
from rkdo_dist.exchange.store import Fetch, RowStore, Shards
from rkdo_dist.exchange.transfer import upload
from rkdo_dist.field.affinity import COSINE
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.persistent import (
    BatchColumns,
    Restricted,
    Rows,
    identity,
    initial,
    of_both_views,
    recur_in_batch,
    recur_with_bank,
    restrict,
)
from rkdo_dist.field.rows import computing_dtype
from rkdo_dist.training.machine import available_bytes

Pair = tuple[Tensor, Tensor]  # of both views of a lane: embeddings (m, d), or gradients with respect to them
BANK_TEMPERATURE = 0.1  # of the learned rows over the bank
CHUNK = 1 << 20  # entries of the float64 matrices that rows recur in
WATCHED, NEIGHBOURS = 6, 8  # rows, and stored entries of each, that are shown over time


class PersistentField:
    """Rows of all training samples, on all ranks together; they move if the recursion is persistent. Every method is
    collective.

    Args:
        store: the rows, and the bank for `columns` "bank".
        columns: "batch" or "bank": over which columns rows recur.
        bank_temperature: of the learned rows over the bank.
        schedule: the samples (B,) int64 of the global batch of a step, in lane order; None after the last step.
        device: where the step computes.
        lane: for joint pairing, samples of a lane: the rows are those of points then, in a lane's order all of its
            samples' view 1, then their view 2 (see `field.persistent`), and so are the lanes handed in (`as_points`).
    """

    def __init__(
        self,
        store: RowStore,
        columns: str,
        bank_temperature: float,
        schedule: Callable[[int], Tensor | None],
        device: torch.device,
        lane: int | None = None,
    ) -> None:
        self.store, self._columns, self._temperature = store, columns, bank_temperature
        self._lane, self._views = lane, 1 if lane is None else 2
        self._schedule, self._device = schedule, device
        self._batch = BatchColumns(store.shards.samples, device)
        self._ahead: tuple[int, Tensor, Fetch] | None = None
        self._step, self._samples, self._rows = -1, torch.empty(0), list[Rows]()
        self._restricted: list[Restricted] = []
        self._moved: Rows | None = None

    def begin(self, step: int, samples: Tensor) -> None:
        """Begin to fetch the rows of a step, unless they are in transit.

        Args:
            step: as for `schedule`.
            samples: (b,) int64 of this rank's lanes: what the schedule must say too.
        """
        if self._ahead is None or self._ahead[0] != step:
            self._fetch(step)
        assert self._ahead is not None
        mine = self._ahead[1].view(group.world_size(), -1)[group.rank()]
        assert torch.equal(mine, self._points(samples)), "the batch is not the one planned"

    def supervisors(self, lanes: Sequence[Pair], objective: Objective) -> list[Restricted]:
        """p of each of this rank's lanes (embeddings (m, d)), for the step that has begun; with its uniform share."""
        assert self._ahead is not None
        (self._step, self._samples, fetch), self._ahead = self._ahead, None
        rows, m = fetch.wait().to(self._device), len(lanes[0][0])
        self._batch.set(self._samples, upload(self._samples, self._device))
        self._rows = [rows.slice(i * m, (i + 1) * m) for i in range(len(lanes))]
        self._restricted = [
            restrict(part, self._batch, self._positives(i, m), computing_dtype(lanes[0][0].dtype)).smoothed(
                objective.debias, objective.column_count(len(self._samples))
            )
            for i, part in enumerate(self._rows)
        ]
        return self._restricted

    def recur(self, lanes: Sequence[Pair], columns: Tensor, objective: Objective) -> dict[str, Tensor]:
        """Compute the new rows of the step (eq. 3), if they persist; `commit` stores them.

        Args:
            lanes: embeddings of this rank's lanes, without graph.
            columns: view 2 of the global batch (B, d), or its points.
            objective: whose supervisor is "rows".

        Returns:
            What the rows were before, summed over each lane, float64 (lanes,): see `_report`.
        """
        columns, self._moved = columns.to(computing_dtype(columns.dtype)), None
        report = self.report(objective)
        if objective.recursion != "persistent":
            return report
        if self._columns == "bank":
            self.store.refresh(self._samples, columns)
        drifts = [torch.zeros((), dtype=torch.float64, device=self._device) for _ in lanes]
        if objective.row_coupling > 0:
            moved = (
                self._with_bank(lanes, objective)
                if self._columns == "bank"
                else self._within(lanes, columns, objective)
            )
            drifts = [drift.sum() for _, drift in moved]
            self._moved = Rows.cat([rows for rows, _ in moved])
        return report | {"row_drift": torch.stack(drifts)}

    def report(self, objective: Objective) -> dict[str, Tensor]:
        """What the rows of the step are before they move, summed over each lane, float64 (lanes,): see `_report`."""
        reports = [self._report(i, len(self._samples), objective) for i in range(len(self._rows))]
        return {name: torch.stack([report[name] for report in reports]) for name in reports[0]}

    def commit(self) -> None:
        """Send the rows of the step to their owners, and begin to fetch those of the next."""
        if self._moved is not None:
            self.store.write(self._samples, self._moved)
            self._moved = None
        self._fetch(self._step + 1)

    def watched(self, step: int) -> dict[str, Any]:
        """A few rows as they are now, the same ones every time: their nearest stored neighbours (JSON-able)."""
        self.store.finish()
        n = self.store.shards.samples // self._views
        places = [i * self._views for i in sorted({(2 * k + 1) * n // (2 * WATCHED) for k in range(WATCHED)})]
        mine = [self._described(i) for i in places if self.store.first <= i < self.store.stop]
        everyone: list[Any] = group.gather_objects(mine)
        return {"step": step, "samples": n, "rows": [row for part in everyone for row in part]}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """This rank's tiles; see `checkpoint.Kept`."""
        return {_part(tile): tensors for tile, tensors in self.store.whole_tiles().items()}

    def restore(self, found: Checkpoint) -> None:
        """See `checkpoint.Kept`."""
        for tile in self.store.shards.touched(group.rank()):
            try:
                self.store.load(tile, found.part(_part(tile)))
            except ValueError as error:
                raise ValueError(f"the rows in {found.path} do not match this run: {error}") from error

    def _fetch(self, step: int) -> None:
        if self._ahead is not None:
            self._ahead[2].wait()  # of a step that did not happen
            self._ahead = None
        samples = self._schedule(step)
        if samples is not None:
            points = self._points(samples)
            self._ahead = (step, points, self.store.fetch(points))

    def _points(self, samples: Tensor) -> Tensor:
        """The rows of samples, in lane order."""
        if self._lane is None:
            return samples
        lanes = samples.view(-1, self._lane)
        return torch.stack([2 * lanes, 2 * lanes + 1], 1).flatten()

    def _own(self, lane: int, m: int) -> Tensor:
        """Positions in the global batch of a lane's samples (or points)."""
        first = (group.rank() * len(self._rows) + lane) * m
        return torch.arange(first, first + m, device=self._device)

    def _positives(self, lane: int, m: int) -> Tensor:
        """Positions in the global batch of the positives of a lane's rows."""
        own = self._own(lane, m)
        return own if self._views == 1 else own.roll(m // 2)

    def _within(self, lanes: Sequence[Pair], columns: Tensor, objective: Objective) -> list[tuple[Rows, Tensor]]:
        affinity, moved, count = objective.affinity, [], len(columns)
        pooled, taking_part = affinity.pool(columns[None], count), objective.column_count(count)
        lifted = affinity.lift_columns(columns, pooled, [0])
        for i, (rows, (u, _)) in enumerate(zip(self._rows, lanes, strict=True)):
            size, parts = max(1, CHUNK // (count + rows.columns.shape[1])), []
            for start in range(0, len(u), size):
                queries = u[start : start + size].to(columns.dtype)
                logits = affinity.between(affinity.lift_rows(queries, pooled), lifted, taking_part)
                logits = logits / objective.temperatures[-1]
                own = self._own(i, len(u))[start : start + size] if rows.excluded else None
                if own is not None:
                    logits.scatter_(1, own[:, None], -torch.inf)
                part = rows.slice(start, start + len(queries))
                learned = torch.softmax(logits, dim=1)
                parts.append(recur_in_batch(part, self._batch, learned, objective.row_coupling, own))
            moved.append((Rows.cat([p for p, _ in parts]), torch.cat([drift for _, drift in parts])))
        return moved

    def _with_bank(self, lanes: Sequence[Pair], objective: Objective) -> list[tuple[Rows, Tensor]]:
        m = len(lanes[0][0])
        queries = torch.cat([u for u, _ in lanes]).to(self.store.rows.rest.dtype) / self._temperature
        found = self.store.search(queries, torch.cat([rows.columns for rows in self._rows]))
        log_sum, moved = found.log_sum(), []
        for i, rows in enumerate(self._rows):
            here, part = slice(i * m, (i + 1) * m), found.slice(i * m, (i + 1) * m)
            arguments = (part.at_stored, part.samples, part.logits, log_sum[here])
            moved.append(recur_with_bank(rows, *arguments, objective.row_coupling))
        return moved

    def _report(self, lane: int, batch: int, objective: Objective) -> dict[str, Tensor]:
        """Sums over a lane's rows as they are before the step.

        `row_positive`: p(i|i) of the whole row; `row_entropy`: its entropy; `row_stored`: the share of its mass that is
        stored entry by entry; `row_mass`: m, its mass in the batch; `p_positive`: p(i|i) of the supervisor, the row
        restricted to the batch; `ideal`, for one level of cosines: the loss if all positives had similarity 1 and all
        others -1 / (B - 1).
        """
        rows, p = self._rows[lane], self._restricted[lane]
        m = len(rows.rest)
        low = -(1 + 1 / (batch // self._views - 1)) / objective.temperatures[-1]
        log_sum = math.log(1 + (objective.column_count(batch) - 1) * math.exp(low))
        ideal = (log_sum - (1 - p.positive) * low - p.entropy).sum()
        return {
            "row_positive": rows.at(self._batch.samples[self._positives(lane, m)]).sum(),
            "row_entropy": rows.entropy().sum(),
            "row_stored": m - rows.rest.double().sum(),
            "row_mass": p.mass.sum(),
            "p_positive": p.positive.sum(),
            **({"ideal": ideal} if objective.recursion != "in_batch" and objective.affinity == COSINE else {}),
        }

    def _described(self, sample: int) -> dict[str, Any]:
        place = sample - self.store.first
        row = self.store.rows.slice(place, place + 1)
        order = row.probabilities[0].argsort(descending=True)[:NEIGHBOURS]
        pairs = zip(row.columns[0, order].tolist(), row.probabilities[0, order].tolist(), strict=True)
        positive = sample if self._views == 1 else sample ^ 1
        here = torch.tensor([positive], device=row.columns.device)
        return {
            "sample": sample // self._views,
            "positive": float(row.at(here)),
            "rest": float(row.rest),
            "entropy": float(row.entropy()),
            "nearest": [[column // self._views, p] for column, p in pairs if column < row.samples],
        }


def _part(tile: int) -> str:
    """The name of a tile's part of a checkpoint."""
    return f"rows.{tile:06d}"


def make_persistent(
    config: Config, index: ShardIndex, device: torch.device, rows: Rows | None = None
) -> PersistentField | None:
    """The rows of a run: those that persist, or fixed ones; None if it has neither.

    Args:
        rows: p(0) of the samples that this rank owns, see `training.supervision`; None: the identity.

    Raises:
        ConfigError: if the data set or the memory does not have room for them.
    """
    f = config.field
    persists = f.recursion == "persistent"
    if not persists and rows is None:
        return None
    samples = index.split(config.data.split).samples
    if persists and f.stored > samples:
        raise ConfigError(
            f"field.stored={f.stored}, but split {config.data.split!r} of {index.place} has {samples} samples: "
            f"a row has no more entries than that"
        )
    joint = has_points(config)
    if persists and (rows is not None or f.debias or joint):
        own = torch.arange(*own_samples(config, samples))
        rows = identity(own, samples, 1) if rows is None else rows
        rows = initial(of_both_views(rows, own) if joint else rows, f.debias or 0.0, f.stored)
    steps, total = parts.run_length(config, index)
    batches: dict[int, GlobalBatches] = {}  # of the epoch

    def schedule(step: int) -> torch.Tensor | None:
        epoch, place = divmod(step, steps)
        if step >= total:
            return None
        if epoch not in batches:
            batches.clear()
            batches[epoch] = GlobalBatches(parts.epoch_plan(config, index, epoch))
        return torch.from_numpy(batches[epoch].ids(place))

    columns = f.value("columns") or "batch"
    width = config.encoder.embedding_dim if has_bank(config) else None
    place = device if f.store == "device" else torch.device("cpu")
    stored = f.stored if rows is None else rows.columns.shape[1]
    store = make_rows(samples * (2 if joint else 1), stored, width, place, rows, device)
    lane = config.train.lane_size if joint else None
    return PersistentField(store, columns, BANK_TEMPERATURE, schedule, device, lane)


def has_points(config: Config) -> bool:
    """Whether rows persist under joint pairing: those of both views of a sample then, over both views of all."""
    return config.field.recursion == "persistent" and config.field.pairing == "joint"


def has_bank(config: Config) -> bool:
    """Whether rows recur over the newest embeddings of all samples."""
    return config.field.recursion == "persistent" and config.field.value("columns") == "bank"


def own_samples(config: Config, samples: int) -> tuple[int, int]:
    """First sample whose rows this rank owns, and the one after its last."""
    views = 2 if has_points(config) else 1
    first, stop = Shards(views * samples, group.world_size(), not has_bank(config)).own(group.rank())
    return first // views, stop // views


def make_rows(
    samples: int,
    stored: int,
    width: int | None,
    device: torch.device,
    rows: Rows | None = None,
    computes: torch.device | None = None,
) -> RowStore:
    """The initial rows of `samples` samples, sharded over the ranks, if there is room for them.

    Args:
        samples, stored, width, device, rows, computes: see `RowStore`.

    Raises:
        ValueError: if this machine has less memory than its ranks' shares need.
    """
    need = rows_bytes(samples, stored, width, group.world_size())
    on_device = device.type == "cuda"
    room = torch.cuda.mem_get_info(device)[0] if on_device else available_bytes(device)
    ours = 1 if on_device else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if need * ours > room:
        bank = " and their embeddings" if width is not None else ""
        raise ValueError(
            f"the rows of {samples} samples{bank} need {need * ours / 2**30:.2f} GiB on {device.type} "
            f"({ours} processes of this machine, field.stored={stored}), but only {room / 2**30:.2f} GiB are free: "
            "lower field.stored, use more processes on other machines"
            + (", field.store=host" if on_device else "")
            + (", field.columns=batch" if width is not None else "")
        )
    return RowStore(samples, stored, width, device, rows=rows, computes=computes)


def rows_bytes(samples: int, stored: int, width: int | None, world: int) -> int:
    """Bytes that the largest share of rows (and bank, d = `width`) takes on a rank."""
    shards = Shards(samples, world, width is None)
    own = max(stop - start for start, stop in map(shards.own, range(world)))
    return own * (8 * stored + 4 + (0 if width is None else 4 * width + 1))
