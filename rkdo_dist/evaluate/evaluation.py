"""Evaluation of an encoder: frozen features from all ranks, scores on rank zero, one JSON file and one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rkdo_dist import parts
from rkdo_dist.config import Config
from rkdo_dist.console import progress_bar, say
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.own_order import first_samples
from rkdo_dist.data.shards import open_shard
from rkdo_dist.data.stream import MicroBatch, evaluation_stream
from rkdo_dist.encoders import Encoder
from rkdo_dist.evaluate import common_metrics as common
from rkdo_dist.evaluate import scores
from rkdo_dist.evaluate.features import Block, Embed, FrozenFeatures, gather_features
from rkdo_dist.exchange import group
from rkdo_dist.ranks import signals
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.rundir import COMMON_METRIC_TITLES, SCORE_TITLES, RunDirectory

_PEEKED = 64  # samples of a split whose labels are looked at before training
BLOCK = 256  # images embedded at a time
# Backbone features (n, f) float32 and labels (n,) int64, -1 for none, of the test split -> a number.
Metric = Callable[[NDArray[np.float32], NDArray[np.int64]], float]
_FIELDS = {
    *scores.without_scores("", ""),
    "subset_samples",
    "step",
    "yardsticks",
    "weights",
    "weights_are",
}  # of an evaluation
PAPER_BATCHES = 11  # of the test split, in the released code's evaluation


@dataclass(frozen=True)
class EvaluationPlan:
    """What can be evaluated on a set of samples.

    Attributes:
        test: the split whose images and held-out pairs are embedded; the train split where there is no other.
        train: the split that classifiers are fitted on; None if none are.
        unscored: why there are no scores that need labels; None if there are, as far as is known beforehand.
    """

    test: str
    train: str | None
    unscored: str | None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are embedded."""
        return (self.test,) if self.train is None else (self.train, self.test)

    @property
    def note(self) -> str | None:
        """Remark for the user before training; None if everything can be evaluated."""
        if self.unscored is None:
            return None
        return (
            f"evaluation without labels ({self.unscored}): InfoNCE, alignment, uniformity and effective rank on "
            f"held-out views of the {self.test} images, no accuracies"
        )


def plan_evaluation(config: Config, index: ShardIndex) -> EvaluationPlan:
    """Plan of the evaluations of a run, from its index and the first samples of its splits.

    Raises:
        DataError: for a split that was asked for by name and is not there.
    """
    asked = config.evaluate
    if asked.test_split not in index.splits and asked.test_split == type(asked)().test_split:
        index.split(asked.train_split)
        return EvaluationPlan(asked.train_split, None, f"there is no split {asked.test_split!r}")
    train = None if asked.protocol == "paper" else asked.train_split
    for split in (asked.test_split, *(() if train is None else (train,))):
        if not has_labels(index, split):
            return EvaluationPlan(asked.test_split, None, f"the split {split!r} has no labels")
    return EvaluationPlan(asked.test_split, train, None)


def has_labels(index: ShardIndex, split: str) -> bool:
    """Whether any of a split's first samples has a label; taken for granted where looking would fetch a shard."""
    first = next(shard for shard in index.split(split).shards if shard.samples)
    if index.address is not None:
        return True
    opened = open_shard(index, first)
    try:
        return any(opened.label(k) is not None for k in range(min(_PEEKED, first.samples)))
    finally:
        opened.close()


def evaluate_encoder(
    config: Config,
    runtime: Runtime,
    index: ShardIndex,
    run: RunDirectory,
    encoder: Encoder,
    step: int,
    console: Console | None,
    metrics: Mapping[str, Metric] | None = None,
) -> None:
    """Evaluate `encoder` by `evaluate.protocol` and write `evaluations/<step>.json` (collective).

    The block of `BLOCK` samples is the unit of arithmetic, so the result does not depend on the world
    size.

    Args:
        encoder: with the weights that `evaluate.weights` says.
        step: of the checkpoint that is evaluated, the file's name.
        console: for progress and the table, on rank zero.
        metrics: further scores by name, checked already; called on rank zero.

    Raises:
        ValueError: for a missing split, damaged shards or a metric that fails, on every rank.
        Stopped: on every rank, when one was asked to stop; nothing is written then.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        plan = group.together(lambda: plan_evaluation(config, index), "looking at the splits")
        if config.evaluate.protocol == "paper":
            count = PAPER_BATCHES * config.train.global_batch
            index = group.together(lambda: first_samples(index, plan.test, count), "looking up the split")
        found = {split: _features(config, runtime, index, encoder, split, console) for split in plan.splits}
        pairs = _pairs(config, runtime, index, encoder, plan.test, console)
    finally:
        encoder.train(was_training)

    def score() -> int:
        """On rank zero alone, where minutes may pass: a request to stop ends it."""
        try:
            with signals.current().at_once():
                _score(config, index, run, step, plan, found, pairs, console, metrics or {})
        except signals.Stopped as stopped:
            return stopped.code
        return 0

    if code := group.from_rank_zero(group.on_main(score, "scoring the features") or 0):
        raise signals.Stopped(code)


def _features(
    config: Config, runtime: Runtime, index: ShardIndex, encoder: Encoder, split: str, console: Console | None
) -> FrozenFeatures | None:
    """Backbone features and embeddings of a split's images as they are."""
    views = parts.make_views(config, index)

    def embed(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with runtime.autocast():
            return encoder.features(views.plain(images.to(runtime.device)))

    return _gathered(config, runtime, index, split, f"features of {split}", console, lambda blocks: blocks, embed)


@dataclass(frozen=True)
class _PairBlock:
    """A block whose `images` (m, 2, 3, S, S) float32 are the two held-out views of its samples."""

    ids: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor


def _pairs(
    config: Config, runtime: Runtime, index: ShardIndex, encoder: Encoder, split: str, console: Console | None
) -> FrozenFeatures | None:
    """Embeddings of the two held-out views of a split: the first in `backbone`, the second in `embeddings`."""
    views = parts.make_views(config, index)

    def drawn(blocks: Iterable[tuple[int, MicroBatch]]) -> Iterator[tuple[int, Block]]:
        for number, block in blocks:
            images = block.images.to(runtime.device)
            both = [views(images, block.ids, common.SEED, common.EPOCH, view) for view in (0, 1)]
            yield number, _PairBlock(block.ids, torch.stack(both, dim=1), block.labels)

    def embed(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with runtime.autocast():
            return encoder(images[:, 0]), encoder(images[:, 1])

    return _gathered(config, runtime, index, split, f"held-out pairs of {split}", console, drawn, embed)


def _gathered(
    config: Config,
    runtime: Runtime,
    index: ShardIndex,
    split: str,
    label: str,
    console: Console | None,
    prepare: Callable[[Iterable[tuple[int, MicroBatch]]], Iterable[tuple[int, Block]]],
    embed: Embed,
) -> FrozenFeatures | None:
    """What `embed` makes of a split (of the paper protocol's subset), on rank zero (collective)."""
    samples = group.together(lambda: index.split(split).samples, "looking up the split")
    limit = None
    if config.evaluate.protocol == "paper":
        limit = samples = min(samples, PAPER_BATCHES * config.train.global_batch)
    size = BLOCK
    blocks = evaluation_stream(
        index,
        split,
        size,
        rank=runtime.rank,
        world=runtime.world,
        limit=limit,
        size=config.data.image_size,
        workers=config.data.workers,
    )
    shown = _shown(blocks, label, -(-samples // size), runtime, console)
    return gather_features(prepare(shown), embed, samples, device=runtime.device)


def _shown(
    blocks: Iterator[tuple[int, MicroBatch]],
    label: str,
    total: int,
    runtime: Runtime,
    console: Console | None,
) -> Iterator[tuple[int, MicroBatch]]:
    """The blocks, with a progress bar on rank zero."""
    if console is None:
        yield from blocks
        return
    with progress_bar(console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=total, note="")
        for number, block in blocks:
            yield number, block
            bar.update(task, completed=min(total, number + runtime.world))


def _score(
    config: Config,
    index: ShardIndex,
    run: RunDirectory,
    step: int,
    plan: EvaluationPlan,
    found: dict[str, FrozenFeatures | None],
    pairs: FrozenFeatures | None,
    console: Console | None,
    metrics: Mapping[str, Metric],
) -> None:
    assert console is not None
    test = found[plan.test]
    train = None if plan.train is None else found[plan.train]
    assert test is not None
    protocol, subset = config.evaluate.protocol, PAPER_BATCHES * config.train.global_batch
    labels = test.labels[:subset] if protocol == "paper" else test.labels
    reason = plan.unscored or scores.unscorable(labels, None if train is None else train.labels)
    with console.status("scoring"):
        if reason is not None:
            result = scores.without_scores(protocol, reason)
        elif train is None:
            result = scores.paper_protocol(test, config.train.global_batch, PAPER_BATCHES)
        else:
            result = scores.full_protocol(train, test)
        result |= {name: _value(name, metric, test) for name, metric in metrics.items()}
        result["yardsticks"] = _common_metrics(config, index, run, step, test, pairs)
    path = run.write_evaluation(step, {"step": step, **result}, config.evaluate.weights)
    console.print(_table(step, result, list(metrics)))
    if reason is not None:
        say(console, f"no scores that need labels: {reason}")
    say(console, f"evaluation: {path}")


def _common_metrics(
    config: Config,
    index: ShardIndex,
    run: RunDirectory,
    step: int,
    test: FrozenFeatures,
    pairs: FrozenFeatures | None,
) -> dict[str, Any]:
    assert pairs is not None
    u, v = pairs.backbone, pairs.embeddings
    _, total = parts.run_length(config, index)
    objective = parts.make_objective(config, min(1.0, max(0, step - 1) / total))  # of the last step
    objective = parts.as_recorded(config, objective, next(islice(run.steps(), step - 1, None), {}))
    own = common.own_objective(objective, u, v, config.train.global_batch, pairs.labels)
    if not objective.affinity.unit_norm:
        u, v = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (u, v))
    return common.common_metrics(u, v, test.embeddings, test.backbone) | own


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Check that these can be further scores of an evaluation.

    Raises:
        ValueError: for a name that an evaluation has already, or something that is not a function.
    """
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"metrics: {name!r} cannot be the name of a score: use a word without a dot")
        if name in _FIELDS or name in COMMON_METRIC_TITLES:
            raise ValueError(f"metrics: {name} is a score of every evaluation: choose another name")
        if not callable(metric):
            raise ValueError(f"metrics: {name} is {type(metric).__name__}, not a function of features and labels")


def _value(name: str, metric: Metric, test: FrozenFeatures) -> float:
    """What a metric says of the test split."""
    try:
        value: Any = metric(test.backbone.copy(), test.labels.copy())
    except Exception as error:  # code of the user's
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"metric {name} failed: {reason}") from error
    try:
        number = float("nan") if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number):
        raise ValueError(f"metric {name} must return a finite number, got {str(value)[:60]!r} ({type(value).__name__})")
    return number


def _table(step: int, result: dict[str, Any], metrics: Sequence[str]) -> Table:
    table = Table(title=f"Step {step}, protocol {result['protocol']}")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, title in SCORE_TITLES.items():
        table.add_row(title, "-" if result[name] is None else f"{result[name]:.4f}")
    for name in metrics:
        table.add_row(Text(name), f"{result[name]:.4f}")
    table.add_section()
    for name, title in COMMON_METRIC_TITLES.items():
        value = result["yardsticks"][name]
        table.add_row(title, "-" if value is None else f"{value:.4f}")
    return table
