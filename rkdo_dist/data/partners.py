"""Partners: the samples whose views are the second ones (`field.delivery=sampled`), for one epoch at a time.

The interface of sampled delivery, from rows of p to images:

1. When an epoch begins, and not before, its partners are known: `order.partner_draws(seed, epoch, ids)` gives a number
   in [0, 1) for each sample, and `field.persistent.Rows.draw` the sample j ~ p(.|i) that it selects. So p may have
   changed at the border of two epochs.
2. `Partners.set(epoch, partners)` makes them known to the loader's workers, which have stayed: they wait for it before
   they read the epoch's first sample. `lane_stream(..., partners=...)` then delivers micro-batches whose `second` holds
   the samples j, row by row.
3. The second view of row i is a view of j's image, with the random draws of i's own second view: p = identity delivers
   the bits of a stream without partners.

Everything is a function of (seed, epoch, i) and of p at the border: a sample is delivered once in an epoch, so its step
adds nothing. No rank, worker or restart enters.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from rkdo_dist.data.errors import DataError
from rkdo_dist.data.index import ShardIndex

_NONE, _OVER = -1, -2
_PATIENCE = 0.002  # seconds between two looks of a waiting worker


class Partners:
    """A table that the main process fills when an epoch begins and loader workers read.

    One table is enough: an epoch's partners are set when every batch of the one before has been delivered.

    Args:
        samples: n of the split.
        shared: whether other processes will read it.
    """

    def __init__(self, samples: int, shared: bool) -> None:
        self._table = torch.full((samples + 1,), _NONE, dtype=torch.int64)  # the last entry is the epoch
        self._shared = shared
        if shared:
            self._table.share_memory_()

    def set(self, epoch: int, partners: np.ndarray) -> None:
        """Make the partners (n,) int64 of every sample known for an epoch."""
        self._table[:-1] = torch.from_numpy(partners)
        self._table[-1] = epoch

    def of(self, epoch: int) -> np.ndarray | None:
        """The partners (n,) int64 of an epoch, as soon as they are set; None if the stream has ended instead."""
        while (at := int(self._table[-1])) != epoch:
            if at == _OVER:
                return None
            assert self._shared, f"the partners of epoch {epoch} are not set"
            time.sleep(_PATIENCE)
        return self._table[:-1].numpy()

    def end(self) -> None:
        """Nobody is to wait any more."""
        self._table[-1] = _OVER


def require_random_access(index: ShardIndex) -> None:
    """Refuse sources whose samples cannot be read in any order.

    Raises:
        DataError: for shards that lie elsewhere.
    """
    if index.address is not None:
        raise DataError(
            f"field.delivery=sampled reads samples in any order, but the shards of {index.place} lie elsewhere and are "
            "fetched one after another: copy them to this machine, or use field.delivery=restricted"
        )
