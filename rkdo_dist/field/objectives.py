"""An objective is three choices: who supervises, how closeness is measured, and how the supervisor recurs.

    loss = mean_i KL(p(.|i) || q(.|i)), summed over the levels of an in-batch recursion,
    q(j|i) = softmax_j(l_ij / tau), with the logit l of an affinity (`field.affinity`): of the cosine <row_i, column_j>

`field.presets` names the combinations; here is what is computed of them, dense and readable. `field.rows` computes the
same in bounded memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rkdo_dist.field import recursion, schedules
from rkdo_dist.field.affinity import AFFINITIES, COSINE, Affinity, Clusters
from rkdo_dist.field.places import Slice
from rkdo_dist.field.presets import (
    COOLING,
    COUPLING,
    DEPTH,
    NORMALISERS,
    PRESETS,
    RECURSIONS,
    SUPERVISOR_GRADIENTS,
    Relation,
    temperature_of,
)
from rkdo_dist.field.supervisors import LISTED
from rkdo_dist.field.two_valued import two_valued


@dataclass(frozen=True)
class Objective:
    """A fully resolved objective: numbers only, no schedule left to evaluate. Made by `of` or a constructor below.

    Attributes:
        name: of its preset.
        temperature: tau0, the one that a learnable temperature replaces; all others keep their ratio to it.
        temperatures: tau(0)..tau(D) of an in-batch recursion, else the one tau.
        couplings: alpha(1)..alpha(D) of an in-batch recursion, else none.
        supervisor: who supervises, see `presets.Preset`. "rows" are given with every call; without, they are the
            identity. Their columns are those of the positive's view.
        debias: a: p(0) = (1 - a) [the supervisor] + a / N over the N columns that take part, the positive included.
        affinity: how closeness is measured.
        normaliser: what q sums to 1 over: each "row", or the "field": one distribution over all pairs, as in t-SNE.
        recursion: "none", "in_batch", "persistent" (in `field.persistent`) or "restart" (in `field.relation`).
        pairing: "cross" (rows of view 1, columns of view 2, the positive on the diagonal) or "joint" (2B
            rows and columns, the self column excluded, the positive is the other view); or "points": "joint" with a
            supervisor for each of the 2B (sample, view), which come as one view, both as rows and as columns; so are
            persistent rows computed (`field.persistent`).
        symmetric: for "cross", the mean of both directions.
        supervisor_grad: "flow" or "stop".
        row_coupling: alpha of rows that persist (`field.persistent`), applied after the step.
        relation: of a recursion with restart. Here, where there is no teacher, its weight counts as 0.
    """

    name: str
    temperature: float
    temperatures: tuple[float, ...]
    couplings: tuple[float, ...] = ()
    supervisor: str = "identity"
    debias: float = 0.0
    affinity: Affinity = COSINE
    normaliser: str = "row"
    recursion: str = "none"
    pairing: str = "cross"
    symmetric: bool = False
    supervisor_grad: str = "flow"
    row_coupling: float = 0.0
    relation: Relation | None = None

    def __post_init__(self) -> None:
        _require_choice("supervisor", self.supervisor, ("identity", "labels", "rows", *LISTED))
        if not isinstance(self.affinity, Affinity):
            raise ValueError(f"affinity must be one of `field.affinity`, got {self.affinity!r}")
        _require_choice("recursion", self.recursion, RECURSIONS)
        _require_choice("pairing", self.pairing, ("cross", "joint", "points"))
        _require_choice("normaliser", self.normaliser, NORMALISERS)
        if self.normaliser == "field" and self.recursion != "none":
            raise ValueError(f"normaliser must be row for recursion={self.recursion!r}, which mixes rows that sum to 1")
        _require_choice("supervisor_grad", self.supervisor_grad, SUPERVISOR_GRADIENTS)
        if self.symmetric and self.pairing == "joint":
            raise ValueError("symmetric=True is a form of pairing='cross'; pairing='joint' is symmetric already")
        if self.recursion == "persistent" and (self.symmetric or self.supervisor != "rows"):
            raise ValueError("recursion='persistent' goes with supervisor='rows', symmetric=False")
        levels = len(self.temperatures) - 1
        if levels != len(self.couplings) or (levels > 0) != (self.recursion == "in_batch"):
            raise ValueError(
                "need D + 1 temperatures for D >= 1 couplings in an in-batch recursion, else one temperature; "
                f"got {len(self.temperatures)} and {len(self.couplings)}"
            )
        for value in (self.temperature, *self.temperatures):
            schedules.require_positive("temperature", value)
        for value in (*self.couplings, self.row_coupling):
            schedules.require_share("coupling", value)
        schedules.require_share("debias", self.debias)
        if (self.relation is not None) != (self.recursion == "restart"):
            raise ValueError("recursion='restart' and a relation go together")
        if self.relation is not None and self.affinity != COSINE:
            raise ValueError(
                f"affinity must be cosine for recursion='restart', whose relation compares keys of unit norm; "
                f"got {self.affinity.name}"
            )
        if self.relation is not None:
            schedules.require_share("relation_weight", self.relation.weight)
            schedules.require_positive("teacher_temperature", self.relation.temperature)
            if self.relation.form == "mixed" and self.relation.weight == 1:
                raise ValueError("relation_weight must lie in [0, 1), or nothing is left for the other view; got 1")

    @staticmethod
    def of(
        name: str,
        *,
        temperature: float | None = None,
        pairing: str | None = None,
        symmetric: bool = False,
        debias: float | None = None,
        affinity: Affinity | str | None = None,
        normaliser: str = "row",
        depth: int = DEPTH,
        coupling: float | Sequence[float] = COUPLING,
        cooling: float = COOLING,
        supervisor_grad: str = "flow",
        clock: str = "depth",
        progress: float = 0.0,
        relation: Relation | None = None,
        supervisor: str | None = None,
        recursion: str | None = None,
    ) -> Objective:
        """The objective that `presets.PRESETS` calls `name`; what is None is as the preset says.

        Args:
            temperature: tau0 > 0; None: the preset's, or 1 with another affinity than the preset's and the cosine.
            affinity: one of `field.affinity`, or its name: then with its own defaults, and clusters with `debias`.
            normaliser: see the attributes.
            pairing: "cross", "joint", or "symmetric", which is "cross" with symmetric=True.
            symmetric, supervisor_grad: see the attributes.
            debias: a in [0, 1].
            depth: number of levels D >= 1 of an in-batch recursion; the loss is the sum over levels of
                mean_i KL(p(t) || q(t)).
            coupling: alpha in [0, 1] of a recursion, one number; in the batch also one per level.
            cooling: beta in [0, 1) of a recursion.
            clock: of an in-batch recursion. "depth" (released code): level t has tau0 (1 - beta t / D); "training" (the
                paper's text): every level has tau0 (1 - beta progress), as persistent rows have too.
            progress: share of the training done, in [0, 1].
            relation: of a recursion with restart.
            supervisor, recursion: see the attributes.

        Raises:
            ValueError: naming the argument that is out of range.
        """
        preset = PRESETS[name]
        supervisor = preset.supervisor if supervisor is None else supervisor
        recursion = preset.recursion if recursion is None else recursion
        pairing = preset.pairing if pairing is None else pairing
        debias = preset.debias if debias is None else debias
        if not isinstance(affinity, Affinity):
            affinity = preset.affinity if affinity is None else affinity
            _require_choice("affinity", affinity, tuple(AFFINITIES))
            affinity = Clusters(debias) if affinity == Clusters.name else AFFINITIES[affinity]()
        tau = temperature_of(preset, affinity.name) if temperature is None else temperature
        temperatures: tuple[float, ...] = (tau,)
        couplings: tuple[float, ...] = ()
        row_coupling = 0.0
        if recursion == "in_batch":
            temperatures, couplings = schedules.levels(depth, coupling, tau, cooling, clock, progress)
        elif recursion == "persistent":
            assert not isinstance(coupling, Sequence), "persistent rows have one coupling"
            temperatures, row_coupling = (schedules.temperature(tau, cooling, progress, 1),), coupling
        return Objective(
            name,
            tau,
            temperatures,
            couplings,
            supervisor=supervisor,
            debias=debias,
            affinity=affinity,
            normaliser=normaliser,
            recursion=recursion,
            pairing="cross" if pairing == "symmetric" else pairing,
            symmetric=symmetric or pairing == "symmetric",
            supervisor_grad=supervisor_grad,
            row_coupling=row_coupling,
            relation=preset.relation if relation is None else relation,
        )

    @staticmethod
    def rkdo(
        depth: int = DEPTH,
        coupling: float | Sequence[float] = COUPLING,
        temperature: float | None = None,
        cooling: float = COOLING,
        pairing: str | None = None,
        supervisor_grad: str = "flow",
        symmetric: bool = False,
        clock: str = "depth",
        progress: float = 0.0,
        debias: float | None = None,
        affinity: Affinity | str | None = None,
    ) -> Objective:
        """RKDO with in-batch recursion (eq. 1-4); arguments as for `of`."""
        recursion = {"depth": depth, "coupling": coupling, "cooling": cooling, "clock": clock, "progress": progress}
        shape = {"pairing": pairing, "symmetric": symmetric, "supervisor_grad": supervisor_grad}
        options: dict[str, Any] = {**recursion, **shape, "debias": debias, "affinity": affinity}
        return Objective.of("rkdo", temperature=temperature, **options)

    @staticmethod
    def icon(
        debias: float | None = None,
        temperature: float | None = None,
        pairing: str | None = None,
        symmetric: bool = False,
        affinity: Affinity | str | None = None,
    ) -> Objective:
        """I-Con: p = (1 - a) identity + a / N; in "joint" the excluded column has p = 0 and N = 2B - 1."""
        return Objective.of(
            "icon", debias=debias, temperature=temperature, pairing=pairing, symmetric=symmetric, affinity=affinity
        )

    @staticmethod
    def infonce(
        temperature: float | None = None,
        pairing: str | None = None,
        symmetric: bool = False,
        affinity: Affinity | str | None = None,
    ) -> Objective:
        """InfoNCE (van den Oord et al. 2018): cross-entropy on the positive.

        "cross" with symmetric=True is CLIP's loss, "joint" is SimCLR's NT-Xent.
        """
        return Objective.of("infonce", temperature=temperature, pairing=pairing, symmetric=symmetric, affinity=affinity)

    @staticmethod
    def persistent(
        coupling: float = COUPLING, temperature: float | None = None, cooling: float = 0.0, progress: float = 0.0
    ) -> Objective:
        """RKDO with recursion across training iterations: mean_i KL(p_S / m || q), p from `field.persistent`.

        Without supervisor rows p is the identity, which is InfoNCE. The coupling is that with which rows move after
        the step (eq. 3); the temperature follows the paper's clock.
        """
        return Objective.of(
            "persistent", coupling=coupling, temperature=temperature, cooling=cooling, progress=progress
        )

    @staticmethod
    def supervised(
        temperature: float | None = None,
        debias: float | None = None,
        pairing: str | None = None,
        symmetric: bool = False,
        affinity: Affinity | str | None = None,
    ) -> Objective:
        """KL(p || q) with p spread evenly over the columns of the same label (SupCon, Khosla et al. 2020).

        SupCon's own value is the part `cross_entropy`; the KL differs from it by the entropy of p, a
        constant. Calls with this objective need labels.
        """
        return Objective.of(
            "supcon", debias=debias, temperature=temperature, pairing=pairing, symmetric=symmetric, affinity=affinity
        )

    @property
    def depth(self) -> int:
        """Number of levels D, 1 without in-batch recursion."""
        return max(1, len(self.couplings))

    @property
    def coupling(self) -> float:
        """alpha of the last level, or of persistent rows; the relation's weight; without recursion the uniform share,
        which is alpha where I-Con's supervisor is read as one step from a flat field."""
        if self.relation is not None:
            return self.relation.weight
        if self.recursion == "none":
            return self.debias
        return self.couplings[-1] if self.couplings else self.row_coupling

    @property
    def needs_labels(self) -> bool:
        """Whether p(0) comes from labels."""
        return self.supervisor == "labels"

    @property
    def column_views(self) -> str:
        """The views that serve as columns of any row: "v" or "uv"."""
        return "uv" if self.pairing == "joint" or self.symmetric else "v"

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The row-by-column matrices whose row losses make up the loss of a sample."""
        if self.pairing == "points":
            return (Slice("u", "v", 1.0, positive=0, excluded=0),)
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
        """Columns of a row that take part: B for "cross", 2B - 1 for "joint"; of B points B - 1."""
        return {"cross": batch, "joint": 2 * batch - 1, "points": batch - 1}[self.pairing]

    def at_uniform(self, batch: int, positives: int = 1) -> float:
        """The objective's value when every learned row is uniform, as for an untrained encoder.

        Args:
            batch: B >= 2.
            positives: columns that share the supervisor evenly, more than 1 only for one by labels.
        """
        return self._two_valued(self.column_count(batch), positives, 0.0)

    def at_ideal(self, batch: int, labels: Tensor | None = None) -> float | None:
        """The objective's value at the simplex: positives at similarity 1, all others at -1 / (B - 1).

        None for other affinities than the cosine: embeddings without a bound, or clusters, have no such closed form.

        This is the least value of InfoNCE, where the embedding has d >= B - 1 dimensions; with fewer,
        similarities cannot all be that low, and the value is only approached. A supervisor by labels has the simplex of
        the C labels in the batch instead: -1 / (C - 1).

        Args:
            labels: (B,) integers, for objectives that need them; None: all differ.
        """
        if self.affinity != COSINE:
            return None
        if not self.needs_labels or labels is None:
            return self._two_valued(self.column_count(batch), 1, 1 + 1 / (batch - 1))
        views, excluded = len(self.slices[0].columns), int(self.slices[0].excluded is not None)
        counts = labels.unique(return_counts=True)[1].tolist()
        gap = 1 + 1 / max(1, len(counts) - 1)
        of_rows = (n * self._two_valued(self.column_count(batch), n * views - excluded, gap) for n in counts)
        return sum(of_rows) / batch

    def _two_valued(self, columns: int, positives: int, gap: float) -> float:
        return two_valued(self.temperatures, self.couplings, self.debias, columns, positives, gap)


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
        u, v: embeddings (B, d) of view 1 and view 2, floating point; of unit norm if the affinity asks for it.
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
        raise ValueError(f"objective {objective.name} needs labels")
    totals = {name: u.new_zeros(()) for name in objective.part_names}
    for piece in objective.slices:
        field, target = rows_of(objective, piece, u, v, labels, temperature)
        for name, value in _parts(objective, field, target).items():
            chosen = value if rows is None else value[rows]
            totals[name] = totals[name] + piece.weight * chosen.mean()
    return totals["cross_entropy"] - totals["entropy_p"], totals


@dataclass(frozen=True)
class Initial:
    """Start of the recursion of one matrix.

    Attributes:
        p: p(0), (B, N).
        positives: (B, N) bool, the positive columns: the other view, or those of the same label.
        excluded: (B, N) bool, None if every column takes part.
    """

    p: Tensor
    positives: Tensor
    excluded: Tensor | None


def rows_of(
    objective: Objective,
    piece: Slice,
    u: Tensor,
    v: Tensor,
    labels: Tensor | None = None,
    temperature: Tensor | None = None,
) -> tuple[recursion.Field, Initial]:
    """The distributions of every level of one matrix, and what they began with (arguments as for `dense`)."""
    scale = 1.0 if temperature is None else temperature / objective.temperature
    taus = [tau * scale for tau in objective.temperatures]
    initial = initial_supervisor(objective, piece, len(u), labels, u.dtype, u.device)
    logits = _logits(objective, piece, u, v)
    if objective.recursion == "in_batch":
        gradient = objective.supervisor_grad
        return recursion.unroll(logits, initial.p, taus, objective.couplings, initial.excluded, gradient), initial
    log_q = recursion.log_learned(logits, taus[0], initial.excluded)
    if objective.normaliser == "field":
        log_q = logits / taus[0] - _log_normaliser(objective, u, v, taus[0])
        log_q = log_q if initial.excluded is None else log_q.masked_fill(initial.excluded, -torch.inf)
    return recursion.Field([initial.p], [log_q]), initial


def _logits(objective: Objective, piece: Slice, u: Tensor, v: Tensor) -> Tensor:
    views = {"u": u, "v": v}
    columns = torch.cat([views[name] for name in piece.columns])
    return objective.affinity.logits(views[piece.rows], columns, objective.column_count(len(u)))


def _log_normaliser(objective: Objective, u: Tensor, v: Tensor, temperature: float | Tensor) -> Tensor:
    """log(Z / R), Z the sum of exp(l / tau) over the R rows of all matrices: q is R times the joint distribution."""
    terms = []
    for piece in objective.slices:
        logits = _logits(objective, piece, u, v) / temperature
        if piece.excluded is not None:
            logits.diagonal(piece.excluded * len(u)).fill_(-torch.inf)
        terms.append(logits.flatten())
    return torch.logsumexp(torch.cat(terms), 0) - math.log(len(u) * len(terms))


def initial_supervisor(
    objective: Objective,
    piece: Slice,
    batch: int,
    labels: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Initial:
    """p(0) as a matrix: the supervisor's columns, and a uniform share over the columns that take part."""
    index = torch.arange(batch, device=device)
    none = torch.zeros(batch, len(piece.columns) * batch, dtype=torch.bool, device=device)
    positives, excluded = none.clone(), None
    positives[index, index + piece.positive * batch] = True
    if piece.excluded is not None:
        excluded = none.clone()
        excluded[index, index + piece.excluded * batch] = True
    if objective.needs_labels and labels is not None:
        positives = labels[:, None] == labels.repeat(len(piece.columns))[None, :]
        positives = positives if excluded is None else positives & ~excluded
    p = positives.to(dtype)
    if objective.supervisor in LISTED:
        where, weights = LISTED[objective.supervisor](index, batch)
        p = torch.zeros_like(p).scatter_(1, where + piece.positive * batch, weights.to(dtype))
    p = (1 - objective.debias) * p / p.sum(1, keepdim=True) + objective.debias / objective.column_count(batch)
    return Initial(p if excluded is None else p.masked_fill(excluded, 0), positives, excluded)


def _parts(objective: Objective, field: recursion.Field, initial: Initial) -> dict[str, Tensor]:
    """The parts of every row's loss, each (B,)."""
    crosses = [recursion.cross_entropy(p, log_q) for p, log_q in zip(field.p, field.log_q, strict=True)]
    entropies = [recursion.entropy(p) for p in field.p]
    parts = {f"kl_{t}": c - h for t, (c, h) in enumerate(zip(crosses, entropies, strict=True), start=1)}
    parts["cross_entropy"] = torch.stack(crosses).sum(0)
    parts["entropy_p"] = torch.stack(entropies).sum(0)
    parts["positive_mass"] = torch.where(initial.positives, field.log_q[-1].exp(), 0).sum(1)
    flat = torch.ones_like(initial.p) if initial.excluded is None else (~initial.excluded).to(initial.p.dtype)
    flat, p, divergences = flat / flat.sum(1, keepdim=True), initial.p, []
    for alpha in objective.couplings or (0.0,):
        p = recursion.supervisory(p, flat, alpha)
        divergences.append(recursion.kl_divergence(p, flat.log()))
    parts["uniform"] = torch.stack(divergences).sum(0)
    return parts


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
