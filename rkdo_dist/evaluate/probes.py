"""Online probes: what a few labelled images say of the encoder while it trains.

A probe is a small evaluation of the weights as they are at that step. Up to `SAMPLES` images of the train split and as
many of the test split, as they are (no augmentation), are embedded in evaluation mode and without gradient. On their
backbone features, `probe_linear` is the test accuracy of logistic regression on standardised features and `probe_knn`
that of the weighted k-NN classifier, both as in `scores`. Which images is a function of the splits alone: blocks of
`BLOCK`, evenly spaced in the order of the index.

So a probe keeps no state, costs one forward pass over these images, and is the same after a restart and on any number
of processes. Nothing of it reaches the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from rkdo_dist import parts
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.samples import MicroBatch
from rkdo_dist.data.stream import evaluation_stream
from rkdo_dist.encoders import Encoder
from rkdo_dist.evaluate import scores
from rkdo_dist.evaluate.evaluation import has_labels
from rkdo_dist.evaluate.features import FrozenFeatures, gather_features, plain_features
from rkdo_dist.exchange import group
from rkdo_dist.ranks.runtime import Runtime

BLOCK = 32  # images embedded at a time
SAMPLES = 1024  # of each split, at most
_ACCURACIES: dict[str, Callable[..., float]] = {
    "linear": partial(scores.linear_evaluation, standardise=True),
    "knn": scores.knn_accuracy,
}


def check_probes(config: Config, index: ShardIndex) -> None:
    """Refuse probes that the data do not allow.

    Raises:
        ConfigError: if a split that they need is not there, or has no labels.
    """
    if not config.evaluate.probes:
        return
    for split in (config.evaluate.train_split, config.evaluate.test_split):
        reason = f"has no split {split!r}" if split not in index.splits else "has no labels in it"
        if split not in index.splits or not has_labels(index, split):
            raise ConfigError(
                f"evaluate.probes={list(config.evaluate.probes)} needs labels in the splits "
                f"{config.evaluate.train_split!r} and {config.evaluate.test_split!r}, but {index.place} {reason}: "
                "leave evaluate.probes out"
            )


def probe(config: Config, runtime: Runtime, index: ShardIndex, encoder: Encoder) -> dict[str, float | None]:
    """The probes of `evaluate.probes`, the same on every rank (collective).

    Returns:
        `probe_linear` and `probe_knn`, those asked for, in [0, 1]; None where the labels of the images do not allow
        them, which is said once.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        train, test = (
            _features(config, runtime, index, encoder, split)
            for split in (config.evaluate.train_split, config.evaluate.test_split)
        )
    finally:
        encoder.train(was_training)
    found = group.on_main(lambda: _accuracies(config.evaluate.probes, train, test), "probing the features")
    return group.from_rank_zero(found or {})


def _features(
    config: Config, runtime: Runtime, index: ShardIndex, encoder: Encoder, split: str
) -> FrozenFeatures | None:

    def blocks() -> Iterator[tuple[int, MicroBatch]]:
        """With ids in the order of the blocks, without the gaps between them."""
        chosen = evaluation_stream(
            index,
            split,
            BLOCK,
            rank=runtime.rank,
            world=runtime.world,
            spread=SAMPLES // BLOCK,
            size=config.data.image_size,
            workers=config.data.workers,
        )
        for number, block in chosen:
            ids = number * BLOCK + torch.arange(len(block.ids))
            yield number, MicroBatch(block.keys, ids, block.images, block.labels)

    embed = plain_features(encoder, parts.make_views(config, index).plain, runtime)
    return gather_features(blocks(), embed, min(SAMPLES, index.split(split).samples), device=runtime.device)


def _accuracies(
    names: Sequence[str], train: FrozenFeatures | None, test: FrozenFeatures | None
) -> dict[str, float | None]:
    assert train is not None
    assert test is not None
    reason = scores.unscorable(scores.class_counts(test.labels), scores.class_counts(train.labels))
    if reason is not None:
        warnings.warn(f"evaluate.probes: {reason}, as far as the {SAMPLES} images of a probe go", stacklevel=2)
        return {f"probe_{name}": None for name in names}
    arrays = []
    for some in (train, test):
        labelled = some.labels >= 0
        arrays += [some.backbone[labelled], some.labels[labelled]]
    return {f"probe_{name}": _ACCURACIES[name](*arrays) for name in names}
