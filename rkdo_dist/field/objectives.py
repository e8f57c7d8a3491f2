"""RKDO, I-Con, InfoNCE and a supervised objective: one recursion, four settings of it.

I-Con's fixed supervisor p = (1 - a) identity + a / B is one step of the recursion from a flat field: p(1)
with coupling a and a learned row q(0) at infinite temperature. InfoNCE is that with a = 0. A supervised
objective starts from label neighbourhoods instead of the identity. So every objective is a list of
temperatures and couplings, and one implementation (dense here, `field.tiled` in bounded memory) serves all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rkdo_dist.field import recursion, schedules

PAIRINGS = ("cross", "joint")
SUPERVISOR_GRADIENTS = ("flow", "stop")
CLOCKS = ("depth", "training")


@dataclass(frozen=True)
class Slice:
    """One matrix of rows against columns that an objective is made of.

    Attributes:
        rows: the view of the rows, "u" or "v".
        columns: the views of the columns, in order: "u", "v" or "uv".
        weight: share of this matrix in the loss of a sample.
        positive: the view (position in `columns`) that holds the positive column of sample i, at index i.
        excluded: the view that holds the excluded self column of sample i (k != i in eq. 4), or None.
    """

    rows: str
    columns: str
    weight: float
    positive: int
    excluded: int | None


@dataclass(frozen=True)
class Objective:
    """A fully resolved objective: numbers only, no schedule left to evaluate. Made by the constructors below.

    Attributes:
        kind: "rkdo", "icon", "infonce", "supervised" or "persistent".
        temperature: tau0, the one that a learnable temperature replaces; all others keep their ratio to it.
        temperatures: tau(0)..tau(D); an infinite tau(0) is the flat field of the static objectives.
        couplings: alpha(1)..alpha(D).
        pairing: "cross" (rows of view 1, columns of view 2, the positive on the diagonal) or "joint" (2B
            rows and columns, the self column excluded, the positive is the other view).
        symmetric: for "cross", the mean of both directions.
        supervisor_grad: "flow" or "stop".
        row_coupling: alpha of rows that persist (`field.persistent`), applied after the step.
    """

    kind: str
    temperature: float
    temperatures: tuple[float, ...]
    couplings: tuple[float, ...]
    pairing: str = "cross"
    symmetric: bool = False
    supervisor_grad: str = "flow"
    row_coupling: float = 0.0

    def __post_init__(self) -> None:
        _require_choice("pairing", self.pairing, PAIRINGS)
        _require_choice("supervisor_grad", self.supervisor_grad, SUPERVISOR_GRADIENTS)
        if self.symmetric and self.pairing == "joint":
            raise ValueError("symmetric=True is a form of pairing='cross'; pairing='joint' is symmetric already")
        if len(self.temperatures) != len(self.couplings) + 1 or not self.couplings:
            raise ValueError(
                f"need D + 1 temperatures for D >= 1 couplings, got {len(self.temperatures)} and {len(self.couplings)}"
            )
        schedules.require_positive("temperature", self.temperature)
        for value in self.temperatures[1:]:
            schedules.require_positive("temperature", value)
        if not math.isinf(self.temperatures[0]):
            schedules.require_positive("temperature", self.temperatures[0])
        elif len(self.temperatures) > 2:
            raise ValueError("an infinite tau(0) stands for a fixed supervisor, which has one level")
        for value in (*self.couplings, self.row_coupling):
            schedules.require_share("coupling", value)

    @staticmethod
    def rkdo(
        depth: int = 3,
        coupling: float | Sequence[float] = 0.5,
        temperature: float = 0.5,
        cooling: float = 0.1,
        pairing: str = "cross",
        supervisor_grad: str = "flow",
        symmetric: bool = False,
        clock: str = "depth",
        progress: float = 0.0,
    ) -> Objective:
        """RKDO with in-batch recursion (eq. 1-4; the defaults are those of the paper's released code).

        Args:
            depth: number of levels D >= 1; the loss is the sum over levels of mean_i KL(p(t) || q(t)).
            coupling: alpha in [0, 1], one number or one per level.
            temperature: tau0 > 0.
            cooling: beta in [0, 1).
            pairing, supervisor_grad, symmetric: see the attributes.
            clock: "depth" (released code): level t has tau0 (1 - beta t / D); "training" (the paper's
                text): every level has tau0 (1 - beta progress).
            progress: share of the training done, in [0, 1]; the depth clock ignores it.

        Raises:
            ValueError: naming the argument that is out of range.
        """
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth must be a whole number >= 1, got {depth!r}")
        _require_choice("clock", clock, CLOCKS)
        schedules.require_share("progress", progress)
        couplings = tuple(coupling) if isinstance(coupling, Sequence) else (coupling,) * depth
        if len(couplings) != depth:
            raise ValueError(f"coupling needs one number, or one per level ({depth}), got {len(couplings)}")
        clocked = [t / depth if clock == "depth" else progress for t in range(depth + 1)]
        temperatures = tuple(schedules.temperature(temperature, cooling, done, 1) for done in clocked)
        return Objective("rkdo", temperature, temperatures, couplings, pairing, symmetric, supervisor_grad)

    @staticmethod
    def icon(
        debias: float = 0.2, temperature: float = 0.5, pairing: str = "cross", symmetric: bool = False
    ) -> Objective:
        """I-Con: mean_i KL(p || q) with p = (1 - a) identity + a / N over all N columns, the positive
        included.

        Args:
            debias: a in [0, 1].
            temperature: tau > 0.
            pairing, symmetric: see the attributes. In "joint" the excluded column has p = 0 and N = 2B - 1.
        """
        schedules.require_share("debias", debias)
        return Objective("icon", temperature, (math.inf, temperature), (debias,), pairing, symmetric)

    @staticmethod
    def infonce(temperature: float = 0.5, pairing: str = "cross", symmetric: bool = False) -> Objective:
        """InfoNCE (van den Oord et al. 2018): cross-entropy on the positive.

        "cross" with symmetric=True is CLIP's loss, "joint" is SimCLR's NT-Xent.
        """
        return Objective("infonce", temperature, (math.inf, temperature), (0.0,), pairing, symmetric)

    @staticmethod
    def persistent(
        coupling: float = 0.5, temperature: float = 0.5, cooling: float = 0.0, progress: float = 0.0
    ) -> Objective:
        """RKDO with recursion across training iterations: mean_i KL(p_S / m || q), p from `field.persistent`.

        Rows that have not been given are the identity, with which this is InfoNCE.

        Args:
            coupling: alpha in [0, 1], with which rows move after the step (eq. 3).
            temperature, cooling: tau0 > 0 and beta in [0, 1).
            progress: share of the training done: the temperature is tau0 (1 - beta progress), the paper's clock.
        """
        tau = schedules.temperature(temperature, cooling, progress, 1)
        return Objective("persistent", temperature, (math.inf, tau), (0.0,), row_coupling=coupling)

    @staticmethod
    def supervised(
        temperature: float = 0.1, debias: float = 0.0, pairing: str = "joint", symmetric: bool = False
    ) -> Objective:
        """KL(p || q) with p spread evenly over the columns of the same label (SupCon, Khosla et al. 2020).

        SupCon's own value is the part `cross_entropy`; the KL differs from it by the entropy of p, a
        constant. Calls with this objective need labels.
        """
        schedules.require_share("debias", debias)
        return Objective("supervised", temperature, (math.inf, temperature), (debias,), pairing, symmetric)

    @property
    def depth(self) -> int:
        """Number of levels D."""
        return len(self.couplings)

    @property
    def needs_labels(self) -> bool:
        """Whether p(0) comes from labels."""
        return self.kind == "supervised"

    @property
    def column_views(self) -> str:
        """The views that serve as columns of any row: "v" or "uv"."""
        return "uv" if self.pairing == "joint" or self.symmetric else "v"

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The row-by-column matrices whose row losses make up the loss of a sample."""
        if self.pairing == "joint":
            return (
                Slice("u", "uv", 0.5, positive=1, excluded=0),
                Slice("v", "uv", 0.5, positive=0, excluded=1),
            )
        if self.symmetric:
            return (
                Slice("u", "v", 0.5, positive=0, excluded=None),
                Slice("v", "u", 0.5, positive=0, excluded=None),
            )
        return (Slice("u", "v", 1.0, positive=0, excluded=None),)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts of the loss, in order (see `dense`)."""
        levels = tuple(f"kl_{t}" for t in range(1, self.depth + 1))
        return (*levels, "cross_entropy", "entropy_p", "positive_mass", "uniform")

    def with_temperature(self, temperature: float) -> Objective:
        """The same objective with tau0 = `temperature` and all temperatures in proportion."""
        factor = temperature / self.temperature
        return replace(self, temperature=temperature, temperatures=tuple(t * factor for t in self.temperatures))

    def column_count(self, batch: int) -> int:
        """Columns of a row that take part: B for "cross", 2B - 1 for "joint"."""
        return batch if self.pairing == "cross" else 2 * batch - 1

    def at_uniform(self, batch: int, positives: int = 1) -> float:
        """The objective's value when every learned row is uniform, as for an untrained encoder.

        Args:
            batch: B >= 2.
            positives: columns that share p(0), more than 1 only for a supervised objective.
        """
        return _two_valued(self, self.column_count(batch), positives, 0.0)

    def at_ideal(self, batch: int) -> float:
        """The objective's value at the simplex: positives at similarity 1, all others at -1 / (B - 1).

        This is the least value of InfoNCE, where the embedding has d >= B - 1 dimensions; with fewer,
        similarities cannot all be that low, and the value is only approached.
        """
        return _two_valued(self, self.column_count(batch), 1, 1 + 1 / (batch - 1))


def dense(
    objective: Objective,
    u: Tensor,
    v: Tensor,
    labels: Tensor | None = None,
    temperature: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over a whole global batch and its parts, with r x N matrices and plain autograd: the oracle.

    Args:
        u, v: unit-norm embeddings (B, d) of view 1 and view 2, floating point.
        labels: (B,) integers, for objectives that need them.
        temperature: a scalar that replaces tau0, for its gradient.
        rows: indices (r,) of the samples whose rows are averaged; all by default.

    Returns:
        The mean over samples of their row losses, and the means of its parts: `kl_t` of every level,
        `cross_entropy` and `entropy_p` summed over levels (their difference is the loss), `positive_mass`
        (mass that the last learned row puts on the positive columns), `uniform` (the value if every learned
        row were uniform).

    Raises:
        ValueError: if labels are missing.
    """
    if objective.needs_labels and labels is None:
        raise ValueError("a supervised objective needs labels")
    batch, device = u.shape[0], u.device
    scale = 1.0 if temperature is None else temperature / objective.temperature
    taus = [tau if math.isinf(tau) else tau * scale for tau in objective.temperatures]
    views = {"u": u, "v": v}
    totals = {name: u.new_zeros(()) for name in objective.part_names}
    index = torch.arange(batch, device=device)
    for piece in objective.slices:
        columns = torch.cat([views[name] for name in piece.columns])
        excluded = None
        if piece.excluded is not None:
            excluded = torch.zeros(batch, len(columns), dtype=torch.bool, device=device)
            excluded[index, index + piece.excluded * batch] = True
        initial = initial_supervisor(
            objective, piece, batch, labels if objective.needs_labels else None, excluded, u.dtype
        )
        similarity = recursion.similarities(views[piece.rows], columns)
        field = recursion.unroll(
            similarity, initial.to(device), taus, objective.couplings, excluded, objective.supervisor_grad
        )
        for name, value in _parts(objective, field, initial, batch).items():
            chosen = value if rows is None else value[rows]
            totals[name] = totals[name] + piece.weight * chosen.mean()
    return totals["cross_entropy"] - totals["entropy_p"], totals


def initial_supervisor(
    objective: Objective,
    piece: Slice,
    batch: int,
    labels: Tensor | None,
    excluded: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """p(0), (B, N): all mass on the positive column, or spread evenly over the columns of the same label."""
    index = torch.arange(batch)
    if labels is None:
        initial = torch.zeros(batch, len(piece.columns) * batch, dtype=dtype)
        initial[index, index + piece.positive * batch] = 1
        return initial
    same = (labels[:, None] == labels.repeat(len(piece.columns))[None, :]).to(dtype)
    if excluded is not None:
        same = same.masked_fill(excluded, 0)
    return same / same.sum(1, keepdim=True)


def _parts(objective: Objective, field: recursion.Field, initial: Tensor, batch: int) -> dict[str, Tensor]:
    """The parts of every row's loss, each (r,)."""
    crosses = [recursion.cross_entropy(p, log_q) for p, log_q in zip(field.p, field.log_q, strict=True)]
    entropies = [recursion.entropy(p) for p in field.p]
    parts = {f"kl_{t}": c - h for t, (c, h) in enumerate(zip(crosses, entropies, strict=True), start=1)}
    parts["cross_entropy"] = torch.stack(crosses).sum(0)
    parts["entropy_p"] = torch.stack(entropies).sum(0)
    parts["positive_mass"] = torch.where(initial > 0, field.log_q[-1].exp(), 0).sum(1)
    counts = (initial > 0).sum(1).tolist()
    values = {count: objective.at_uniform(batch, count) for count in set(counts)}
    parts["uniform"] = initial.new_tensor([values[count] for count in counts])
    return parts


def _two_valued(objective: Objective, columns: int, positives: int, gap: float) -> float:
    """The sum over levels of KL(p || q) of a row whose positives all have one similarity and all others
    another.

    Args:
        columns: N, those that take part.
        positives: columns that share p(0) evenly.
        gap: similarity of the positives minus that of the others.
    """
    if columns < 2 or not 1 <= positives <= columns:
        raise ValueError(
            f"a row needs at least 2 columns and 1 to N positives, got N = {columns}, {positives} positives"
        )
    others = columns - positives

    def learned(temperature: float) -> tuple[float, float]:  # log q of one positive, of one other column
        low = -gap / temperature
        log_sum = math.log(positives + others * math.exp(low))
        return -log_sum, low - log_sum

    p = (1 / positives, 0.0)
    total, log_q = 0.0, learned(objective.temperatures[0])
    for temperature, alpha in zip(objective.temperatures[1:], objective.couplings, strict=True):
        p = tuple((1 - alpha) * old + alpha * math.exp(log) for old, log in zip(p, log_q, strict=True))  # type: ignore[assignment]
        log_q = learned(temperature)
        for count, mass, log in zip((positives, others), p, log_q, strict=True):
            total += count * mass * (math.log(mass) - log) if mass > 0 and count else 0.0
    return total


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
