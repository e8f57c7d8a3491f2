"""The field loss as modules for any PyTorch training loop, on one process or many.

    loss_fn = RKDOLoss()
    loss = loss_fn(u, v)      # u, v: this rank's unit-norm embeddings of the two views, (b, d)
    loss.backward()

Under a process group the columns are those of all ranks, and `loss` is the mean over this rank's rows. With DDP's (or
ZeRO's) averaging of parameter gradients the step is exactly the gradient of the mean over the global batch, a learnable
temperature included. Every rank must call the loss and its backward. Importing this module imports torch only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rkdo_dist.exchange.columns import GatheredColumns, LocalColumns, RingColumns, UnevenColumns
from rkdo_dist.exchange.function import Call, Columns, FieldFunction
from rkdo_dist.exchange.group import Group, world_size
from rkdo_dist.exchange.inputs import DTYPES, Shares, check_form, check_inputs, kept_temperature
from rkdo_dist.exchange.inputs import FieldInputError as FieldInputError
from rkdo_dist.field.affinity import Affinity
from rkdo_dist.field.objectives import Objective
from rkdo_dist.field.presets import COOLING, COUPLING, DEPTH, PRESETS
from rkdo_dist.field.rows import computing_dtype
from rkdo_dist.field.supervisors import Supervisor

EXCHANGES = ("gather", "ring", "local")
_RKDO, _ICON, _INFONCE, _SUPCON = (PRESETS[name] for name in ("rkdo", "icon", "infonce", "supcon"))


class FieldLoss(nn.Module):
    """The loss of any objective, in bounded memory; the named losses below are shorthands for it.

    Args:
        objective: what to compute: an `Objective`, or the name of a preset ("simclr", see `field.presets`).
        exchange: how columns travel between ranks: "gather" (all on every rank), "ring" (at most two blocks besides
            the rank's own, three walks), "local" (the columns are this rank's samples only).
        group: process group; None is the default group, or one rank without a process group.
        temperature: a scalar tensor that replaces tau0; an `nn.Parameter` is learned, by the mean gradient over ranks.
        validate: check every call's inputs and that all ranks agree (one small collective, one host synchronisation).
            Without, a rank checks the form of its own input alone; wrong values give wrong numbers, and ranks that
            disagree, as in their numbers of rows or extra columns, may be aborted or wait for ever.
        normalise: bring rows to unit norm first, in at least float32; without, they must have it for the cosine.

    Inside a `torch.compile`d step the loss is one graph break: it runs as it is between the compiled parts. It may be
    copied, pickled (with the default group) and checkpointed, and works under autocast and DDP, also with static_graph.
    There is no second or forward-mode derivative and no transform of torch.func; asking for one is a RuntimeError.

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
        normalise: bool = False,
    ) -> None:
        super().__init__()
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
        if group is not None and not isinstance(group, ProcessGroup):
            raise ValueError(f"group must be a process group, or None for the default group, got {group!r}")
        if not isinstance(objective, Objective | str):
            raise ValueError(f"objective must be an Objective or the name of one, got {objective!r}")
        if isinstance(objective, str) and objective not in PRESETS:
            raise ValueError(f"objective must be one of {', '.join(PRESETS)}, got {objective!r}")
        if isinstance(objective, str) and PRESETS[objective].relation is not None:
            raise ValueError(
                f"objective {objective!r} needs a teacher's keys, which `rkdo train` has; for a loop of your own see "
                "rkdo_dist.field.relation.value_and_gradient"
            )
        self.objective = Objective.of(objective) if isinstance(objective, str) else objective
        self.exchange = exchange
        self.group = group
        self.temperature = None if temperature is None else kept_temperature(temperature)
        self.validate = validate
        self.normalise = normalise

    def forward(
        self,
        u: Tensor,
        v: Tensor,
        labels: Tensor | None = None,
        *,
        temperature: Tensor | None = None,
        extra_columns: Tensor | None = None,
        parts: bool = False,
        supervisor: Supervisor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Mean over this rank's rows of their losses against all columns.

        Ranks may have different numbers of rows (with exchange="gather"). A rank's value is then W / B times the sum
        over its rows, so that the mean over ranks, and DDP's gradient, are those of the mean over all B rows.

        Args:
            u, v: this rank's embeddings of view 1 and view 2, (b, d), for the cosine of unit norm; float64 (computed in
                float64), float32, bfloat16 or float16 (computed in float32, also under autocast).
            labels: (b,) integers, for objectives whose supervisor is labels; others refuse them.
            temperature: scalar tensor that replaces tau0 in this call (`1 / logit_scale.exp()` in CLIP's terms).
            extra_columns: (m, d) more columns that are nobody's positive: hard negatives, or a queue (detached). Those
                of all ranks are columns of every row. For pairing="cross" that is not symmetric; not on a ring.
            parts: whether to return the parts of the loss as well.
            supervisor: p of this rank's rows, uniform share included, for an objective whose supervisor is "rows"
                (`field.supervisors.Listed`); None: the identity.

        Returns:
            The loss, a scalar in the computing precision; with parts=True also a dictionary of scalars without
            gradient, means over this rank's rows: `kl_t` of every level, `cross_entropy` and `entropy_p` (their
            difference is the loss), `positive_mass` (mass of the last learned row on the positive columns), `uniform`
            (the value if every learned row were uniform).

        Raises:
            FieldInputError: on every rank alike, naming argument and rank: shapes, dtypes or devices that disagree, an
                empty batch, a global batch of one sample, embeddings that are not finite or, for the cosine, not of
                unit norm, labels missing or not integers, objectives that differ between ranks (or row counts, on a
                ring), temperatures that do, a temperature <= 0, extra columns where they cannot be.
        """
        # Through a wrapper that keeps the compiler out, so that compiling a step need not compile this.
        run = _uncompiled if torch.compiler.is_compiling() else FieldLoss._forward
        return run(self, u, v, labels, temperature, extra_columns, parts, supervisor)

    def _forward(
        self,
        u: Tensor,
        v: Tensor,
        labels: Tensor | None,
        temperature: Tensor | None,
        extra: Tensor | None,
        parts: bool,
        supervisor: Supervisor | None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("the field loss has no torch.func transforms (grad, vmap); field.objectives.dense has")
        if supervisor is not None and self.objective.supervisor != "rows":
            raise ValueError(f"objective {self.objective.name} has a supervisor of its own and takes none")
        tau = self.temperature if temperature is None else temperature
        objective = self.objective
        world = 1 if self.exchange == "local" else world_size(self.group)
        if self.normalise:
            u, v = _normalised(u), _normalised(v)
            extra = None if extra is None else _normalised(extra)
        given, ring = (u, v, labels, tau, extra, objective, world), self.exchange == "ring"
        shares = check_inputs(*given, self.group, ring) if self.validate else check_form(*given, ring)
        columns = _columns(self.exchange, self.group, shares)
        if tau is not None:
            objective = objective.with_temperature(float(tau.detach()))
        if labels is not None:
            labels = _all_labels(labels, columns, shares)
        wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (u, v, extra, tau))
        call = Call(objective, columns, shares, labels, supervisor, parts, wanted)
        loss, values = FieldFunction.apply(u, v, extra, tau, call)
        if not parts:
            return loss
        return loss, dict(zip(objective.part_names, values.unbind(), strict=True))

    def extra_repr(self) -> str:
        """Shown by print()."""
        return f"{self.objective}, exchange={self.exchange!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> FieldLoss:
        """A copy with the same process group: a group has no copies."""
        memo[id(self.group)] = self.group
        other = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError("a loss with a process group of its own cannot be pickled: a group is its process's alone")
        return self.__dict__


# Imports the compiler when it is called, and not before: importing a loss must stay cheap.
_uncompiled = torch._disable_dynamo(FieldLoss._forward)


class RKDOLoss(FieldLoss):
    """RKDO with in-batch recursion (Martin 2025, eq. 1-4): the sum over levels of mean_i KL(p(t) || q(t)).

    The defaults are those of the paper's released code: depth 3, coupling 0.5, temperature 0.5, cooling 0.1, "cross".

    Args:
        depth: number of levels D >= 1.
        coupling: alpha in [0, 1], one number or one per level.
        temperature: tau0 > 0; a number, or a scalar tensor (an `nn.Parameter` is learned); None: 0.5 for the cosine,
            1 for other affinities.
        cooling: beta in [0, 1).
        pairing: "cross" (rows of view 1, columns of view 2) or "joint" (2B rows and columns, self excluded).
        supervisor_grad: "flow" (gradients pass through p) or "stop".
        symmetric: for "cross", the mean of both directions.
        clock: "depth" (temperature falls with the level) or "training" (with `set_progress`).
        debias: a in [0, 1]: the recursion begins with p(0) = (1 - a) identity + a / N.
        affinity: how closeness is measured: one of `field.affinity`, such as `Student(1)`, or its name. Other
            affinities than the cosine take embeddings of any length; those of clusters are the logits of C >= 2
            clusters.
        exchange, group, validate, normalise: see `FieldLoss`.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        depth: int = DEPTH,
        coupling: float | Sequence[float] = COUPLING,
        temperature: float | Tensor | None = None,
        cooling: float = COOLING,
        pairing: str = _RKDO.pairing,
        supervisor_grad: str = "flow",
        symmetric: bool = False,
        clock: str = "depth",
        debias: float = 0.0,
        *,
        affinity: Affinity | str = "cosine",
        exchange: str = "gather",
        group: Group = None,
        validate: bool = True,
        normalise: bool = False,
    ) -> None:
        number, tensor = _split_temperature(temperature)
        self._settings = (depth, coupling, number, cooling, pairing, supervisor_grad, symmetric, clock)
        self._debias = debias
        self._affinity = affinity
        objective = Objective.rkdo(*self._settings, debias=debias, affinity=affinity)
        options: dict[str, Any] = {"exchange": exchange, "group": group, "validate": validate, "normalise": normalise}
        super().__init__(objective, temperature=tensor, **options)

    def set_progress(self, progress: float) -> None:
        """Share of the training done, in [0, 1], for clock="training"."""
        self.objective = Objective.rkdo(*self._settings, progress, self._debias, self._affinity)


class IConLoss(FieldLoss):
    """I-Con: mean_i KL(p || q) with p = (1 - debias) identity + debias / N, the positive column included.

    Args:
        debias: a in [0, 1].
        temperature, pairing, symmetric, affinity: see `RKDOLoss`.
        exchange, group, validate, normalise: see `FieldLoss`.
    """

    def __init__(
        self,
        debias: float = _ICON.debias,
        temperature: float | Tensor | None = None,
        pairing: str = _ICON.pairing,
        symmetric: bool = False,
        *,
        affinity: Affinity | str = "cosine",
        exchange: str = "gather",
        group: Group = None,
        validate: bool = True,
        normalise: bool = False,
    ) -> None:
        number, tensor = _split_temperature(temperature)
        objective = Objective.icon(debias, number, pairing, symmetric, affinity)
        options: dict[str, Any] = {"exchange": exchange, "group": group, "validate": validate, "normalise": normalise}
        super().__init__(objective, temperature=tensor, **options)


class InfoNCELoss(FieldLoss):
    """InfoNCE: symmetric=True is CLIP's loss, pairing="joint" is SimCLR's NT-Xent.

    Args:
        temperature, pairing, symmetric, affinity: see `RKDOLoss`.
        exchange, group, validate, normalise: see `FieldLoss`.
    """

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        pairing: str = _INFONCE.pairing,
        symmetric: bool = False,
        *,
        affinity: Affinity | str = "cosine",
        exchange: str = "gather",
        group: Group = None,
        validate: bool = True,
        normalise: bool = False,
    ) -> None:
        number, tensor = _split_temperature(temperature)
        objective = Objective.infonce(number, pairing, symmetric, affinity)
        options: dict[str, Any] = {"exchange": exchange, "group": group, "validate": validate, "normalise": normalise}
        super().__init__(objective, temperature=tensor, **options)


class SupervisedLoss(FieldLoss):
    """KL(p || q) with p spread over the columns of the same label (SupCon's shape); called as `loss(u, v, labels)`.

    SupCon's own value is the part `cross_entropy`: it differs by the entropy of p, which has no gradient.

    Args:
        temperature: tau > 0; a number or a scalar tensor; None: 0.1 for the cosine, 1 for other affinities.
        debias: a in [0, 1], see `IConLoss`.
        pairing, symmetric, affinity: see `RKDOLoss`; exchange, group, validate, normalise: see `FieldLoss`.
    """

    def __init__(
        self,
        temperature: float | Tensor | None = None,
        debias: float = 0.0,
        pairing: str = _SUPCON.pairing,
        symmetric: bool = False,
        *,
        affinity: Affinity | str = "cosine",
        exchange: str = "gather",
        group: Group = None,
        validate: bool = True,
        normalise: bool = False,
    ) -> None:
        number, tensor = _split_temperature(temperature)
        objective = Objective.supervised(number, debias, pairing, symmetric, affinity)
        options: dict[str, Any] = {"exchange": exchange, "group": group, "validate": validate, "normalise": normalise}
        super().__init__(objective, temperature=tensor, **options)


def _split_temperature(temperature: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """A number for the objective, and the tensor if the temperature is one."""
    if not isinstance(temperature, Tensor):
        return temperature, None
    return float(kept_temperature(temperature).detach()), temperature


def _columns(exchange: str, group: Group, shares: Shares) -> Columns:
    """The columns that travel as `exchange` says, one of `EXCHANGES`."""
    if exchange == "local":
        return LocalColumns()
    if exchange == "ring":
        return RingColumns(group)
    return GatheredColumns(group) if len(set(shares.columns)) == 1 else UnevenColumns(shares.columns, group)


def _normalised(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() != 2 or x.dtype not in DTYPES:
        return x  # for the checks to refuse, on every rank
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.normalize(x.to(computing_dtype(x.dtype)), dim=1)


def _all_labels(labels: Tensor, columns: Columns, shares: Shares) -> Tensor:
    """The labels of all columns, int64; an extra column has one that no row has."""
    block = labels.new_full((shares.columns[columns.rank],), -(2**63), dtype=torch.int64)
    block[: len(labels)] = labels
    if isinstance(columns, RingColumns):
        columns = GatheredColumns(columns.group)
    return columns.gather(block[None, :, None])[0, :, 0]
