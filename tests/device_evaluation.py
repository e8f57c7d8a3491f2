"""Evaluations on the mock device, and what they ask of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console

from rkdo_dist import parts
from rkdo_dist.data.stream import MicroBatch
from rkdo_dist.data.views import Views
from rkdo_dist.encoders import Encoder
from rkdo_dist.evaluate import linear, neighbours, probes
from rkdo_dist.evaluate.evaluation import evaluate_encoder
from rkdo_dist.evaluate.features import OwnFeatures, at_rank_zero, own_features, plain_features
from rkdo_dist.evaluate.full_protocol import full_protocol
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.rundir import RunDirectory
from tests.mock_device import CUDA, Device, mock_device

BLOCK, WIDTH, CLASSES = 16, 12, 3


def asked(world: int, made: Callable[[], Callable[[], object]]) -> Device:
    """What is asked of the device by the function that `made` returns."""
    with mock_device(world) as device:
        work = made()
        device.clear()
        work()
        return device


def embedding(world: int, blocks: int) -> Device:
    """Rank zero embeds so many blocks of a split; it has all of them, as the mock adds up nothing."""

    def made() -> Callable[[], object]:
        embed = plain_features(_encoder(), Views(size=12).plain, _runtime(world))
        split = [(k, _block(k)) for k in range(blocks)]
        return lambda: own_features(split, embed, BLOCK * blocks, device=CUDA)

    return asked(world, made)


def collecting(world: int, samples: int) -> Device:
    """Features of so many samples travel to rank zero."""

    def made() -> Callable[[], object]:
        own = _made_up(samples, 0)
        return lambda: at_rank_zero(own, own.ids, samples)

    return asked(world, made)


def scoring(world: int, samples: int) -> tuple[Device, dict[str, Any], int]:
    """k-NN and linear evaluation of rank zero's samples: the counts, the scores, points that L-BFGS has tried."""
    found: dict[str, Any] = {}

    def made() -> Callable[[], object]:
        train, test = (_made_up(samples, seed) for seed in (0, 1))
        return lambda: found.update(full_protocol(train, test))

    with (
        mock.patch.object(neighbours, "QUERIES", 128),
        mock.patch.object(linear._Fit, "_at", autospec=True, side_effect=linear._Fit._at) as points,
    ):
        device = asked(world, made)
    return device, found, points.call_count


def whole(run: Path, *settings: str) -> tuple[Device, Device]:
    """An evaluation, and the probes, with a run's settings, of a new encoder on one rank."""
    directory = RunDirectory(run)
    config = directory.config(settings)
    index = parts.open_index(config)
    found = []
    for evaluate in (
        lambda x: evaluate_encoder(config, _runtime(1), index, directory, x, 6, Console(quiet=True)),
        lambda x: probes.probe(config, _runtime(1), index, x),
    ):

        def made(evaluate: Callable[[Encoder], object] = evaluate) -> Callable[[], object]:
            encoder = _encoder()
            return lambda: evaluate(encoder)

        found.append(asked(1, made))
    return found[0], found[1]


def _encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder("cifar_resnet8", "released", WIDTH).to(CUDA).eval()


def _runtime(world: int) -> Runtime:
    return Runtime(None, 0, world, CUDA, "no", "ddp" if world > 1 else "single", "exact")  # type: ignore[arg-type]


def _block(number: int) -> MicroBatch:
    ids = torch.arange(number * BLOCK, (number + 1) * BLOCK)
    images = torch.randint(0, 256, (BLOCK, 3, 16, 16), dtype=torch.uint8)
    return MicroBatch([str(int(i)) for i in ids], ids, images, ids % CLASSES)


def _made_up(samples: int, seed: int) -> OwnFeatures:
    """Classes that overlap."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(CLASSES, size=samples)
    backbone = labels[:, None] * np.linspace(0, 1, WIDTH) + draw.normal(size=(samples, WIDTH))
    arrays = np.arange(samples), labels, backbone.astype(np.float32), backbone[:, :8].astype(np.float32)
    return OwnFeatures(*(torch.from_numpy(x).to(CUDA) for x in arrays))
