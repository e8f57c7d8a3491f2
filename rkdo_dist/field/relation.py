"""Recursion with restart: p does not replace the other view's place, it shares it with a relation that a teacher sees.

    w(j|i) ~ 1[j != i] 1[j in N(i)] exp(<k_i, k_j> / tau_T)            relation, of the teacher's keys k
    r_i <- w, first;  (1 - rho) r_i + rho w  or  r_i^(1-rho) w^rho / Z   memory, arithmetic or geometric
    p_i = (1 - a_i) e_i + a_i r_i,   a_i = a kappa_i                     supervisor: e_i is the other view

Restarting at e_i every time, p = (1 - a) e + a p W has the one fixed point (1 - a)(I - a W)^-1 (personalised PageRank).
Two losses are made of it. "mixed" is KL(p_i || q_i), which by the chain rule is kl(1 - a || q_ii) + a KL(r_i || q_i
without i). "apart" is (1 - a) KL(e_i || q_i) + a KL(r_i || q_i without i). Settings of published methods: `presets`.

The dense functions are the oracle; `value_and_gradient` computes the same in bounded memory, a panel of rows at a time.
No gradient passes through the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rkdo_dist.field.presets import Relation
from rkdo_dist.field.recursion import cross_entropy, entropy
from rkdo_dist.field.rows import computing_dtype, tile_rows

# --- dense: r x N matrices, autograd ----------------------------------------------------------------------------------


def relation(similarity: Tensor, temperature: float, candidates: Tensor) -> Tensor:
    """w (r, N): the softmax at the teacher's temperature over a row's candidates; zeros where it has none.

    Args:
        similarity: of teacher's keys (r, N).
        temperature: tau_T > 0.
        candidates: (r, N) bool: not the row's own sample, and among its neighbours N(i).
    """
    logits = (similarity / temperature).masked_fill(~candidates, -torch.inf)
    return torch.softmax(logits.masked_fill(~candidates.any(1, keepdim=True), 0), 1) * candidates


def nearest(similarity: Tensor, candidates: Tensor, k: int) -> Tensor:
    """(r, N) bool: the k candidates of every row with the largest similarity."""
    k = min(k, similarity.shape[1])
    places = similarity.masked_fill(~candidates, -torch.inf).topk(k, dim=1).indices
    return torch.zeros_like(candidates).scatter_(1, places, True) & candidates


def remembered(memory: Tensor, relation: Tensor, momentum: float, mean: str) -> Tensor:
    """r after a visit, (r, N).

    Args:
        memory, relation: r before, and w; rows sum to 1.
        momentum: 1 - rho in [0, 1], the share of the memory: 0 forgets.
        mean: "arithmetic", or "geometric" (the mean of the logits, divided by its sum).
    """
    if mean == "arithmetic":
        return momentum * memory + (1 - momentum) * relation
    product = torch.where(memory > 0, memory, 1) ** momentum * torch.where(relation > 0, relation, 1) ** (1 - momentum)
    product = torch.where((memory > 0) & (relation > 0), product, 0)
    return product / product.sum(1, keepdim=True)


def sureness(relation: Tensor, candidates: Tensor) -> Tensor:
    """kappa (r,) of confidence "entropy": 1 - H(w) / log(candidates), in [0, 1] (ASCL, Feng & Patras 2022)."""
    count = candidates.sum(1)
    return torch.where(count > 1, 1 - entropy(relation) / count.clamp(min=2).to(relation.dtype).log(), 1.0).clamp(min=0)


def supervisor(positive: Tensor, relation: Tensor, weight: Tensor) -> Tensor:
    """p = (1 - a) e + a r, (r, N).

    Args:
        positive: (r,) int64, the column that e is.
        relation: r, (r, N); where a row of it is empty, p is e.
        weight: a of every row, (r,).
    """
    weight = torch.where(relation.sum(1) > 0, weight, 0)
    identity = torch.zeros_like(relation).scatter_(1, positive[:, None], 1)
    return (1 - weight)[:, None] * identity + weight[:, None] * relation


def row_losses(log_q: Tensor, positive: Tensor, relation: Tensor, weight: Tensor, form: str) -> Tensor:
    """The loss of every row (r,), "mixed" or "apart"; arguments as for `supervisor`, log q (r, N)."""
    p = supervisor(positive, relation, weight)
    if form == "mixed":
        return cross_entropy(p, log_q) - entropy(p)
    at_positive = log_q.gather(1, positive[:, None])
    without = log_q - torch.log1p(-at_positive.exp())
    share = torch.where(relation.sum(1) > 0, weight, 0)
    return (1 - share) * -at_positive[:, 0] + share * (cross_entropy(relation, without) - entropy(relation))


# --- in bounded memory, without autograd ------------------------------------------------------------------------------

LOW = -1e30  # a logit whose exponential is 0, and 0 times which is 0
PARTS = ("kl_1", "cross_entropy", "entropy_p", "positive_mass", "uniform")


@dataclass(frozen=True)
class Columns:
    """N columns that rows are compared with.

    Attributes:
        student: (N, d), what q is the softmax over.
        keys: (N, d), the teacher's, of the same samples.
        samples: (N,) int64.
        labels: (N,) integers; None: not known, or not of all.
    """

    student: Tensor
    keys: Tensor
    samples: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class RelationResult:
    """Sums over rows and their gradients.

    Attributes:
        loss: float64 scalar.
        parts: `PARTS`, and facts: float64 scalars. `relation_weight` is a_i, `relation_entropy` H(w) (its exponential
            is the number of neighbours that count), `relation_precision`, with labels, the mass of w on the row's own
            one.
        rows: gradient with respect to the rows (b, d).
        columns: with respect to `Columns.student` (N, d); None if not asked for.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    rows: Tensor
    columns: Tensor | None


def value_and_gradient(
    relation: Relation,
    temperature: float,
    weight: float,
    rows: Tensor,
    keys: Tensor,
    columns: Columns,
    positive: Tensor,
    mutual: Tensor | None = None,
    move_columns: bool = True,
) -> RelationResult:
    """Sum of the losses of b rows and its gradients.

    A column of the row's own sample that is not its positive takes part in neither q nor w; the positive not in w.

    Args:
        relation: its form, teacher's temperature, neighbours and confidence.
        temperature: tau of q.
        weight: a.
        rows: unit-norm embeddings of the student (b, d).
        keys: the teacher's of the same samples (b, d).
        positive: (b,) int64, each row's positive among the columns.
        mutual: (N, k) int64, every column's nearest columns, for neighbours that must be mutual (`nearest_columns`).
        move_columns: whether the columns get a gradient.
    """
    dtype = computing_dtype(rows.dtype)
    student, theirs = columns.student.to(dtype), columns.keys.to(dtype)
    gradient = torch.zeros(rows.shape, dtype=dtype, device=rows.device)
    home = torch.zeros_like(student) if move_columns else None
    panel = tile_rows(len(rows), len(student), 1, rows.device.type)[0]
    found: list[dict[str, Tensor]] = []
    for start in range(0, len(rows), panel):
        here = slice(start, min(start + panel, len(rows)))
        u = rows[here].to(dtype) / temperature
        x, t = u @ student.T, keys[here].to(dtype) @ theirs.T
        parts, g = _strip(x, t, relation, weight, columns, positive[here], mutual)
        torch.mm(g, student, out=gradient[here]).div_(temperature)
        if home is not None:
            home.addmm_(g.T, u)
        found.append({name: value.sum(dtype=torch.float64) for name, value in parts.items()})
    totals = {name: torch.stack([part[name] for part in found]).sum() for name in found[0]}
    return RelationResult(totals["kl_1"], totals, gradient, home)


def nearest_columns(relation: Relation, keys: Tensor, columns: Columns, positive: Tensor) -> Tensor:
    """The k nearest columns (b, k) int64 of rows' keys (b, d), without those of their own sample."""
    dtype = computing_dtype(keys.dtype)
    theirs, found = columns.keys.to(dtype), []
    panel = tile_rows(len(keys), len(theirs), 1, keys.device.type)[0]
    for start in range(0, len(keys), panel):
        t = keys[start : start + panel].to(dtype) @ theirs.T
        own = _own(columns, positive[start : start + panel])
        found.append(_largest(t.masked_fill_(own, LOW), relation.neighbours))
    return torch.cat(found)


def _own(columns: Columns, positive: Tensor) -> Tensor:
    """(r, N) bool: the columns of each row's own sample."""
    return columns.samples[positive][:, None] == columns.samples[None, :]


def _largest(t: Tensor, k: int) -> Tensor:
    return t.topk(min(k, t.shape[1]), dim=1).indices


def _strip(
    x: Tensor,
    t: Tensor,
    relation: Relation,
    weight: float,
    columns: Columns,
    positive: Tensor,
    mutual: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Parts of r rows' losses, each (r,), and d loss / d x (r, N); x and t are used up.

    Args:
        x, t: logits of q, and similarities of keys (r, N).
    """
    at = positive[:, None]
    own = _own(columns, positive)
    t.masked_fill_(own, LOW)
    candidates = others = (~own).sum(1)
    if relation.neighbours:
        places = _largest(t, relation.neighbours)
        kept = t.gather(1, places)
        if mutual is not None:
            kept.masked_fill_(~(mutual[places] == at[:, :, None]).any(2), LOW)
        candidates = (kept > LOW).sum(1)
        t.fill_(LOW).scatter_(1, places, kept)
    log_w = torch.log_softmax(t.div_(relation.temperature), 1)
    w = log_w.exp()
    entropy_w = -log_w.mul_(w).sum(1)
    similar = x.gather(1, at)[:, 0]
    x.masked_fill_(own, LOW)  # the positive too: it is added to what the others sum to
    log_rest = x.logsumexp(1)
    x.sub_(log_rest[:, None])  # log q without the positive
    rows = assembled(relation, weight, similar, log_rest, (w * x).sum(1), entropy_w, candidates, others)
    if columns.labels is not None:
        same = columns.labels[positive][:, None] == columns.labels[None, :]
        rows.parts["relation_precision"] = torch.where(candidates > 0, (w * same).sum(1), 0)
    gradient = x.exp_().mul_(rows.share[:, None]).sub_(w.mul_(rows.weight[:, None]))
    return rows.parts, gradient.scatter_(1, at, rows.at_positive[:, None])


@dataclass(frozen=True)
class RowValues:
    """What r rows come to, of sums over their columns; each (r,).

    Attributes:
        parts: `PARTS`, `relation_weight` and `relation_entropy`.
        weight: a_i.
        share, at_positive: the derivative by the logits is share q(.|i without i) - a w, and `at_positive` for i.
    """

    parts: dict[str, Tensor]
    weight: Tensor
    share: Tensor
    at_positive: Tensor


def assembled(
    relation: Relation,
    weight: float,
    similar: Tensor,
    log_rest: Tensor,
    towards: Tensor,
    entropy_w: Tensor,
    candidates: Tensor,
    others: Tensor,
) -> RowValues:
    """Losses of r rows; all arguments (r,).

    Args:
        similar: logit of the positive.
        log_rest: log-sum-exp of all others.
        towards: sum_j w_j log q_j, q without the positive.
        entropy_w: H(w).
        candidates, others: columns that w is made of, and all but the positive, int64.
    """
    a = torch.full_like(entropy_w, weight)
    if relation.confidence == "entropy":
        sure = 1 - entropy_w / candidates.clamp(min=2).to(a.dtype).log()
        a = a * torch.where(candidates > 1, sure.clamp(min=0), 1)
    alone = candidates == 0
    a, entropy_w, towards = (torch.where(alone, 0, value) for value in (a, entropy_w, towards))
    log_sum = torch.logaddexp(log_rest, similar)
    near, far = similar - log_sum, log_rest - log_sum  # log q_ii, log(1 - q_ii)
    n = others.to(a.dtype)
    if relation.form == "mixed":
        cross = -(1 - a) * near - a * torch.where(alone, 0, towards + far)
        entropy_p = a * entropy_w - torch.xlogy(1 - a, 1 - a) - torch.xlogy(a, a)
        uniform = n.log1p() - entropy_p
        share, at_positive = far.exp(), near.exp() - (1 - a)
    else:
        cross = -(1 - a) * near - a * towards
        entropy_p = a * entropy_w
        uniform = (1 - a) * n.log1p() + a * n.clamp(min=1).log() - entropy_p
        share, at_positive = (1 - a) * far.exp() + a, -(1 - a) * far.exp()
    parts = dict(zip(PARTS, (cross - entropy_p, cross, entropy_p, near.exp(), uniform), strict=True))
    parts |= {"relation_weight": a, "relation_entropy": entropy_w}
    return RowValues(parts, a, share, at_positive)
