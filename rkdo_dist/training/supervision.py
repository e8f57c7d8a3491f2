"""Who supervises in a run: rows of p over all training samples, and how they reach the loss.

Rows of the supervisors "neighbours" and a file are sharded over the ranks like those of a persistent field
(`exchange.store`), and in every checkpoint like them. They are delivered in one of two ways (`field.delivery`):

- "restricted": a step fetches the rows of its samples and restricts them to the batch (`training.persistent`).
- "sampled": when an epoch begins, one sample is drawn of every row (`Sampled`, `data.partners`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rkdo_dist import parts
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.config.sections import DataConfig
from rkdo_dist.data.given import read_features, read_rows
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.order import partner_draws
from rkdo_dist.data.partners import Partners, require_random_access
from rkdo_dist.data.shards import keys_of, labels_of
from rkdo_dist.data.stream import evaluation_stream
from rkdo_dist.data.views import Views
from rkdo_dist.encoders import Encoder
from rkdo_dist.evaluate.features import collected, own_features, plain_features
from rkdo_dist.exchange import group
from rkdo_dist.exchange.neighbours import nearest_of_all
from rkdo_dist.exchange.store import RowStore, Shards
from rkdo_dist.field.neighbours import mutual, require_neighbours, walked, with_self
from rkdo_dist.field.persistent import Rows
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.training.persistent import own_samples

NEIGHBOURS = 20
BLOCK = 256  # samples that are embedded at once


class Sampled:
    """Sampled delivery: partners of every sample, drawn when an epoch begins.

    Args:
        draw: (n,) float64 in [0, 1) -> (n,) int64, a sample of every row; collective, the same on every rank. What it
            draws of may have changed since the epoch before (see `data.partners`).
        samples: n.
        seed: of the run.

    Attributes:
        partners: of the stream that reads now.
    """

    partners: Partners

    def __init__(self, draw: Callable[[Tensor], Tensor], samples: int, seed: int) -> None:
        self.draw, self._samples, self._seed = draw, samples, seed

    def open(self, workers: int) -> Partners:
        """A table for a new stream, which `workers` processes read."""
        self.partners = Partners(self._samples, shared=workers > 0)
        return self.partners

    def begin(self, epoch: int) -> None:
        """Draw the partners of an epoch (collective)."""
        uniform = partner_draws(self._seed, epoch, np.arange(self._samples))
        self.partners.set(epoch, self.draw(torch.from_numpy(uniform)).numpy())


def make_sampled(config: Config, index: ShardIndex, store: RowStore | None) -> Sampled | None:
    """Sampled delivery, if that is asked for.

    Args:
        store: the rows that are drawn of, for a supervisor that has some.

    Raises:
        DataError: if the samples cannot be read in any order.
    """
    if config.field.value("delivery") != "sampled":
        return None
    require_random_access(index)
    split = config.data.split
    samples, seed = index.split(split).samples, config.run.seed
    if store is not None:
        return Sampled(store.draw, samples, seed)
    if parts.supervisor_of(config) == "labels":
        return Sampled(_of_the_same_label(torch.tensor(labels_of(index, split))), samples, seed)
    return Sampled(lambda uniform: torch.arange(samples), samples, seed)


def _of_the_same_label(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Draws a sample of the same label, any of them alike, the sample itself included."""
    order = labels.argsort(stable=True)
    _, which, counts = labels.unique(return_inverse=True, return_counts=True)
    first, count = (counts.cumsum(0) - counts)[which], counts[which]
    return lambda uniform: order[first + torch.minimum((uniform * count).long(), count - 1)]


def supervisor_rows(config: Config, runtime: Runtime, index: ShardIndex, encoder: Encoder, views: Views) -> Rows | None:
    """p(0) of the samples that this rank owns (`own_samples`), without a uniform share (collective).

    Args:
        encoder: as it is at the beginning of the run.

    Returns:
        None for a supervisor that has no rows of its own (identity, labels).

    Raises:
        ValueError: on every rank, for features or rows that do not fit the data.
    """
    supervisor, split = parts.supervisor_of(config), config.data.split
    if supervisor in ("identity", "labels"):
        return None
    samples = index.split(split).samples

    def keys() -> list[str]:
        return keys_of(index, split)

    first, stop = own_samples(config, samples)
    if supervisor != "neighbours":
        what = f"reading field.supervisor={supervisor}"
        rows = group.together(lambda: read_rows(Path(supervisor), samples, keys), what)
        return rows.slice(first, stop)
    f = config.field
    k = f.neighbours or NEIGHBOURS
    group.together(lambda: check_neighbours(k, samples), "looking at field.neighbours")
    mine = range(*Shards(samples, runtime.world).own(runtime.rank))
    if f.features:
        what = f"reading field.features={f.features}"
        found = group.together(lambda: read_features(Path(f.features), split, samples, keys), what)
        found = found[mine.start : mine.stop]
    else:
        found = features_of(mine, runtime, index, split, config.data, encoder, views)
    table = nearest_of_all(found.to(runtime.device), samples, k)
    table = mutual(table) if f.mutual else table
    own = range(first, stop)
    return with_self(walked(table, f.walk, f.stored, own), own, (table[first:stop] < samples).sum(1))


def check_neighbours(k: int, samples: int) -> None:
    """Raises ConfigError if `field.neighbours` are more than there are."""
    try:
        require_neighbours(k, samples)
    except ValueError as error:
        raise ConfigError(f"field.neighbours={k}: {error}") from None


def features_of(
    wanted: range,
    runtime: Runtime,
    index: ShardIndex,
    split: str,
    data: DataConfig,
    encoder: Encoder,
    views: Views,
    which: str = "backbone",
) -> Tensor:
    """Backbone features (w, f) or "embeddings" (w, d) float32 of some samples' plain images, on the host (collective).

    They are embedded a block at a time, so that they do not depend on the number of ranks.

    Args:
        wanted: consecutive samples; each rank may want others.
    """
    samples = index.split(split).samples
    was_training = encoder.training
    encoder.eval()

    try:
        blocks = evaluation_stream(
            index,
            split,
            BLOCK,
            rank=runtime.rank,
            world=runtime.world,
            size=data.image_size,
            workers=data.workers,
        )
        found = own_features(blocks, plain_features(encoder, views.plain, runtime), samples, device=runtime.device)
    finally:
        encoder.train(was_training)
    return torch.from_numpy(collected([getattr(found, which)], found.ids, wanted).view(np.float32))
