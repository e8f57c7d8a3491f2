"""Checks of what a loss is called with, made once per call and agreed on by all ranks.

A rank that raises alone leaves its peers waiting in the next collective. So every rank first looks at its own input,
then all exchange a few numbers, and all raise the same error, which names the argument and the rank.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rkdo_dist.exchange.group import Group, all_gather_rows, gather_objects, rank
from rkdo_dist.field.objectives import Objective

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# How far the squared norm of a row may be from 1: normalising in bfloat16 errs by less, and wider tensors may hold
# embeddings that were narrow before.
NORM_TOLERANCE = 0.03
ONE_SAMPLE = "u and v: a global batch of one sample has no other column to compare with"
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# How far, in proportion, the ranks' temperatures may be apart: what the same arithmetic on other devices may differ by.
TEMPERATURE_TOLERANCE = 1e-4


class FieldInputError(ValueError):
    """A loss was called with input it cannot use; raised alike on every rank."""


@dataclass(frozen=True)
class Shares:
    """How many rows, and extra columns, each rank brings.

    Attributes:
        rows: b of every rank.
        extra: m of every rank.
    """

    rows: tuple[int, ...]
    extra: tuple[int, ...]

    @property
    def columns(self) -> tuple[int, ...]:
        """Columns of every rank: its rows' own and the extra ones."""
        return tuple(b + m for b, m in zip(self.rows, self.extra, strict=True))

    @property
    def mean_rows(self) -> float:
        """B / W: what a rank's sum is divided by, so that the mean over ranks is the mean over all rows."""
        return sum(self.rows) / len(self.rows)


def check_inputs(
    u: Tensor,
    v: Tensor,
    labels: Tensor | None,
    temperature: Tensor | None,
    extra: Tensor | None,
    objective: Objective,
    world: int,
    group: Group,
    ring: bool,
) -> Shares:
    """Refuse input that would give wrong numbers, on every rank alike.

    Costs one pass over the embeddings, one small all-gather if world > 1, and one host synchronisation.

    Args:
        u, v, labels, temperature, extra: the arguments of the loss.
        objective: its objective.
        world: number of ranks that share columns; 1 for local columns.
        group: their process group.
        ring: whether columns go round a ring: all ranks must have equal numbers of rows, and no extra columns.

    Returns:
        Each rank's rows and extra columns.

    Raises:
        FieldInputError: naming argument and rank.
    """
    problem = _local_problem(u, v, labels, temperature, extra, objective, ring)
    device = u.device if isinstance(u, Tensor) and not u.is_meta else torch.device("cpu")
    facts = [float(problem is not None), float(zlib.crc32(repr(objective).encode()))]
    if problem is None:
        m = 0 if extra is None else extra.shape[0]
        learned = temperature is not None and temperature.requires_grad
        facts += [u.shape[0], u.shape[1], DTYPES.index(u.dtype), m, learned]
        deviations = [_norm_deviation(x) for x in (u, v)]
        deviations.append(_norm_deviation(extra) if extra is not None and m else deviations[0])
        tau = torch.tensor(objective.temperature) if temperature is None else temperature.detach()
        measured = torch.stack([*deviations, tau.to(device, torch.float64).reshape(())])
    else:
        facts += [0.0, 0.0, 0.0, 0.0, 0.0]
        measured = torch.ones(4, dtype=torch.float64, device=device)
    row = torch.cat([torch.tensor(facts, dtype=torch.float64).to(device), measured])[None]
    table = (all_gather_rows(row, group) if world > 1 else row).tolist()
    ranks = range(world) if world > 1 else [rank(group)]
    if any(facts[0] for facts in table):
        texts = gather_objects(problem, group) if world > 1 else [problem]
        raise FieldInputError("; ".join(f"rank {r}: {text}" for r, text in zip(ranks, texts, strict=True) if text))
    rows = [int(facts[2]) for facts in table]
    if ring:
        _require_equal("row counts b", rows, "; exchange='gather' takes different ones")
    _require_equal("dimensions d", [int(facts[3]) for facts in table])
    _require_equal("dtypes", [DTYPES[int(facts[4])] for facts in table])
    _require_equal("objectives (checksums)", [f"{int(facts[1]):08x}" for facts in table])
    columns = [int(facts[5]) for facts in table]
    if sum(rows) + sum(columns) < 2:
        raise FieldInputError(ONE_SAMPLE)
    for r, facts in zip(ranks, table, strict=True):
        _check_values(r, facts, objective.affinity.unit_norm)
    _require_equal("use of a learned temperature", [bool(facts[6]) for facts in table])
    _check_temperatures([facts[10] for facts in table])
    return Shares(tuple(rows), tuple(columns))


def check_form(
    u: Tensor,
    v: Tensor,
    labels: Tensor | None,
    temperature: Tensor | None,
    extra: Tensor | None,
    objective: Objective,
    world: int,
    ring: bool,
) -> Shares:
    """What this rank sees of its input without looking at values: no collective and no synchronisation.

    Args and returns: as for `check_inputs`; all ranks are taken to have as many rows and extra columns as this one.

    Raises:
        FieldInputError: on this rank.
    """
    problem = _local_problem(u, v, labels, temperature, extra, objective, ring)
    if problem is not None:
        raise FieldInputError(problem)
    shares = Shares((len(u),) * world, (0 if extra is None else len(extra),) * world)
    if sum(shares.columns) < 2:
        raise FieldInputError(ONE_SAMPLE)
    return shares


def kept_temperature(temperature: Tensor) -> Tensor:
    """`temperature`, if a module can keep it from call to call.

    Raises:
        ValueError: otherwise, with the reason.
    """
    problem = _temperature_problem(temperature)
    if problem is None and not temperature.is_leaf:
        problem = "temperature is computed from other tensors; give it to each call: loss(u, v, temperature=...)"
    if problem is not None:
        raise ValueError(problem)
    return temperature


def _temperature_problem(temperature: object) -> str | None:
    """What keeps a value from being a scalar tensor for tau0, by its form, or None."""
    if not isinstance(temperature, Tensor):
        return f"temperature must be a floating-point scalar tensor, got {type(temperature).__name__}"
    if temperature.numel() != 1 or not temperature.is_floating_point():
        shape = tuple(temperature.shape)
        return f"temperature must be a number or a floating-point scalar, got {temperature.dtype} {shape}"
    return None


def _local_problem(
    u: Tensor,
    v: Tensor,
    labels: Tensor | None,
    temperature: Tensor | None,
    extra: Tensor | None,
    objective: Objective,
    ring: bool,
) -> str | None:
    """What is wrong with this rank's arguments by their form, or None."""
    problem = _views_problem(u, v, objective)
    if problem is None and extra is not None:
        problem = _extra_problem(u, extra, objective, ring)
    if problem is None and temperature is not None:
        problem = _temperature_problem(temperature)
    return problem or _labels_problem(u, labels, objective)


def _views_problem(u: Tensor, v: Tensor, objective: Objective) -> str | None:
    for name, x in (("u", u), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 2:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            return f"{name} must be a tensor of embeddings (b, d), got {shape}"
        if x.layout is not torch.strided:
            return f"{name} must be dense, got the layout {str(x.layout).removeprefix('torch.')}"
        if x.dtype not in DTYPES:
            return f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}"
        if x.shape[0] == 0 or x.shape[1] == 0:
            return f"{name} is empty: shape {tuple(x.shape)}"
        if objective.affinity.pools and x.shape[1] < 2:
            return f"{name} must hold the logits of at least 2 clusters (b, C), got {tuple(x.shape)}"
    for what in ("shape", "dtype", "device"):
        a, b = getattr(u, what), getattr(v, what)
        if a != b:
            return f"u and v must have the same {what}, got {a} and {b}".replace("torch.Size", "")
    return "u and v are on the device meta and hold no numbers" if u.is_meta else None


def _extra_problem(u: Tensor, extra: Tensor, objective: Objective, ring: bool) -> str | None:
    listed = objective.supervisor not in ("identity", "labels")
    if objective.pairing != "cross" or objective.symmetric or listed or ring:
        return (
            "extra_columns go with pairing='cross', symmetric=False, a supervisor that is the identity or labels, "
            "and exchange='gather' or 'local'"
        )
    if not isinstance(extra, Tensor) or extra.dim() != 2 or extra.shape[1] != u.shape[1]:
        shape = tuple(extra.shape) if isinstance(extra, Tensor) else type(extra).__name__
        return f"extra_columns must be embeddings (m, {u.shape[1]}), got {shape}"
    if (extra.dtype, extra.device) != (u.dtype, u.device):
        return f"extra_columns must be {u.dtype} on {u.device} as u and v, got {extra.dtype} on {extra.device}"
    return None


def _labels_problem(u: Tensor, labels: Tensor | None, objective: Objective) -> str | None:
    if not objective.needs_labels:
        return None if labels is None else f"labels are given, but objective {objective.name} takes none"
    if labels is None:
        return f"labels are missing: objective {objective.name} needs labels (b,)"
    if not isinstance(labels, Tensor):
        return f"labels must be a tensor of ({u.shape[0]},) integers, got {type(labels).__name__}"
    if labels.dtype not in LABEL_DTYPES or tuple(labels.shape) != (u.shape[0],) or labels.device != u.device:
        return (
            f"labels must be ({u.shape[0]},) integers on {u.device}, "
            f"got {tuple(labels.shape)} {labels.dtype} on {labels.device}"
        )
    return None


def _norm_deviation(x: Tensor) -> Tensor:
    """The largest | |x_i|^2 - 1 |, float64 scalar; NaN or infinite if any entry is."""
    squares = torch.linalg.vector_norm(x.detach(), dim=1, dtype=torch.promote_types(x.dtype, torch.float32)).square()
    return (squares - 1).abs().amax().double()


def _require_equal(what: str, found: Sequence[object], hint: str = "") -> None:
    """Facts that must agree between ranks."""
    if any(x != found[0] for x in found):
        listed = ", ".join(f"rank {r}: {x}" for r, x in enumerate(found))
        raise FieldInputError(f"u and v need equal {what} on all ranks, got {listed}{hint}")


def _check_values(rank: int, facts: list[float], unit_norm: bool) -> None:
    """Norms and temperature of one rank; a comparison with NaN is False."""
    allowed = NORM_TOLERANCE if unit_norm else sys.float_info.max
    for name, deviation in zip(("u", "v", "extra_columns"), facts[7:10], strict=True):
        if not deviation <= allowed:
            raise FieldInputError(f"rank {rank}: {_norm_text(name, deviation)}")
    if not 0 < facts[10] < float("inf"):
        raise FieldInputError(f"rank {rank}: temperature must be finite and > 0, got {facts[10]}")


def _check_temperatures(found: Sequence[float]) -> None:
    """All ranks' temperatures must be one."""
    if max(found) - min(found) > TEMPERATURE_TOLERANCE * max(found):
        listed = ", ".join(f"rank {r}: {x:.6g}" for r, x in enumerate(found))
        raise FieldInputError(
            f"temperature must be equal on all ranks, got {listed}; "
            "begin with one value, and give its optimizer the same settings, on every rank"
        )


def _norm_text(name: str, deviation: float) -> str:
    if deviation != deviation or deviation == float("inf"):
        return f"{name} has entries that are not finite, or too large to be squared"
    return (
        f"{name} must have rows of unit norm, but a squared norm differs from 1 by {deviation:.3g}; "
        f"use torch.nn.functional.normalize({name}, dim=1), or the loss's normalise=True"
    )
