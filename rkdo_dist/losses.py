"""The field loss as modules for any PyTorch training loop, on one process or many.

    loss_fn = RKDOLoss()
    loss = loss_fn(u, v)      # u, v: this rank's unit-norm embeddings of the two views, (b, d)
    loss.backward()

Under a process group the columns are those of all ranks, and `loss` is the mean over this rank's rows. With DDP's (or
ZeRO's) averaging of parameter gradients the step is exactly the gradient of the mean over the global batch, a learnable
temperature included. Every rank must call the loss and its backward. Importing this module imports torch only.

Where all columns are resident, forward computes loss and gradients in one pass over the field, and backward only
scales them and sends the columns' share home. On a ring, forward makes the walks for the loss and backward one more.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rkdo_dist.exchange.columns import GatheredColumns, LocalColumns, RingColumns
from rkdo_dist.exchange.group import Group, all_gather_rows, gather_objects, rank
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.presets import COOLING, COUPLING, DEPTH, PRESETS
from rkdo_dist.field.tiled import FieldRows, computing_dtype

EXCHANGES = ("gather", "ring", "local")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# How far the squared norm of a row may be from 1: normalising in bfloat16 errs by less, and wider tensors may hold
# embeddings that were narrow before.
NORM_TOLERANCE = 0.03
_RKDO, _ICON, _INFONCE, _SUPCON = (PRESETS[name] for name in ("rkdo", "icon", "infonce", "supcon"))

Columns = LocalColumns | GatheredColumns | RingColumns


class FieldInputError(ValueError):
    """A loss was called with input it cannot use; raised alike on every rank."""


class FieldLoss(nn.Module):
    """The loss of any objective, in bounded memory; the named losses below are shorthands for it.

    Args:
        objective: what to compute: an `Objective`, or the name of a preset ("simclr", see `field.presets`).
        exchange: how columns travel between ranks: "gather" (all on every rank), "ring" (at most two blocks besides
            the rank's own, three walks), "local" (the columns are this rank's samples only).
        group: process group; None is the default group, or one rank without a process group.
        temperature: a scalar tensor that replaces tau0; an `nn.Parameter` is learned.
        validate: check every call's inputs and that all ranks agree (one small collective and one host
            synchronisation). Without, wrong input may give wrong numbers or a rank that waits for ever.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        objective: Objective | str,
        *,
        exchange: str = "gather",
        group: Group = None,
        temperature: Tensor | None = None,
        validate: bool = True,
    ) -> None:
        super().__init__()
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
        if isinstance(objective, str) and objective not in PRESETS:
            raise ValueError(f"objective must be one of {', '.join(PRESETS)}, got {objective!r}")
        self.objective = Objective.of(objective) if isinstance(objective, str) else objective
        self.exchange = exchange
        self.group = group
        self.temperature = temperature
        self.validate = validate

    def forward(
        self,
        u: Tensor,
        v: Tensor,
        labels: Tensor | None = None,
        *,
        temperature: Tensor | None = None,
        parts: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Mean over this rank's rows of their losses against all columns.

        Args:
            u, v: this rank's unit-norm embeddings of view 1 and view 2, (b, d) with b equal on all ranks; float64
                (computed in float64), float32, bfloat16 or float16 (computed in float32, also under autocast).
            labels: (b,) integers, for objectives whose supervisor is labels.
            temperature: scalar tensor that replaces tau0 in this call (`1 / logit_scale.exp()` in CLIP's terms).
            parts: whether to return the parts of the loss as well.

        Returns:
            The loss, a scalar in the computing precision; with parts=True also a dictionary of scalars without
            gradient, means over this rank's rows: `kl_t` of every level, `cross_entropy` and `entropy_p` (their
            difference is the loss), `positive_mass` (mass of the last learned row on the positive columns), `uniform`
            (the value if every learned row were uniform).

        Raises:
            FieldInputError: on every rank alike, naming argument and rank: shapes, dtypes or devices that disagree, an
                empty batch, a global batch of one sample, embeddings that are not finite or not of unit norm, labels
                missing or not integers, row counts or objectives that differ between ranks, a temperature <= 0.
        """
        tau = self.temperature if temperature is None else temperature
        objective = self.objective
        columns = _columns(self.exchange, self.group)
        if self.validate:
            _check_inputs(u, v, labels, tau, objective, columns.world, self.group)
        if tau is not None:
            objective = objective.with_temperature(float(tau.detach()))
        if objective.needs_labels and labels is not None:
            labels = all_gather_rows(labels, self.group) if columns.world > 1 else labels
        wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (u, v, tau))
        loss, values = _FieldFunction.apply(u, v, tau, _Call(objective, columns, labels, parts, wanted))
        if not parts:
            return loss
        return loss, dict(zip(objective.part_names, values.unbind(), strict=True))

    def extra_repr(self) -> str:
        """Shown by print()."""
        return f"{self.objective}, exchange={self.exchange!r}"


class RKDOLoss(FieldLoss):
    """RKDO with in-batch recursion (Martin 2025, eq. 1-4): the sum over levels of mean_i KL(p(t) || q(t)).

    The defaults are those of the paper's released code: depth 3, coupling 0.5, temperature 0.5, cooling 0.1, "cross".

    Args:
        depth: number of levels D >= 1.
        coupling: alpha in [0, 1], one number or one per level.
        temperature: tau0 > 0; a number, or a scalar tensor (an `nn.Parameter` is learned).
        cooling: beta in [0, 1).
        pairing: "cross" (rows of view 1, columns of view 2) or "joint" (2B rows and columns, self excluded).
        supervisor_grad: "flow" (gradients pass through p) or "stop".
        symmetric: for "cross", the mean of both directions.
        clock: "depth" (temperature falls with the level) or "training" (with `set_progress`).
        debias: a in [0, 1]: the recursion begins with p(0) = (1 - a) identity + a / N.
        exchange, group, validate: see `FieldLoss`.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        depth: int = DEPTH,
        coupling: float | Sequence[float] = COUPLING,
        temperature: float | Tensor = _RKDO.temperature,
        cooling: float = COOLING,
        pairing: str = _RKDO.pairing,
        supervisor_grad: str = "flow",
        symmetric: bool = False,
        clock: str = "depth",
        debias: float = 0.0,
        *,
        exchange: str = "gather",
        group: Group = None,
        validate: bool = True,
    ) -> None:
        number, tensor = _split_temperature(temperature)
        self._settings = (depth, coupling, number, cooling, pairing, supervisor_grad, symmetric, clock)
        self._debias = debias
        objective = Objective.rkdo(*self._settings, debias=debias)
        super().__init__(objective, exchange=exchange, group=group, temperature=tensor, validate=validate)

    def set_progress(self, progress: float) -> None:
        """Share of the training done, in [0, 1], for clock="training"."""
        self.objective = Objective.rkdo(*self._settings, progress, self._debias)


class IConLoss(FieldLoss):
    """I-Con: mean_i KL(p || q) with p = (1 - debias) identity + debias / N, the positive column included.

    Args:
        debias: a in [0, 1].
        temperature, pairing, symmetric: see `RKDOLoss`; exchange, group, validate: see `FieldLoss`.
    """

    def __init__(
        self,
        debias: float = _ICON.debias or 0.0,
        temperature: float | Tensor = _ICON.temperature,
        pairing: str = _ICON.pairing,
        symmetric: bool = False,
        *,
        exchange: str = "gather",
        group: Group = None,
        validate: bool = True,
    ) -> None:
        number, tensor = _split_temperature(temperature)
        objective = Objective.icon(debias, number, pairing, symmetric)
        super().__init__(objective, exchange=exchange, group=group, temperature=tensor, validate=validate)


class InfoNCELoss(FieldLoss):
    """InfoNCE: symmetric=True is CLIP's loss, pairing="joint" is SimCLR's NT-Xent.

    Args:
        temperature, pairing, symmetric: see `RKDOLoss`; exchange, group, validate: see `FieldLoss`.
    """

    def __init__(
        self,
        temperature: float | Tensor = _INFONCE.temperature,
        pairing: str = _INFONCE.pairing,
        symmetric: bool = False,
        *,
        exchange: str = "gather",
        group: Group = None,
        validate: bool = True,
    ) -> None:
        number, tensor = _split_temperature(temperature)
        objective = Objective.infonce(number, pairing, symmetric)
        super().__init__(objective, exchange=exchange, group=group, temperature=tensor, validate=validate)


class SupervisedLoss(FieldLoss):
    """KL(p || q) with p spread over the columns of the same label (SupCon's shape); called as `loss(u, v, labels)`.

    SupCon's own value is the part `cross_entropy`: it differs by the entropy of p, which has no gradient.

    Args:
        temperature: tau > 0; a number or a scalar tensor.
        debias: a in [0, 1], see `IConLoss`.
        pairing, symmetric: see `RKDOLoss`; exchange, group, validate: see `FieldLoss`.
    """

    def __init__(
        self,
        temperature: float | Tensor = _SUPCON.temperature,
        debias: float = 0.0,
        pairing: str = _SUPCON.pairing,
        symmetric: bool = False,
        *,
        exchange: str = "gather",
        group: Group = None,
        validate: bool = True,
    ) -> None:
        number, tensor = _split_temperature(temperature)
        objective = Objective.supervised(number, debias, pairing, symmetric)
        super().__init__(objective, exchange=exchange, group=group, temperature=tensor, validate=validate)


def _split_temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """A number for the objective, and the tensor if the temperature is one."""
    if not isinstance(temperature, Tensor):
        return temperature, None
    if temperature.numel() != 1 or not temperature.is_floating_point():
        shape = tuple(temperature.shape)
        raise ValueError(f"temperature must be a number or a floating-point scalar, got {temperature.dtype} {shape}")
    return float(temperature.detach()), temperature


def _columns(exchange: str, group: Group) -> Columns:
    """The columns that travel as `exchange` says, one of `EXCHANGES`."""
    if exchange == "local":
        return LocalColumns()
    return RingColumns(group) if exchange == "ring" else GatheredColumns(group)


@dataclass(frozen=True)
class _Call:
    """One call of a loss: what does not take part in autograd.

    Attributes:
        objective: what to compute, with this call's temperature.
        columns: how columns travel.
        labels: (B,) labels of the global batch, for objectives that need them.
        parts: whether the parts are asked for.
        differentiable: whether a backward pass may follow.
    """

    objective: Objective
    columns: Columns
    labels: Tensor | None
    parts: bool
    differentiable: bool

    def own_block(self, u: Tensor, v: Tensor) -> Tensor:
        """This rank's columns (V, b, d) in the computing precision, contiguous."""
        views, dtype = {"u": u.detach(), "v": v.detach()}, computing_dtype(u.dtype)
        chosen = [views[name].to(dtype) for name in self.objective.column_views]
        return torch.stack(chosen) if len(chosen) > 1 else chosen[0].contiguous()[None]

    def rows(self, u: Tensor, v: Tensor) -> FieldRows:
        """This rank's rows of the field."""
        b, columns = len(u), self.columns
        batch = columns.world * b
        block = batch if columns.resident else b
        views = {"u": u.detach(), "v": v.detach()}
        return FieldRows(self.objective, views, batch, columns.rank * b, block, self.labels, self.parts)


class _FieldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, temperature: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        with torch.autocast(u.device.type, enabled=False):
            own, field = call.own_block(u, v), call.rows(u, v)
            home = _walk(call, field, own)
            field.release()
            loss = (field.loss() / len(u)).to(own.dtype)
            parts = torch.stack(list(field.parts().values())) / len(u) if call.parts else loss.new_empty(0)
        parts = parts.to(own.dtype)
        ctx.mark_non_differentiable(parts)
        if call.differentiable:
            ctx.save_for_backward(u, v, temperature)
            ctx.call, ctx.field, ctx.home = call, field, home
        return loss, parts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradients below would look like constants
            raise RuntimeError("the field loss has no second derivative; field.objectives.dense has")
        u, v, temperature = ctx.saved_tensors  # raises if u or v were changed in place since
        call, field = ctx.call, ctx.field
        scale = gradient / len(u)
        with torch.autocast(u.device.type, enabled=False):
            home = _gradients_home(call, field, call.own_block(u, v), ctx.home, scale)
            found = {name: rows * scale for name, rows in field.gradients.items()}
            for name, part in zip(call.objective.column_views, home, strict=True):
                found[name] += part
            slope = None
            if temperature is not None:
                slope = (field.temperature_gradient() * scale).to(temperature.dtype).view_as(temperature)
        return found["u"].to(u.dtype), found["v"].to(v.dtype), slope, None


def _walk(call: _Call, field: FieldRows, own: Tensor) -> Tensor | None:
    """Everything the loss needs; with resident columns also all gradients (those of the columns are returned)."""
    columns = call.columns
    if isinstance(columns, RingColumns):
        for walk in field.walks:
            for first, block in columns.walk(own):
                field.visit(walk, block, first)
        return None
    block = columns.gather(own)
    if call.differentiable:
        home = torch.zeros_like(block)
        field.fused(block, home)
        return home
    for walk in field.walks:
        field.visit(walk, block, 0)
    return None


def _gradients_home(call: _Call, field: FieldRows, own: Tensor, home: Tensor | None, scale: Tensor) -> Tensor:
    """The gradient of this rank's columns (V, b, d), summed over ranks, times each rank's `scale`."""
    if isinstance(call.columns, RingColumns):
        field.clear_gradients()

        def visit(block: Tensor, first: int, gradient: Tensor) -> None:
            field.differentiate(block, first, gradient)
            gradient.mul_(scale)

        return call.columns.walk_home(own, visit)
    assert home is not None
    return call.columns.send_home(home * scale)


def _check_inputs(
    u: Tensor,
    v: Tensor,
    labels: Tensor | None,
    temperature: Tensor | None,
    objective: Objective,
    world: int,
    group: Group,
) -> None:
    """Refuse input that would give wrong numbers, on every rank alike.

    Costs one pass over the embeddings, one small all-gather if world > 1, and one host synchronisation.

    Args:
        u, v, labels, temperature: the arguments of the loss.
        objective: its objective.
        world: number of ranks that share columns; 1 for local columns.
        group: their process group.

    Raises:
        FieldInputError: naming argument and rank.
    """
    problem = _local_problem(u, v, labels, objective)
    device = u.device if isinstance(u, Tensor) else torch.device("cpu")
    facts = [float(problem is not None), float(zlib.crc32(repr(objective).encode()))]
    if problem is None:
        facts += [u.shape[0], u.shape[1], DTYPES.index(u.dtype)]
        measured = torch.stack([_norm_deviation(u), _norm_deviation(v), _temperature_value(temperature, u)])
    else:
        facts += [0.0, 0.0, 0.0]
        measured = torch.ones(3, dtype=torch.float64, device=device)
    row = torch.cat([torch.tensor(facts, dtype=torch.float64).to(device), measured])[None]
    table = (all_gather_rows(row, group) if world > 1 else row).tolist()
    ranks = range(world) if world > 1 else [rank(group)]
    if any(facts[0] for facts in table):
        texts = gather_objects(problem, group) if world > 1 else [problem]
        raise FieldInputError("; ".join(f"rank {r}: {text}" for r, text in zip(ranks, texts, strict=True) if text))
    _require_equal("row counts b", [int(facts[2]) for facts in table])
    _require_equal("dimensions d", [int(facts[3]) for facts in table])
    _require_equal("dtypes", [DTYPES[int(facts[4])] for facts in table])
    _require_equal("objectives (checksums)", [f"{int(facts[1]):08x}" for facts in table])
    if world * u.shape[0] < 2:
        raise FieldInputError("u and v: a global batch of one sample has no other column to compare with")
    for r, facts in zip(ranks, table, strict=True):
        _check_values(r, facts)


def _local_problem(u: Tensor, v: Tensor, labels: Tensor | None, objective: Objective) -> str | None:
    """What is wrong with this rank's arguments by their form, or None."""
    for name, x in (("u", u), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 2:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            return f"{name} must be a tensor of embeddings (b, d), got {shape}"
        if x.dtype not in DTYPES:
            return f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}"
        if x.shape[0] == 0 or x.shape[1] == 0:
            return f"{name} is empty: shape {tuple(x.shape)}"
    for what in ("shape", "dtype", "device"):
        a, b = getattr(u, what), getattr(v, what)
        if a != b:
            return f"u and v must have the same {what}, got {a} and {b}".replace("torch.Size", "")
    if not objective.needs_labels:
        return None
    if labels is None:
        return f"labels are missing: objective {objective.name} needs labels (b,)"
    if labels.is_floating_point() or tuple(labels.shape) != (u.shape[0],) or labels.device != u.device:
        return (
            f"labels must be ({u.shape[0]},) integers on {u.device}, "
            f"got {tuple(labels.shape)} {labels.dtype} on {labels.device}"
        )
    return None


def _norm_deviation(x: Tensor) -> Tensor:
    """The largest | |x_i|^2 - 1 |, float64 scalar; NaN or infinite if any entry is."""
    squares = torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.promote_types(x.dtype, torch.float32)).square()
    return (squares - 1).abs().amax().double()


def _temperature_value(temperature: Tensor | None, like: Tensor) -> Tensor:
    if temperature is None:
        return torch.ones((), dtype=torch.float64, device=like.device)
    return temperature.detach().to(like.device, torch.float64).reshape(())


def _require_equal(what: str, found: Sequence[object]) -> None:
    """Facts that must agree between ranks."""
    if any(x != found[0] for x in found):
        listed = ", ".join(f"rank {r}: {x}" for r, x in enumerate(found))
        raise FieldInputError(f"u and v need equal {what} on all ranks, got {listed}")


def _check_values(rank: int, facts: list[float]) -> None:
    """Norms and temperature of one rank; a comparison with NaN is False."""
    for name, deviation in zip("uv", facts[5:7], strict=True):
        if not deviation <= NORM_TOLERANCE:
            raise FieldInputError(f"rank {rank}: {_norm_text(name, deviation)}")
    if not 0 < facts[7] < float("inf"):
        raise FieldInputError(f"rank {rank}: temperature must be finite and > 0, got {facts[7]}")


def _norm_text(name: str, deviation: float) -> str:
    if deviation != deviation or deviation == float("inf"):
        return f"{name} has entries that are not finite"
    return (
        f"{name} must have rows of unit norm, but a squared norm differs from 1 by {deviation:.3g}; "
        f"use torch.nn.functional.normalize({name}, dim=1)"
    )
