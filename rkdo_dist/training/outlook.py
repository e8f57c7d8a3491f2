"""What may be expected of a run's supervisors, in words: said before the first step, and in reports.

Both sentences are arithmetic (docs/supervisors.md, docs/recursion-study.md): how much of a row of p reaches a batch,
and how much of its own positive is left after all visits.
"""

from __future__ import annotations

import math

from rkdo_dist import parts
from rkdo_dist.config import Config

FORGOTTEN = 0.05  # a row with less of its own positive supervises with what the encoder believes


def expectations(config: Config, samples: int, steps_per_epoch: int) -> list[str]:
    """Sentences for people; none where rows of p are those of the step alone.

    Args:
        samples: n of the training split.
    """
    f, batch = config.field, config.train.global_batch
    persistent = f.recursion == "persistent"
    rows = parts.supervisor_of(config) not in ("identity", "labels") and f.value("delivery") != "sampled"
    said = []
    if (rows or persistent) and f.recursion != "restart" and samples > batch:
        kept = (batch - 1) / (samples - 1)
        said.append(
            f"dilution: a batch of {batch:,} out of {samples:,} samples keeps {kept:.2%} of what a row gives to "
            f"others, so a row that is half relation is {1 / (1 + kept):.1%} identity in its batch"
        )
    left = positive_left(config, samples, steps_per_epoch) if persistent else 1.0
    if left < FORGOTTEN:
        said.append(
            f"forgetting: field.coupling={f.coupling:g} leaves {left:.2g} of a row's mass on its own positive by the "
            "end, so p will be what the encoder believes, and the loss falls without learning; in our study such rows "
            "lost 0.012 in k-NN accuracy. A coupling of 0.1, or one that a schedule takes to 0, keeps more"
        )
    return said


def positive_left(config: Config, samples: int, steps_per_epoch: int) -> float:
    """The product of 1 - coupling over the visits of a row, which p keeps of its first value (q's own share aside)."""
    epochs = config.train.epochs
    visits = min(1.0, steps_per_epoch * config.train.global_batch / samples)  # of a row in an epoch
    couplings = (parts.coupling_at(config, epoch / epochs) for epoch in range(epochs))
    return math.prod((1 - min(1.0, c)) ** visits for c in couplings)
