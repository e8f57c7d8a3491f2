"""The field's ordinary protocol: classifiers are fitted on the train split and scored on the test split.

Features stay on the ranks that computed them; queries, weights and sums travel. No collective waits for more than a few
thousand queries or one pass over a rank's samples.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rkdo_dist.evaluate import linear, neighbours, scores
from rkdo_dist.evaluate.common_metrics import one_thread
from rkdo_dist.evaluate.features import OwnFeatures, class_counts
from rkdo_dist.exchange import group


def full_protocol(train: OwnFeatures, test: OwnFeatures, k: int = scores.NEIGHBOURS) -> dict[str, Any]:
    """Score frozen features: fitted on the train split, scored on the test split (collective, default group).

    Unlabelled samples (label -1) are left out and counted.

    Args:
        train, test: this rank's part of whole splits.
        k: of the neighbourhood preservation.

    Returns:
        The same on every rank: `protocol` "full"; on the projected embeddings `linear_accuracy` and `knn_accuracy`
        (fitted on train) and `neighbourhood` (test split alone); on the backbone's features `linear_accuracy_backbone`
        and `knn_accuracy_backbone`; counts; `warnings`, rank zero's, as a list of sentences.

    Raises:
        ValueError: if a split has no labelled sample, one class only, too few samples, or features that are
            not finite; RankError with several ranks.
        Stopped: on every rank, when one was asked to stop.
    """
    counts = {name: class_counts(own.labels).cpu().numpy() for name, own in (("train", train), ("test", test))}
    reason = scores.unscorable(counts["test"], counts["train"], k)
    if reason is not None:
        raise ValueError(f"scores need labels: {reason}")
    unlabelled = torch.stack([(own.labels < 0).sum() for own in (train, test)])
    result: dict[str, Any] = {
        "protocol": "full",
        **{f"{name}_samples": int(counts[name].sum()) for name in counts},
        "unlabelled": int(group.all_reduce_integers(unlabelled).sum()),
        "standardised": True,
        "neighbours": k,
        "voters": scores.VOTERS,
    }
    with scores.gathered_warnings() as said, one_thread():
        for name in ("embeddings", "backbone"):
            fitted, scored = Labelled.of(train, name), Labelled.of(test, name)
            suffix = "" if name == "embeddings" else "_backbone"
            of = getattr(train, name), train.labels, getattr(test, name), test.labels
            result[f"linear_accuracy{suffix}"] = linear.linear_accuracy(*of)
            result[f"knn_accuracy{suffix}"] = knn_accuracy(fitted, scored)
            if name == "embeddings":
                result["neighbourhood"] = neighbourhood_preservation(scored, k)
    return result | {"warnings": group.from_rank_zero(said)}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """This rank's labelled samples of a split: `features` (m, f) float32, finite, `labels` and `ids` (m,) int64."""

    features: Tensor
    labels: Tensor
    ids: Tensor

    @staticmethod
    def of(own: OwnFeatures, name: str) -> Labelled:
        """Those of `own`, with its "embeddings" or "backbone" (collective).

        Raises:
            ValueError: if a feature is not finite; RankError with several ranks.
        """
        rows = (own.labels >= 0).nonzero()[:, 0]
        found = Labelled(getattr(own, name)[rows], own.labels[rows], own.ids[rows])

        def require_finite() -> None:
            broken = (~found.features.isfinite()).any(1).nonzero()[:, 0]
            if len(broken):
                raise ValueError(
                    f"features of {len(broken)} of {len(found.ids)} samples are not finite, the first is sample "
                    f"{int(found.ids[broken[0]])}"
                )

        group.together(require_finite, "looking at the features")
        return found


def knn_accuracy(train: Labelled, test: Labelled, k: int = scores.VOTERS) -> float:
    """Accuracy of the weighted k-NN classifier (Wu et al. 2018, section 3.4), as `scores.knn_accuracy` (collective)."""
    own = torch.tensor([len(train.ids), len(test.ids)], device=test.ids.device)
    fitted, scored = group.all_reduce_integers(own).tolist()
    highest = int(group.all_reduce_max(max((float(x.labels.max()) for x in (train, test) if len(x.ids)), default=-1.0)))
    queries, base = (torch.nn.functional.normalize(x.features, dim=1) for x in (test, train))
    squared, _, labels = neighbours.nearest(queries, base, train.ids, train.labels, min(k, fitted))
    # cosine = 1 - squared / 2 for unit rows; the common factor exp(1 / temperature) cancels in the comparison.
    votes, right = (-squared / (2 * scores.TEMPERATURE)).exp(), 0
    # On the host, which adds one after another: atomics would mix the order.
    for vote, of, label in zip(*(x.cpu().split(1024) for x in (votes, labels, test.labels)), strict=True):
        totals = vote.new_zeros(len(vote), highest + 1).scatter_add_(1, of, vote)
        right += int((totals.argmax(1) == label).sum())
    return int(group.all_reduce_integers(own.new_tensor(right))) / scored


def neighbourhood_preservation(test: Labelled, k: int) -> float:
    """The share of each sample's k nearest neighbours (Euclidean, itself excluded) that have its label (collective)."""
    _, _, labels = neighbours.nearest(test.features, test.features, test.ids, test.labels, k, test.ids)
    right = (labels == test.labels[:, None]).sum()
    everyone = int(group.all_reduce_integers(torch.tensor(len(test.ids), device=right.device)))
    return int(group.all_reduce_integers(right)) / (everyone * k)
