"""`train.micro_batch=auto`: the largest micro-batch that fits the memory of every rank, by the estimate of
`training.memory`. Once chosen it is a number like any other: it decides results (batch norm sees a micro-batch), it is
written to config.yaml, and a run that is continued keeps the number it has.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from rkdo_dist import parts
from rkdo_dist.config import Config, ConfigError
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.exchange import group
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.rundir import RunDirectory
from rkdo_dist.training import machine, memory
from rkdo_dist.training.shape import shape_of

ROOM = 0.9  # share of the memory that a step may need by the estimate, which leaves out what libraries take


def resolved(
    config: Config, runtime: Runtime, index: ShardIndex, run: RunDirectory | None, backbone: nn.Module | None = None
) -> Config:
    """`config` with a number for `train.micro_batch`, the same on every rank (collective).

    Args:
        run: the directory to train in; None: nothing is continued.
        backbone: a module in place of `encoder.backbone`.

    Raises:
        ConfigError: if no micro-batch fits, on every rank.
    """
    if config.train.micro_batch != "auto":
        return config
    size = group.from_rank_zero(group.on_main(lambda: _recorded(config, run), "looking at run.resume"))
    if size is None:
        sharing = memory.sharing(runtime)
        fitting: list[list[int]] = group.gather_objects(  # type: ignore[assignment]
            group.together(lambda: _fitting(config, runtime, index, backbone, sharing), "measuring a forward pass")
        )
        common = set(fitting[0]).intersection(*fitting)
        if not common:
            raise ConfigError(
                "train.micro_batch=auto: by the estimate of memory (`rkdo doctor`, with a number) no micro-batch fits "
                "on every process; use train.recompute=true, more processes, or a smaller train.global_batch"
            )
        size = max(common)
    return _with(config, size)


def candidates(batch: int, world: int) -> list[int]:
    """The divisors of a global batch that give every rank the same number of lanes."""
    return [size for size in range(1, batch // world + 1) if batch % (size * world) == 0]


def _with(config: Config, size: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=size))


def _recorded(config: Config, run: RunDirectory | None) -> int | None:
    """What the run to be continued was begun with, None if there is none."""
    if run is None or config.run.resume == "never":
        return None
    source = run if config.run.resume == "auto" else RunDirectory(config.run.resume)
    return source.config().train.lane_size if (source.path / "config.yaml").is_file() else None


def _fitting(
    config: Config, runtime: Runtime, index: ShardIndex, backbone: nn.Module | None, sharing: int
) -> list[int]:
    """The candidates that fit here, where `sharing` ranks share the memory."""
    encoder = parts.make_encoder(config, pretrained=False, backbone=backbone).to(runtime.device)
    lane = memory.lane_growth(config, runtime, index, encoder)
    free = machine.available_bytes(runtime.device) * ROOM / sharing
    objective, found = parts.make_objective(config, 0.0), []
    for size in candidates(config.train.global_batch, runtime.world):
        sized = _with(config, size)
        shape = shape_of(sized, encoder, objective, runtime.world, runtime.launch)
        if sum(memory.needed(sized, runtime, index, shape, lane(size)).values()) <= free:
            found.append(size)
    return found
