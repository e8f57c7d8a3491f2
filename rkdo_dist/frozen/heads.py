"""Linear heads that find clusters in frozen features: the field with the affinity of clusters.

    phi(i) = softmax(W x_i + b), over C clusters
    q(j|i) = sum_c phi_c(i) phi_c(j) / S_c,  S_c = sum_k phi_c(k) over the columns of the batch
    loss   = mean_i KL(p~(.|i) || q~(.|i)),  p~ = (1 - a) p + a / B,  q~ = (1 - a) q + a / B

(I-Con, Alshammari et al. 2025: debiased InfoNCE clustering, a on both sides.) The second view of a sample is another
sample, drawn by a walk on the graph of nearest neighbours, so p is the identity over drawn pairs and its expectation
the mean of the graph's first powers. No label enters anywhere.

Heads are independent: each sees the same batches and draws, and nothing but itself. So they can be shared among ranks
in any way, and the results are the same, bit for bit, on any number of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkdo_dist.data.order import GOLDEN, finalised, hash64, permutation
from rkdo_dist.field.affinity import Clusters
from rkdo_dist.losses import FieldLoss, IConLoss, RKDOLoss

JUDGED = 64  # batches by which the best head is found
DENSE = 512  # samples of a batch, up to which the dense formula is faster than bounded memory
ROWS = 4096  # of a block of `probabilities`
_HEAD, _BATCH, _PARTNER, _CONTROL = 11, 12, 13, 14  # streams of draws
CONTROLS = ("none", "random")
LONGEST_WALK = 100  # as of field.walk: after 31 steps even a walk over two neighbours can be anywhere


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How clusters are found; the defaults need no tuning.

    Attributes:
        clusters: C, in [2, n].
        seed: of everything random, >= 0.
        neighbours: k of the graph, in [1, n - 1].
        walk: s in [1, 100]: a walk has 1 to s steps, each number alike.
        debias: a in [0, 1), the uniform share on both sides.
        heads: trained side by side; the one of the smallest loss counts.
        batch: B >= 2 samples of a step (all n if there are fewer); None: 128, or 8 C if that is more.
        steps: of the optimizer.
        learning_rate: of Adam, above 0, falling to 0 by half a cosine; None: 3.2 / f, for f features.
        coupling, depth: of an in-batch recursion of p; coupling 0: none.
        control: "random" puts random samples in the place of neighbours: what is found then is no evidence.
    """

    clusters: int
    seed: int = 42
    neighbours: int = 10
    walk: int = 1
    debias: float = 0.4
    heads: int = 10
    batch: int | None = None
    steps: int = 600
    learning_rate: float | None = None
    coupling: float = 0.0
    depth: int = 3
    control: str = "none"

    def samples(self, n: int) -> int:
        """Samples of a step, for n samples in all."""
        return min(n, max(128, 8 * self.clusters) if self.batch is None else self.batch)

    def check(self, n: int) -> None:
        """Raises ValueError, naming the setting, unless n samples can be clustered so."""
        for name, least, most in (
            ("clusters", 2, n),
            ("neighbours", 1, n - 1),
            ("walk", 1, LONGEST_WALK),
            ("heads", 1, None),
            ("batch", 2, None),
            ("steps", 1, None),
            ("depth", 1, None),
            ("seed", 0, None),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if value < least or (most is not None and value > most):
                ends = f"in [{least}, {most}] for {n} samples" if most is not None else f"at least {least}"
                raise ValueError(f"--{name} must be {ends}, got {value}")
        for name in ("debias", "coupling"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate must be above 0, got {self.learning_rate}")
        if self.control not in CONTROLS:
            raise ValueError(f"--control must be one of {', '.join(CONTROLS)}, got {self.control!r}")


def pairs(recipe: Recipe, neighbours: Tensor, steps: Iterable[int], stream: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of each step and those whose views are the second ones, both (B,) int64.

    An epoch is a permutation of all samples, its remainder of less than a batch dropped. Every draw is a function of
    (seed, stream, step, place in the batch).

    Args:
        neighbours: (n, k) int32.
    """
    n, k = neighbours.shape
    batch = recipe.samples(n)
    per_epoch, table = n // batch, neighbours.long().cpu().numpy()
    epoch, order = -1, np.arange(0)
    for step in steps:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = permutation(n, hash64(_BATCH, recipe.seed, stream, epoch))
        first = order[step % per_epoch * batch :][:batch]
        key = hash64(_PARTNER, recipe.seed, stream, step)
        words = _words(key, batch * (recipe.walk + 1)).reshape(-1, batch)
        length, second = 1 + words[0] % recipe.walk, first
        for taken in range(recipe.walk):
            second = np.where(taken < length, table[second, words[taken + 1] % k], second)
        yield torch.from_numpy(first), torch.from_numpy(second)


def random_neighbours(recipe: Recipe, n: int) -> Tensor:
    """(n, k) int32: random other samples in the place of neighbours, for the control."""
    words = _words(hash64(_CONTROL, recipe.seed), n * recipe.neighbours).reshape(n, -1)
    others = (words % np.uint64(n - 1)).astype(np.int64)
    return torch.from_numpy((others + (others >= np.arange(n)[:, None])).astype(np.int32))


def _words(key: int, count: int) -> np.ndarray:
    return finalised(np.uint64(key) + np.uint64(GOLDEN) * np.arange(1, count + 1, dtype=np.uint64))


def clusters_loss(u: Tensor, v: Tensor, debias: float, coupling: float = 0.0, depth: int = 3) -> Tensor:
    """The loss of a batch, dense: for small batches, and for tests. With a coupling, summed over the levels of p.

    Args:
        u, v: (B, C) cluster probabilities of both views.
        coupling, depth: p(s) = (1 - coupling) p(s - 1) + coupling q~, and the sum over s = 1..depth of KL(p(s) || q~),
            where gradients flow through p; coupling 0: KL(p(0) || q~).
    """
    batch = len(u)
    q = (1 - debias) * (u @ (v / v.sum(0)).T) + debias / batch
    log_q = q.log()
    p = torch.full_like(q, debias / batch)
    p.diagonal().add_(1 - debias)
    total = torch.zeros((), dtype=u.dtype, device=u.device)
    for _ in range(depth if coupling else 1):
        p = (1 - coupling) * p + coupling * q if coupling else p
        total = total + (torch.xlogy(p, p) - p * log_q).sum() / batch
    return total


def engine(recipe: Recipe, coupling: float) -> FieldLoss:
    """The same as `clusters_loss`, of the clusters' logits and in bounded memory."""
    alike: dict[str, Any] = {"affinity": Clusters(recipe.debias), "exchange": "local", "validate": False}
    if coupling:
        return RKDOLoss(recipe.depth, coupling, 1.0, 0.0, debias=recipe.debias, **alike)
    return IConLoss(recipe.debias, 1.0, **alike)


class Heads:
    """Some of a recipe's heads, trained together.

    Args:
        features: (n, f), centred and of overall variance 1, on the device of the computation.
        numbers: which of the heads 0..H - 1.

    Attributes:
        step: steps done.
    """

    def __init__(self, features: Tensor, recipe: Recipe, numbers: Sequence[int]) -> None:
        self._features, self._recipe, self.step = features, recipe, 0
        self._rate = recipe.learning_rate or 3.2 / features.shape[1]
        self._heads = {number: self._head(number) for number in numbers}
        everything = [p for head in self._heads.values() for p in head]
        self._engines = {c: engine(recipe, c) for c in {0.0, recipe.coupling}}
        self._adam = torch.optim.Adam(everything, betas=(0.9, 0.99), foreach=False) if everything else None

    def _head(self, number: int) -> list[torch.nn.Parameter]:
        f, c = self._features.shape[1], self._recipe.clusters
        drawn = torch.Generator().manual_seed(hash64(_HEAD, self._recipe.seed, number) >> 1)
        weight = torch.randn(f, c, generator=drawn) / math.sqrt(f)
        return [torch.nn.Parameter(x.to(self._features)) for x in (weight, torch.zeros(c))]

    def train(self, first: Tensor, second: Tensor) -> dict[int, float]:
        """One step on a batch of pairs of samples; the heads' losses before it."""
        if self._adam is None:
            self.step += 1
            return {}
        r = self._recipe
        for group in self._adam.param_groups:
            group["lr"] = self._rate * (1 + math.cos(math.pi * self.step / r.steps)) / 2
        self._adam.zero_grad()
        losses = self._losses(first, second, r.coupling)
        torch.stack(list(losses.values())).sum().backward()
        self._adam.step()
        self.step += 1
        return {number: float(loss.detach()) for number, loss in losses.items()}

    @torch.no_grad()
    def judge(self, neighbours: Tensor) -> dict[int, tuple[float, float]]:
        """Each head's loss against p(0) and its own (with the recursion), over fresh draws."""
        found: dict[int, list[tuple[float, float]]] = {number: [] for number in self._heads}
        for first, second in pairs(self._recipe, neighbours, range(JUDGED), stream=1):
            plain = self._losses(first, second, 0.0)
            own = self._losses(first, second, self._recipe.coupling) if self._recipe.coupling else plain
            for number, loss in plain.items():
                found[number].append((float(loss), float(own[number])))
        return {number: tuple(np.mean(some, axis=0).tolist()) for number, some in found.items()}

    def _losses(self, first: Tensor, second: Tensor, coupling: float) -> dict[int, Tensor]:
        r, rows, columns = self._recipe, self._features[first], self._features[second]
        found = {}
        for number, head in self._heads.items():
            u, v = _logits(rows, head), _logits(columns, head)
            if len(u) <= DENSE:
                found[number] = clusters_loss(u.softmax(1), v.softmax(1), r.debias, coupling, r.depth)
            else:
                found[number] = self._engines[coupling](u, v)
        return found

    def state(self) -> dict[int, list[Tensor]]:
        """By head: weight (f, C), bias (C,), and Adam's two moments of each, as `load` takes them."""
        return {number: [x.detach().cpu() for p in head for x in self._of(p)] for number, head in self._heads.items()}

    def load(self, step: int, state: dict[int, list[Tensor]]) -> None:
        """Continue after `step` steps from the result of `state`, which may hold further heads."""
        self.step = step
        for number, head in self._heads.items():
            saved = iter(state[number])
            for p in head:
                for x in self._of(p):
                    x.data.copy_(next(saved))
                self._moments(p)["step"].fill_(step)

    def _of(self, p: torch.nn.Parameter) -> list[Tensor]:
        return [p, self._moments(p)["exp_avg"], self._moments(p)["exp_avg_sq"]]

    def _moments(self, p: torch.nn.Parameter) -> dict[str, Tensor]:
        assert self._adam is not None
        state = self._adam.state[p]
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        return state


def _logits(rows: Tensor, head: Sequence[Tensor]) -> Tensor:
    return rows @ head[0] + head[1]


@torch.no_grad()
def probabilities(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """phi (n, C) of all samples by one head, in blocks."""
    blocks = range(0, len(features), ROWS)
    return torch.cat([_logits(features[k : k + ROWS], (weight, bias)).softmax(1) for k in blocks])


def standardised(values: np.ndarray) -> Tensor:
    """Features (n, f) centred and divided by one number, so that their overall variance is 1; in place.

    Raises:
        ValueError: if all rows are equal.
    """
    x = torch.from_numpy(values)
    x -= torch.from_numpy(values.mean(axis=0, dtype=np.float64)).to(x.dtype)
    scale = math.sqrt(sum(float(part.double().square().sum()) for part in x.split(ROWS)) / x.numel())
    if scale == 0:
        raise ValueError("all rows of the features are equal: there is nothing to cluster")
    return x.div_(scale)
