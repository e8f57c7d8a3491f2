"""Affinities: how close a column is to a row, as the logit l that q = softmax(l / tau) is made of.

- cosine: <a, b> of unit-norm embeddings a (of the row) and b (of the column);
- gaussian: -|a - b|^2 / (2 sigma^2) (SNE, Hinton and Roweis 2002);
- student: -(nu + 1) / 2 log(1 + |a - b|^2 / nu) (t-SNE, van der Maaten and Hinton 2008, has nu = 1);
- clusters: log((1 - s) sum_c phi_c(a) phi_c(b) / S_c + s / N), with phi = softmax(embedding) the probabilities of the
  clusters, S the sum of phi over all columns, N the columns that take part (I-Con, Alshammari et al. 2025).

A field is never stored, so l is computed from an inner product x of lifted rows and columns, which matrix products
make: `lift_rows`, `lift_columns`. Where l is another function of x than x itself, `link` turns a strip of x into
logits, and the gradient goes back through its slope. The way back through the lifts needs the lifted numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rkdo_dist.field.presets import DEGREES_OF_FREEDOM, SIGMA
from rkdo_dist.field.recursion import similarities
from rkdo_dist.field.schedules import require_positive, require_share

# Degrees of freedom from which the rounding of 1 + x, which they multiply, is worth log1p: it takes 9 times log's time.
LIGHT_TAILS = 10.0


class Affinity:
    """What the field asks of an affinity; as it stands here, l is the inner product of the embeddings themselves.

    Attributes:
        name: by which it is chosen.
        unit_norm: whether embeddings must have unit norm; l is then bounded.
        lifts: whether rows and columns are anything else than the embeddings.
        links: whether l is another function of the lifted inner product than that product itself.
        pools: whether the gradient passes through what `pool` sums over all columns.
    """

    name: ClassVar[str]
    unit_norm: ClassVar[bool] = False
    lifts: ClassVar[bool] = True
    links: ClassVar[bool] = False
    pools: ClassVar[bool] = False

    def logits(self, rows: Tensor, columns: Tensor, taking_part: int) -> Tensor:
        """l (r, N) of rows (r, d) and all columns (N, d), `taking_part` of each row: dense, by the formula."""
        return similarities(rows, columns)

    def pool(self, columns: Tensor, count: int) -> Tensor | None:
        """What lifts need to know of all `count` columns, summed over these (V, n, d): (V, d) by view."""
        return None

    def lift_rows(self, x: Tensor, pooled: Tensor | None) -> Tensor:
        """(r, d) to (r, d')."""
        return x

    def lift_columns(self, x: Tensor, pooled: Tensor | None, views: Sequence[int]) -> Tensor:
        """(n, d) to (n, d'), of columns from these of the views that are pooled."""
        return x

    def rows_back(self, lifted: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to the rows (r, d), from that with respect to the lifted ones (r, d')."""
        raise NotImplementedError

    def columns_back(
        self, lifted: Tensor, gradient: Tensor, home: Tensor, pooled: Tensor | None, views: Sequence[int]
    ) -> Tensor | None:
        """Add to the columns' gradient `home` (n, d), from that with respect to the lifted ones (n, d'). Both of these
        are used up. Returns the gradient with respect to the pool of these views (d,), where it `pools`."""
        raise NotImplementedError

    def link(self, x: Tensor, logits: Tensor, taking_part: int, factor: float) -> None:
        """logits (r, n) <- factor l(x) = factor `slope` log(y), where y takes the place of x: dl / dx = slope / y."""
        raise NotImplementedError

    @property
    def slope(self) -> float:
        """See `link`."""
        return 1.0

    def between(self, rows: Tensor, columns: Tensor, taking_part: int) -> Tensor:
        """l (r, n) of lifted rows and columns."""
        x = rows @ columns.T
        if not self.links:
            return x
        logits = torch.empty_like(x)
        self.link(x, logits, taking_part, 1.0)
        return logits


@dataclass(frozen=True)
class Cosine(Affinity):
    """l = <a, b> of unit-norm embeddings."""

    name = "cosine"
    unit_norm = True
    lifts = False


class _OfDistance(Affinity):
    """x = `factor` |a - b|^2. Embeddings are centred first, which keeps the squares small."""

    @property
    def factor(self) -> float:
        """By which squared distances are multiplied."""
        raise NotImplementedError

    def pool(self, columns: Tensor, count: int) -> Tensor:
        """See `Affinity`: the mean. No distance depends on it, so no gradient passes."""
        return columns.sum(1) / count

    def lift_rows(self, x: Tensor, pooled: Tensor | None) -> Tensor:
        """See `Affinity`: [a, 1, |a|^2] times the factor."""
        lifted = _with_square(x, pooled, at=1)
        return lifted.mul_(self.factor)

    def lift_columns(self, x: Tensor, pooled: Tensor | None, views: Sequence[int]) -> Tensor:
        """See `Affinity`: [-2 b, |b|^2, 1]."""
        lifted = _with_square(x, pooled, at=0)
        lifted[:, :-2].mul_(-2)
        return lifted

    def rows_back(self, lifted: Tensor, gradient: Tensor) -> Tensor:
        """See `Affinity`."""
        return torch.addcmul(gradient[:, :-2] * self.factor, lifted[:, :-2], gradient[:, -1:], value=2)

    def columns_back(
        self, lifted: Tensor, gradient: Tensor, home: Tensor, pooled: Tensor | None, views: Sequence[int]
    ) -> Tensor | None:
        """See `Affinity`."""
        home.add_(gradient[:, :-2], alpha=-2).addcmul_(lifted[:, :-2], gradient[:, -2:-1], value=-1)
        return None


@dataclass(frozen=True)
class Gaussian(_OfDistance):
    """l = -|a - b|^2 / (2 sigma^2).

    Attributes:
        sigma: width, > 0. A learned temperature tau makes it sigma sqrt(tau).
    """

    sigma: float = SIGMA
    name = "gaussian"

    def __post_init__(self) -> None:
        require_positive("sigma", self.sigma)

    @property
    def factor(self) -> float:
        """See `_OfDistance`."""
        return -0.5 / self.sigma**2

    def logits(self, rows: Tensor, columns: Tensor, taking_part: int) -> Tensor:
        """See `Affinity`."""
        return -_squared_distances(rows, columns) / (2 * self.sigma**2)


@dataclass(frozen=True)
class Student(_OfDistance):
    """l = -(nu + 1) / 2 log(1 + |a - b|^2 / nu): heavy tails, so that what is far need not be farther still.

    Attributes:
        degrees_of_freedom: nu > 0. 2: I-Con's t-SimCLR; 1: t-SNE and t-SimCNE; large: the gaussian of sigma = 1.
    """

    degrees_of_freedom: float = DEGREES_OF_FREEDOM
    name = "student"
    links = True

    def __post_init__(self) -> None:
        require_positive("degrees_of_freedom", self.degrees_of_freedom)

    @property
    def factor(self) -> float:
        """See `_OfDistance`."""
        return 1 / self.degrees_of_freedom

    @property
    def slope(self) -> float:
        """See `Affinity.link`."""
        return -(self.degrees_of_freedom + 1) / 2

    def logits(self, rows: Tensor, columns: Tensor, taking_part: int) -> Tensor:
        """See `Affinity`."""
        return self.slope * torch.log1p(_squared_distances(rows, columns) / self.degrees_of_freedom)

    def link(self, x: Tensor, logits: Tensor, taking_part: int, factor: float) -> None:
        """See `Affinity`: y = 1 + x. Rounding may leave a small distance below 0."""
        x.clamp_(min=0)
        if self.degrees_of_freedom > LIGHT_TAILS:
            torch.log1p(x, out=logits)
            x.add_(1)
        else:
            torch.log(x.add_(1), out=logits)
        logits.mul_(self.slope * factor)


@dataclass(frozen=True)
class Clusters(Affinity):
    """l = log((1 - s) sum_c phi_c(a) phi_c(b) / S_c + s / N): the chance to meet b in the cluster of a.

    Embeddings are the C >= 2 logits of the clusters. Over all columns the sum is 1, so q is that chance at tau = 1.

    Attributes:
        share: s in [0, 1], uniform: I-Con's debiasing of the learned row.
    """

    share: float = 0.0
    name = "clusters"
    links = True
    pools = True

    def __post_init__(self) -> None:
        require_share("share", self.share)

    def logits(self, rows: Tensor, columns: Tensor, taking_part: int) -> Tensor:
        """See `Affinity`."""
        phi_rows, phi_columns = rows.softmax(1), columns.softmax(1)
        chance = phi_rows @ (phi_columns / phi_columns.sum(0)).T
        return ((1 - self.share) * chance + self.share / taking_part).log()

    def pool(self, columns: Tensor, count: int) -> Tensor:
        """See `Affinity`: the sizes S of the clusters."""
        return columns.softmax(2).sum(1)

    def lift_rows(self, x: Tensor, pooled: Tensor | None) -> Tensor:
        """See `Affinity`: (1 - s) phi."""
        return (1 - self.share) * x.softmax(1)

    def lift_columns(self, x: Tensor, pooled: Tensor | None, views: Sequence[int]) -> Tensor:
        """See `Affinity`: phi / S."""
        return x.softmax(1).div_(_sizes(pooled, views))

    def rows_back(self, lifted: Tensor, gradient: Tensor) -> Tensor:
        """See `Affinity`: of softmax."""
        product = lifted * gradient
        share = product.sum(1, keepdim=True) / max(1 - self.share, torch.finfo(lifted.dtype).tiny)
        return product.addcmul_(lifted, share, value=-1)

    def columns_back(
        self, lifted: Tensor, gradient: Tensor, home: Tensor, pooled: Tensor | None, views: Sequence[int]
    ) -> Tensor | None:
        """See `Affinity`: of softmax and of the division by S."""
        sizes, product = _sizes(pooled, views), gradient.mul_(lifted)
        home.add_(product).addcmul_(lifted.mul_(sizes), product.sum(1, keepdim=True), value=-1)
        return product.sum(0) / -sizes

    def link(self, x: Tensor, logits: Tensor, taking_part: int, factor: float) -> None:
        """See `Affinity`: y = x + s / N. Without a share, chances that are 0 or nearly so count as a very small one."""
        x.add_(self.share / taking_part).clamp_(min=torch.finfo(x.dtype).tiny ** 0.5)
        torch.log(x, out=logits).mul_(factor)


COSINE = Cosine()
AFFINITIES: dict[str, type[Affinity]] = {kind.name: kind for kind in (Cosine, Gaussian, Student, Clusters)}


def pulled_back(lift: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to x, from that with respect to lift(x)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(lift(leaf), leaf, gradient)[0]


def _with_square(x: Tensor, pooled: Tensor | None, at: int) -> Tensor:
    """x without the mean of all columns, with its squared norm and 1 beside it (n, d + 2); the square is there `at`."""
    assert pooled is not None
    lifted = x.new_ones(len(x), x.shape[1] + 2)
    centred = torch.sub(x, pooled.sum(0), out=lifted[:, :-2])
    torch.sum(centred.square(), 1, out=lifted[:, x.shape[1] + at])
    return lifted


def _sizes(pooled: Tensor | None, views: Sequence[int]) -> Tensor:
    """Sizes of the clusters in these views (C,)."""
    assert pooled is not None
    return pooled[list(views)].sum(0)


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(r, d) and (N, d) give (r, N), by their differences."""
    return (rows[:, None] - columns[None]).square().sum(2)
