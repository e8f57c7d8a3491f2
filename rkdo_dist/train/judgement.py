"""Judge an encoder: frozen features from all ranks, scores on rank zero, one JSON file and one table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rkdo_dist.config import Config
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.stream import MicroBatch, evaluation_stream
from rkdo_dist.encoders import Encoder
from rkdo_dist.evaluate import scores
from rkdo_dist.evaluate.features import FrozenFeatures, gather_features
from rkdo_dist.exchange import group
from rkdo_dist.rundir import SCORE_TITLES, RunDirectory
from rkdo_dist.train import build
from rkdo_dist.train.journal import progress_bar
from rkdo_dist.train.runtime import Runtime

PAPER_BATCHES = 11  # of the test split, in the released code's evaluation


def evaluate_encoder(
    config: Config,
    runtime: Runtime,
    index: ShardIndex,
    run: RunDirectory,
    encoder: Encoder,
    step: int,
    console: Console | None,
) -> None:
    """Judge `encoder` by `evaluate.protocol` and write `evaluations/<step>.json` (collective).

    The block of `evaluate.batch_size` samples is the unit of arithmetic, so the result does not depend on the world
    size.

    Args:
        step: of the checkpoint that is judged, the file's name.
        console: for progress and the table, on rank zero.

    Raises:
        ValueError: for a missing split or damaged shards, on every rank.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        found = {split: _features(config, runtime, index, encoder, split, console) for split in _splits(config)}
    finally:
        encoder.train(was_training)
    group.together(
        lambda: _score(config, run, step, found, console) if runtime.is_main else None, "scoring the features"
    )


def _splits(config: Config) -> tuple[str, ...]:
    test = config.evaluate.test_split
    return (test,) if config.evaluate.protocol == "paper" else (config.evaluate.train_split, test)


def _features(
    config: Config, runtime: Runtime, index: ShardIndex, encoder: Encoder, split: str, console: Console | None
) -> FrozenFeatures | None:
    samples = group.together(lambda: index.split(split).samples, "looking up the split")
    limit = None
    if config.evaluate.protocol == "paper":
        limit = samples = min(samples, PAPER_BATCHES * config.train.global_batch)
    views = build.make_views(config, index)

    def embed(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with runtime.autocast():
            return encoder.features(views.plain(images.to(runtime.device)))

    size = config.evaluate.batch_size
    blocks = evaluation_stream(
        index,
        split,
        size,
        rank=runtime.rank,
        world=runtime.world,
        limit=limit,
        size=config.data.image_size,
    )
    return gather_features(
        _shown(blocks, split, -(-samples // size), runtime, console), embed, samples, device=runtime.device
    )


def _shown(
    blocks: Iterator[tuple[int, MicroBatch]],
    split: str,
    total: int,
    runtime: Runtime,
    console: Console | None,
) -> Iterator[tuple[int, MicroBatch]]:
    """The blocks, with a progress bar on rank zero."""
    if console is None:
        yield from blocks
        return
    with progress_bar(console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(f"features of {split}", total=total, note="")
        for number, block in blocks:
            yield number, block
            bar.update(task, completed=min(total, number + runtime.world))


def _score(
    config: Config,
    run: RunDirectory,
    step: int,
    found: dict[str, FrozenFeatures | None],
    console: Console | None,
) -> None:
    assert console is not None
    test, neighbours = found[config.evaluate.test_split], config.evaluate.neighbours
    assert test is not None
    with console.status("scoring"):
        if config.evaluate.protocol == "paper":
            result = scores.paper_protocol(test, config.train.global_batch, PAPER_BATCHES, neighbours)
        else:
            train = found[config.evaluate.train_split]
            assert train is not None
            result = scores.full_protocol(train, test, neighbours)
    path = run.write_evaluation(step, {"step": step, **result})
    console.print(_table(step, result))
    console.print(f"evaluation: {path}")


def _table(step: int, result: dict[str, Any]) -> Table:
    table = Table(title=f"Step {step}, protocol {result['protocol']}")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, title in SCORE_TITLES.items():
        table.add_row(title, f"{result[name]:.4f}")
    return table
