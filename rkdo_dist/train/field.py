"""Where the field loss of a step is formed: embeddings of this rank's lanes in, loss and embedding gradients out.

One function for each way of summing: `exact_field` forms everything per lane and sums in tree order, `averaged_field`
takes all local rows at once. Both see the columns of the whole global batch, in float32 at least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from rkdo_dist.exchange import group
from rkdo_dist.exchange.columns import ExactColumns, GatheredColumns
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.persistent import Restricted
from rkdo_dist.field.tiled import value_and_gradient
from rkdo_dist.losses import FieldLoss
from rkdo_dist.train.persistent import PersistentField, Views


@dataclasses.dataclass(frozen=True)
class FieldResult:
    """The field loss of a step.

    Attributes:
        gradients: for each of this rank's lanes, what to push through its embeddings. From `exact_field` parameter
            gradients then are to be SUMMED over all lanes of all ranks, from `averaged_field` summed over a
            rank's lanes and AVERAGED over ranks; both give the gradient of the mean over the global batch.
        loss: that mean, the same on every rank.
        parts: the loss's parts (`field.objectives`), means over the global batch.
        stop: the largest stop code of any rank.
    """

    gradients: list[Views]
    loss: float
    parts: dict[str, float]
    stop: int


def exact_field(
    lanes: Sequence[Views],
    objective: Objective,
    first_lane: int,
    stop: int,
    memory: PersistentField | None = None,
    labels: Tensor | None = None,
) -> FieldResult:
    """Loss and embedding gradients, formed per lane against all columns and summed in tree order (collective).

    Args:
        lanes: embeddings of this rank's lanes, without graph.
        objective: resolved for this step.
        first_lane: global number of this rank's first lane.
        stop: this rank's stop code.
        memory: the rows of a persistent field, which supervise and then recur; only for that kind of objective.
        labels: (b,) of this rank's samples, in lane order, for objectives that need them.
    """
    count, m = len(lanes), lanes[0][0].shape[0]
    exchange = ExactColumns()
    columns_u, columns_v = exchange.gather(torch.stack([torch.cat([pair[k] for pair in lanes]) for k in (0, 1)]))
    everyones = None if labels is None else group.all_gather_rows(labels)
    supervisors = _supervisors(lanes, objective, memory)
    results = []
    sums: dict[str, group.TreeSum[Tensor]] = {"u": group.TreeSum(count), "v": group.TreeSum(count)}
    used = {"u": False, "v": False}
    for i, (u, v) in enumerate(lanes):
        first_row, p = (first_lane + i) * m, supervisors[i]
        result = value_and_gradient(objective, u, v, columns_u, columns_v, first_row, everyones, supervisor=p)
        for name, part in (("u", result.columns_u), ("v", result.columns_v)):
            if part is not None:
                sums[name].add(part)
                used[name] = True
        results.append(result)
    seen = [name for name in sums if used[name]]
    home = dict(zip(seen, exchange.send_home(torch.stack([sums[name].total() for name in seen])), strict=True))
    du = [r.rows_u + home["u"][i * m : (i + 1) * m] if "u" in home else r.rows_u for i, r in enumerate(results)]
    dv = [r.rows_v + home["v"][i * m : (i + 1) * m] if "v" in home else r.rows_v for i, r in enumerate(results)]
    names = ["loss", *results[0].parts]
    reports = {n: torch.stack([(r.loss if n == "loss" else r.parts[n]).double() for r in results]) for n in names}
    if memory is not None and objective.recursion == "persistent":
        reports |= memory.recur(lanes, columns_v, objective)
    rows = len(columns_u)
    loss, parts, code = _lane_means(reports, stop, rows)
    if everyones is not None:
        parts["ideal"] = objective.at_ideal(rows, everyones)
    return FieldResult([(a / rows, b / rows) for a, b in zip(du, dv, strict=True)], loss, parts, code)


def averaged_field(
    lanes: Sequence[Views],
    objective: Objective,
    exchange: str,
    stop: int,
    memory: PersistentField | None = None,
    labels: Tensor | None = None,
) -> FieldResult:
    """Loss and embedding gradients of all local rows at once (collective).

    Args:
        lanes, objective, stop, memory, labels: as for `exact_field`.
        exchange: how columns travel, "gather" or "ring"; the columns of a persistent field are gathered.
    """
    if memory is not None and objective.recursion == "persistent":
        return _averaged_persistent(lanes, objective, memory, stop)
    u, v = (torch.cat([pair[k] for pair in lanes]).requires_grad_() for k in (0, 1))
    local, parts = FieldLoss(objective, exchange=exchange)(u, v, labels, parts=True)
    du, dv = torch.autograd.grad(local, (u, v), materialize_grads=True)
    loss, means, code = _rank_means(local.detach(), parts, stop)
    if labels is not None:
        means["ideal"] = objective.at_ideal(len(u) * group.world_size(), group.all_gather_rows(labels))
    sizes = [len(pair[0]) for pair in lanes]
    return FieldResult(list(zip(du.split(sizes), dv.split(sizes), strict=True)), loss, means, code)


def _averaged_persistent(
    lanes: Sequence[Views], objective: Objective, memory: PersistentField, stop: int
) -> FieldResult:
    """`averaged_field` with remembered supervisors."""
    supervisor = Restricted.cat(memory.supervisors(lanes))
    u, v = (torch.cat([pair[k] for pair in lanes]) for k in (0, 1))
    columns, b = GatheredColumns(), len(u)
    everyone = columns.gather(v[None])[0]
    result = value_and_gradient(objective, u, v, everyone, everyone, group.rank() * b, supervisor=supervisor)
    assert result.columns_v is not None
    home = columns.send_home(result.columns_v[None])[0]
    parts = {**result.parts, **{name: x.sum() for name, x in memory.recur(lanes, everyone, objective).items()}}
    loss, means, code = _rank_means(result.loss / b, {name: x / b for name, x in parts.items()}, stop)
    sizes = [len(pair[0]) for pair in lanes]
    du, dv = ((x / b).to(u.dtype).split(sizes) for x in (result.rows_u, home))
    return FieldResult(list(zip(du, dv, strict=True)), loss, means, code)


def _supervisors(
    lanes: Sequence[Views], objective: Objective, memory: PersistentField | None
) -> Sequence[Restricted | None]:
    if memory is None or objective.recursion != "persistent":
        return [None] * len(lanes)
    return memory.supervisors(lanes)


def _lane_means(reports: dict[str, Tensor], stop: int, rows: int) -> tuple[float, dict[str, float], int]:
    """Means over the global batch, added in lane order, and the largest stop code."""
    names = list(reports)
    local = torch.stack([*reports.values(), torch.full_like(reports["loss"], stop)], dim=1)
    everyone = group.all_gather_rows(local).cpu()
    sums = group.tree_sum([row.clone() for row in everyone[:, :-1]])
    means = {name: float(value) / rows for name, value in zip(names, sums, strict=True)}
    return means.pop("loss"), means, int(everyone[:, -1].max())


def _rank_means(loss: Tensor, parts: dict[str, Tensor], stop: int) -> tuple[float, dict[str, float], int]:
    names = list(parts)
    local = torch.stack([loss.double(), *(parts[n].detach().double() for n in names), loss.new_tensor(stop).double()])
    everyone = group.all_gather_rows(local[None]).cpu()
    means = everyone[:, :-1].mean(0).tolist()
    return means[0], dict(zip(names, means[1:], strict=True)), int(everyone[:, -1].max())
