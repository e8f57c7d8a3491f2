"""Linear evaluation of features that stay on the ranks that computed them: full-batch L-BFGS.

The same problem and the same steps as scikit-learn's `LogisticRegression(max_iter=1000)` behind a `StandardScaler`
(scipy's L-BFGS-B, on rank zero): the mean cross-entropy of n samples plus |W|^2 / (2 n). Only weights and sums over
samples travel: rank zero sends a point, and every rank adds what its samples say of value and gradient there.

Sums are formed in float64 over each block of samples as it was embedded, and added as whole multiples of a power of two
that is chosen from bounds. Whole numbers can be added in any order, so the fit is the same, bit for bit, on any number
of ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from scipy import optimize
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from rkdo_dist.evaluate.features import class_counts
from rkdo_dist.exchange import group
from rkdo_dist.exchange.transfer import upload
from rkdo_dist.ranks import signals

BLOCK = 256  # samples of a block
_OPTIONS = {"maxiter": 1000, "maxls": 50, "gtol": 1e-4, "ftol": 64 * np.finfo(float).eps}  # scikit-learn's
_BITS = 61  # of sums as whole numbers


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Test accuracy of multinomial logistic regression on standardised features (collective, default group).

    Args:
        train, test: (m, f) float32 features of this rank's samples, in blocks of `BLOCK` that do not depend on the
            number of ranks (the last of a rank may be shorter); finite.
        train_labels, test_labels: (m,) int64 on the same device; -1: the sample is left out.

    Returns:
        The same on every rank.

    Raises:
        ValueError: if the training samples have fewer than two classes.
        Stopped: on every rank, when one was asked to stop.
        RankError: for an error on any rank: on all.
    """
    fit = _Fit(train, train_labels)
    point = fit.minimise()
    right = torch.zeros(2, dtype=torch.int64, device=test.device)
    for x, y in zip(test.split(BLOCK), test_labels.split(BLOCK), strict=True):
        predicted = fit.classes[fit.logits(x.double(), point).argmax(1)]
        right += torch.stack([(predicted == y).sum(), (y >= 0).sum()])
    correct, scored = group.all_reduce_integers(right).tolist()
    return correct / scored


class _Fit:
    """The problem: this rank's samples, and what all ranks know of everybody's."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self._blocks = list(zip(x.split(BLOCK), labels.split(BLOCK), strict=True)) if len(x) else []
        labelled = labels >= 0
        counts = class_counts(labels)
        self.classes, n = counts.nonzero()[:, 0], int(counts.sum())
        if len(self.classes) < 2:
            raise ValueError("linear evaluation needs at least two classes among its training samples")
        self._number = torch.zeros_like(counts)  # of each label's class
        self._number[self.classes] = torch.arange(len(self.classes), device=x.device)
        self._rows = 1 if len(self.classes) == 2 else len(self.classes)  # of two classes, the first has logit zero
        self._samples, self._shape, self._device = n, (self._rows, x.shape[1]), x.device
        self.size = self._rows * (x.shape[1] + 1)
        self._largest = x[labelled].abs().amax(0).double() if labelled.any() else x.new_zeros(x.shape[1]).double()
        if group.world_size() > 1:
            dist.all_reduce(self._largest, op=dist.ReduceOp.MAX)
        # what gradients by weights, and by intercepts, are measured in
        self._unit, self._unit_of_one = _unit(n * self._largest), float(_unit(torch.tensor(float(n))))
        self._mean = self._moment(lambda x: x, n * self._largest)
        variance = self._moment(lambda x: (x - self._mean).square(), 4 * n * self._largest.square())
        eps = np.finfo(np.float64).eps  # scikit-learn's rule for a feature that is constant
        constant = variance <= n * eps * variance + (n * self._mean * eps).square()
        self._scale = torch.where(constant, 1.0, variance.sqrt())

    def logits(self, x: Tensor, point: Tensor) -> Tensor:
        """Logits (r, classes) of features (r, f) float64 at a point: W of standardised features, then b."""
        weights, intercepts = self._of_plain_features(point)
        z = x @ weights.T + intercepts
        return torch.cat([torch.zeros_like(z), z], 1) if self._rows == 1 else z

    def minimise(self) -> Tensor:
        """The fitted point, on every rank (collective): rank zero moves, all answer what is there."""
        failure: Exception | None = None
        if group.rank() == 0:
            point = np.zeros(self.size)
            try:
                with threadpool_limits(1):
                    found = optimize.minimize(
                        lambda x: self._at(*self._told(x)), point, method="L-BFGS-B", jac=True, options=_OPTIONS
                    )
                point = found.x
                if not found.success:
                    message = f"the linear classifier has not converged after {found.nit} iterations: {found.message}"
                    warnings.warn(message, ConvergenceWarning, stacklevel=2)
            except group.RankError:  # raised alike everywhere
                raise
            except Exception as error:
                failure = error
            fitted = self._told(point, last=True)[1]
        else:
            while bool((told := self._told())[0]):
                self._at(*told)
            fitted = told[1]
        group.together(lambda: _raise(failure), "fitting the linear classifier")
        return fitted

    def _told(self, point: NDArray[np.float64] | None = None, last: bool = False) -> tuple[Tensor, Tensor]:
        """The point that rank zero sends, and the unit that its loss is measured in (0: it is the last point)."""
        message = torch.zeros(1 + self.size, dtype=torch.float64, device=self._device)
        if point is not None:
            message[1:] = upload(torch.from_numpy(point), self._device)
        if point is not None and not last:
            weights, intercepts = self._of_plain_features(message[1:])
            steepest = (weights.abs() @ self._largest + intercepts.abs()).max()
            message[0] = _unit(self._samples * (2 * steepest + math.log(len(self.classes))))
        if group.world_size() > 1:
            dist.broadcast(message, src=0)
        return message[0], message[1:]

    def _at(self, unit: Tensor, point: Tensor) -> tuple[float, NDArray[np.float64]]:
        """Value and gradient of the problem at a point (collective); all that the host must know in one transfer."""
        attempt = group.Attempt(lambda: self._own_sums(unit, point))
        words = torch.zeros(3 + self.size, dtype=torch.int64, device=self._device)
        if attempt.value is not None:
            words[2:] = attempt.value
        words[0].fill_(attempt.failed)
        words[1].fill_(signals.current().code > 0)
        words = group.all_reduce_integers(words)
        n, (weights, _) = self._samples, self._parts(point)
        value = (words[2].double() * unit + weights.square().sum() / 2) / n
        by_weights, by_intercepts = self._parts(words[3:].double())
        by_intercepts = by_intercepts * self._unit_of_one
        by_weights = by_weights * self._unit - by_intercepts[:, None] * self._mean
        gradient = [((by_weights / self._scale + weights) / n).flatten(), by_intercepts / n]
        found = torch.cat([words[:2].double(), value[None], *gradient]).cpu().numpy()
        attempt.result(found[0] > 0, "fitting the linear classifier")
        if found[1] > 0:
            raise signals.Stopped(int(group.all_reduce_max(float(signals.current().code))))
        return float(found[2]), found[3:]

    def _own_sums(self, unit: Tensor, point: Tensor) -> Tensor:
        """Of this rank's samples, the loss and its gradient by the weights of plain features, as whole numbers."""
        loss = torch.zeros((), dtype=torch.int64, device=self._device)
        by_weights = torch.zeros(self._shape, dtype=torch.int64, device=self._device)
        by_intercepts = torch.zeros(self._rows, dtype=torch.int64, device=self._device)
        for x, labels in self._blocks:
            x, labelled = x.double(), (labels >= 0).double()
            z, own = self.logits(x, point), self._number[labels.clamp(min=0)][:, None]
            log_p = torch.log_softmax(z, 1)
            loss += _whole(-(log_p.gather(1, own)[:, 0] * labelled).sum(), unit)
            slopes = log_p.exp().scatter_add_(1, own, torch.full_like(z[:, :1], -1.0)) * labelled[:, None]
            slopes = slopes[:, -self._rows :]
            by_weights += _whole(slopes.T @ x, self._unit)
            by_intercepts += _whole(slopes.sum(0), self._unit_of_one)
        return torch.cat([loss[None], by_weights.flatten(), by_intercepts])

    def _moment(self, of: Callable[[Tensor], Tensor], bound: Tensor) -> Tensor:
        """The mean (f,) over all samples of a function of their features, whose sums are at most `bound` (f,)."""
        unit = _unit(bound)
        total = torch.zeros(self._shape[1], dtype=torch.int64, device=self._device)
        for x, labels in self._blocks:
            total += _whole((of(x.double()) * (labels >= 0)[:, None]).sum(0), unit)
        return group.all_reduce_integers(total).double() * unit / self._samples

    def _parts(self, point: Tensor) -> tuple[Tensor, Tensor]:
        return point[: -self._rows].view(self._shape), point[-self._rows :]

    def _of_plain_features(self, point: Tensor) -> tuple[Tensor, Tensor]:
        weights, intercepts = self._parts(point)
        weights = weights / self._scale
        return weights, intercepts - weights @ self._mean


def _unit(bound: Tensor) -> Tensor:
    """A power of two of which sums of at most `bound` are so many that 64 bits hold their number."""
    mantissa = torch.frexp(bound.double()).mantissa
    return torch.where(mantissa == 0, 1.0, bound / mantissa) * 2.0**-_BITS  # exact: bound = mantissa * 2**exponent


def _whole(x: Tensor, unit: Tensor | float) -> Tensor:
    return (x / unit).round().to(torch.int64)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
