"""The front door to the field: loss modules for any PyTorch training loop, on one process or many.

    loss_fn = RKDOLoss()
    loss = loss_fn(u, v)      # u, v: this rank's unit-norm embeddings of the two views, (b, d)
    loss.backward()

Under a process group the columns are those of all ranks, and `loss` is the mean over this rank's rows. With DDP's (or
ZeRO's) averaging of parameter gradients the step is exactly the gradient of the mean over the global batch, a learnable
temperature included. Every rank must call the loss and its backward. Importing this module imports torch only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rkdo_dist.exchange.group import Group, all_gather_rows
from rkdo_dist.field.objectives import Objective
from rkdo_dist.losses.function import EXCHANGES, Call, columns_of, field_loss
from rkdo_dist.losses.inputs import check_inputs


class FieldLoss(nn.Module):
    """The loss of any `Objective`, in bounded memory; the named losses below are shorthands for it.

    Args:
        objective: what to compute.
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
        objective: Objective,
        *,
        exchange: str = "gather",
        group: Group = None,
        temperature: Tensor | None = None,
        validate: bool = True,
    ) -> None:
        super().__init__()
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
        self.objective = objective
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
            labels: (b,) integers, for `SupervisedLoss`.
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
        columns = columns_of(self.exchange, self.group)
        if self.validate:
            check_inputs(u, v, labels, tau, objective, columns.world, self.group)
        if tau is not None:
            objective = objective.with_temperature(float(tau.detach()))
        if objective.needs_labels and labels is not None:
            labels = all_gather_rows(labels, self.group) if columns.world > 1 else labels
        wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (u, v, tau))
        loss, values = field_loss(u, v, tau, Call(objective, columns, labels, parts, wanted))
        if not parts:
            return loss
        return loss, dict(zip(objective.part_names, values.unbind(), strict=True))

    def extra_repr(self) -> str:
        """Shown by print()."""
        return f"{self.objective}, exchange={self.exchange!r}"


class RKDOLoss(FieldLoss):
    """RKDO with in-batch recursion (Martin 2025, eq. 1-4): the sum over levels of mean_i KL(p(t) || q(t)).

    Args:
        depth: number of levels D >= 1.
        coupling: alpha in [0, 1], one number or one per level.
        temperature: tau0 > 0; a number, or a scalar tensor (an `nn.Parameter` is learned).
        cooling: beta in [0, 1).
        pairing: "cross" (rows of view 1, columns of view 2) or "joint" (2B rows and columns, self excluded).
        supervisor_grad: "flow" (gradients pass through p) or "stop".
        symmetric: for "cross", the mean of both directions.
        clock: "depth" (temperature falls with the level) or "training" (with `set_progress`).
        exchange, group, validate: see `FieldLoss`.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        depth: int = 3,
        coupling: float | Sequence[float] = 0.5,
        temperature: float | Tensor = 0.5,
        cooling: float = 0.1,
        pairing: str = "cross",
        supervisor_grad: str = "flow",
        symmetric: bool = False,
        clock: str = "depth",
        *,
        exchange: str = "gather",
        group: Group = None,
        validate: bool = True,
    ) -> None:
        number, tensor = _split_temperature(temperature)
        self._settings = (depth, coupling, number, cooling, pairing, supervisor_grad, symmetric, clock)
        objective = Objective.rkdo(*self._settings)
        super().__init__(objective, exchange=exchange, group=group, temperature=tensor, validate=validate)

    def set_progress(self, progress: float) -> None:
        """Share of the training done, in [0, 1], for clock="training"."""
        self.objective = Objective.rkdo(*self._settings, progress=progress)


class IConLoss(FieldLoss):
    """I-Con: mean_i KL(p || q) with p = (1 - debias) identity + debias / N, the positive column included.

    Args:
        debias: a in [0, 1].
        temperature, pairing, symmetric: see `RKDOLoss`; exchange, group, validate: see `FieldLoss`.
    """

    def __init__(
        self,
        debias: float = 0.2,
        temperature: float | Tensor = 0.5,
        pairing: str = "cross",
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
        temperature: float | Tensor = 0.5,
        pairing: str = "cross",
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
        temperature: float | Tensor = 0.1,
        debias: float = 0.0,
        pairing: str = "joint",
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
