"""Facts of a step: one row of every rank, gathered in one collective before any weight moves.

Whatever a rank alone knows and all must know arrives here: what is not finite, the loss and its parts, a request to
stop, warnings for people, a batch that could not be read, labels. A row is 64-bit words: floats of the device, integers
of the host. The only host synchronisation of a step is the one that reads the rows.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import torch
from torch import Tensor

from rkdo_dist.exchange import group
from rkdo_dist.exchange.transfer import upload
from rkdo_dist.training.strategy import Exchanged, LossAndGradient, Position, Strategy


@dataclasses.dataclass(frozen=True)
class Told:
    """Facts of this rank's host for the others.

    Attributes:
        stop: exit code of a request to stop, 0 for none.
        replaced: damaged samples of the batch that were replaced.
        warned: whether warnings for people are held here.
        unread: whether the next batch could not be read here.
        digests: SHA-256 of each lane's sample keys, 32 bytes a lane.
    """

    stop: int = 0
    replaced: int = 0
    warned: bool = False
    unread: bool = False
    digests: bytes = b""


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts of a step, the same on every rank.

    Attributes:
        loss: mean over the global batch.
        parts: of the loss (`field.objectives`), means over the global batch.
        temperature_slope: derivative of the loss by tau0, if it was asked for.
        not_finite: the first embedding, or the loss, that is not finite, in words; empty if all are.
        gradient_not_finite: the same for gradients.
        gradient_norm: of the gradient, times the loss scale; None where the strategy learns it in its update.
        stop, replaced, warned, unread: the largest, the sum, and whether any, over ranks (see `Told`).
        digest: SHA-256 (hex) of the lanes' digests in lane order.
        labels: (B,) int64 on the host, of the global batch, if they were given.
    """

    loss: float
    parts: dict[str, float]
    temperature_slope: float | None
    not_finite: str
    gradient_not_finite: str
    gradient_norm: float | None
    stop: int
    replaced: int
    warned: bool
    unread: bool
    digest: str
    labels: Tensor | None


def gather(
    strategy: Strategy,
    embeddings: Tensor,
    field: LossAndGradient,
    exchanged: Exchanged,
    told: Told,
    at: Position,
    labels: Tensor | None,
) -> Facts:
    """Gather the facts of a step (collective).

    Args:
        strategy: whose order of summation the means of the loss follow.
        embeddings: (lanes,) bool, whether the embeddings of each of this rank's lanes are finite.
        field: the loss of the step.
        exchanged: whether gradients are finite, and their norm, which is the same on every rank.
        told: by this rank's host.
        at: the step.
        labels: (b,) int64 on the host, of this rank's samples, if all ranks are to know them.
    """
    gradients = exchanged.finite
    sums = torch.stack([x.double() for x in field.sums.values()], dim=1)
    numbers = torch.cat([x.double().flatten() for x in (embeddings, gradients, sums)])
    words = np.array([told.stop, told.replaced, told.warned, told.unread], dtype=np.int64)
    known = np.empty(0, dtype=np.int64) if labels is None else labels.numpy()
    words = np.concatenate([words, known, np.frombuffer(told.digests, dtype=np.int64)])
    row = torch.cat([numbers.view(torch.int64), upload(torch.from_numpy(words), numbers.device)])
    table, norm = _on_host(group.all_gather_rows(row[None]), exchanged.norm)
    numbers, hosts = table[:, : len(numbers)].view(torch.float64), table[:, len(numbers) :].numpy()
    embeddings_fine, gradients_fine, sums_found = numbers.split(
        [embeddings.numel(), gradients.numel(), sums.numel()], dim=1
    )
    means = dict(zip(field.sums, strategy.mean(sums_found.reshape(-1, sums.shape[1])).tolist(), strict=True))
    loss, slope = means.pop("loss"), means.pop("temperature_slope", None)
    not_finite = _broken("an embedding", embeddings_fine, at, lanes=True)
    if not not_finite and not np.isfinite(loss):
        not_finite = f"the loss of step {at.step + 1} is {loss}"
    if not not_finite and slope is not None and not np.isfinite(slope):
        not_finite = f"the derivative of the loss of step {at.step + 1} by the temperature is {slope}"
    stop, replaced, warned, unread = hosts[:, :4].T
    return Facts(
        loss=loss,
        parts=means,
        temperature_slope=slope,
        not_finite=not_finite,
        gradient_not_finite=_broken("the gradient", gradients_fine, at, lanes=gradients.ndim > 0),
        gradient_norm=norm,
        stop=int(stop.max()),
        replaced=int(replaced.sum()),
        warned=bool(warned.any()),
        unread=bool(unread.any()),
        digest=hashlib.sha256(hosts[:, 4 + len(known) :].tobytes()).hexdigest(),
        labels=None if labels is None else torch.from_numpy(hosts[:, 4 : 4 + len(known)].flatten()),
    )


def _on_host(table: Tensor, norm: Tensor | None) -> tuple[Tensor, float | None]:
    """Both in one transfer."""
    if norm is None:
        return table.cpu(), None
    words = torch.cat([table.flatten(), norm.double().view(1).view(torch.int64)]).cpu()
    return words[:-1].view(table.shape), float(words[-1:].view(torch.float64))


def _broken(what: str, fine: Tensor, at: Position, lanes: bool) -> str:
    """In words, the first of (ranks, lanes) that is not `fine`; empty if all are."""
    if bool(fine.all()):
        return ""
    rank, lane = (int(x) for x in (fine == 0).nonzero()[0])
    where = f" (rank {rank}, lane {rank * fine.shape[1] + lane})" if lanes else ""
    return f"{what} of step {at.step + 1} is not finite{where}"
