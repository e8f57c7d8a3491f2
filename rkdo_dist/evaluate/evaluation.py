"""Evaluation of an encoder: frozen features on all ranks, scores of them, one JSON file and one table."""

from __future__ import annotations

import contextlib
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
from rkdo_dist.console import counting, say
from rkdo_dist.data.index import ShardIndex
from rkdo_dist.data.order import chosen_blocks
from rkdo_dist.data.own_order import first_samples
from rkdo_dist.data.shards import open_shard
from rkdo_dist.data.stream import MicroBatch, evaluation_stream
from rkdo_dist.encoders import Encoder
from rkdo_dist.evaluate import common_metrics as common
from rkdo_dist.evaluate import scores
from rkdo_dist.evaluate.features import (
    Block,
    Embed,
    FrozenFeatures,
    OwnFeatures,
    at_rank_zero,
    class_counts,
    own_features,
    plain_features,
)
from rkdo_dist.evaluate.full_protocol import full_protocol
from rkdo_dist.exchange import group
from rkdo_dist.exchange.transfer import upload
from rkdo_dist.ranks import signals
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.rundir import COMMON_METRIC_TITLES, SCORE_TITLES, RunDirectory

_PEEKED = 64  # samples of a split whose labels are looked at before training
BLOCK = 256  # images embedded at a time, and the unit of `evaluate.linear`'s sums
SAMPLE = 40  # blocks of the test split at most, evenly spaced, that k-means and the common metrics see
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
        embedding = _Embedding(config, runtime, index, encoder, console)
        found = {split: embedding.features(split) for split in plan.splits}
        pairs = embedding.pairs(plan.test)
    finally:
        encoder.train(was_training)
    test = found[plan.test]
    counts = {split: class_counts(found[split].labels).cpu().numpy() for split in plan.splits}
    reason = plan.unscored or scores.unscorable(counts[plan.test], None if plan.train is None else counts[plan.train])
    classified = None
    if reason is None and plan.train is not None:
        with contextlib.nullcontext() if console is None else console.status("fitting and searching"):
            classified = full_protocol(found[plan.train], test)
    shown = embedding.sample_of(test, plan.test)
    whole = at_rank_zero(test, test.ids, embedding.samples(plan.test)) if metrics else None

    def score() -> int:
        """On rank zero alone, of a sample that does not grow with the data: a request to stop ends it."""
        try:
            with signals.current().at_once():
                assert shown is not None
                result = _scores(config, plan, classified, reason, shown)
                result |= {name: _value(name, metric, whole) for name, metric in (metrics or {}).items()}
                result["yardsticks"] = _common_metrics(config, index, run, step, shown, pairs)
                _report(config, run, step, result, console, list(metrics or {}))
        except signals.Stopped as stopped:
            return stopped.code
        return 0

    if code := group.from_rank_zero(group.on_main(score, "scoring the features") or 0):
        raise signals.Stopped(code)


@dataclass(frozen=True)
class _PairBlock:
    """A block whose `images` (m, 2, 3, S, S) float32 are the two held-out views of its samples."""

    ids: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class _Embedding:
    """Embeds the samples that a protocol evaluates: all of a split, or the paper protocol's subset."""

    config: Config
    runtime: Runtime
    index: ShardIndex
    encoder: Encoder
    console: Console | None

    def samples(self, split: str) -> int:
        """How many samples of a split are evaluated."""
        samples = self.index.split(split).samples
        return min(samples, PAPER_BATCHES * self.config.train.global_batch) if self._paper else samples

    def features(self, split: str) -> OwnFeatures:
        """Backbone features and embeddings of this rank's part of a split's images as they are (collective)."""
        embed = plain_features(self.encoder, parts.make_views(self.config, self.index).plain, self.runtime)
        return self._embedded(split, f"features of {split}", lambda blocks: blocks, embed)

    def pairs(self, split: str) -> FrozenFeatures | None:
        """Embeddings of the two held-out views of the sample of a split (`sample_of`), on rank zero: the first in
        `backbone`, the second in `embeddings` (collective)."""
        views = parts.make_views(self.config, self.index)

        def drawn(blocks: Iterable[tuple[int, MicroBatch]]) -> Iterator[tuple[int, Block]]:
            for number, block in blocks:
                images = upload(block.images, self.runtime.device)
                both = [views(images, block.ids, common.SEED, common.EPOCH, view) for view in (0, 1)]
                places = number * BLOCK + torch.arange(len(block.ids))
                yield number, _PairBlock(places, torch.stack(both, dim=1), block.labels)

        def embed(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with self.runtime.autocast():
                return self.encoder(images[:, 0]), self.encoder(images[:, 1])

        own = self._embedded(split, f"held-out pairs of {split}", drawn, embed, self._spread)
        return at_rank_zero(own, own.ids, self._size(split, self._spread))

    def sample_of(self, test: OwnFeatures, split: str) -> FrozenFeatures | None:
        """The sample of the test split that scores on rank zero see, in the order of the split (collective)."""
        blocks = -(-self.samples(split) // BLOCK)
        chosen = chosen_blocks(blocks, self._spread)
        place = torch.full((blocks,), -1, device=test.ids.device)
        place[list(chosen)] = torch.arange(len(chosen), device=place.device)
        place = place[test.ids // BLOCK]
        places = torch.where(place >= 0, place * BLOCK + test.ids % BLOCK, -1)
        return at_rank_zero(test, places, self._size(split, self._spread))

    @property
    def _paper(self) -> bool:
        return self.config.evaluate.protocol == "paper"

    @property
    def _spread(self) -> int | None:
        """How many blocks of the test split the sample has at most; None: any number, as the paper protocol's has."""
        return None if self._paper else SAMPLE

    def _size(self, split: str, spread: int | None) -> int:
        """Samples in `chosen_blocks`."""
        samples = self.samples(split)
        chosen = chosen_blocks(-(-samples // BLOCK), spread)
        return (len(chosen) - 1) * BLOCK + min(samples - chosen[-1] * BLOCK, BLOCK)

    def _embedded(
        self,
        split: str,
        label: str,
        prepare: Callable[[Iterable[tuple[int, MicroBatch]]], Iterable[tuple[int, Block]]],
        embed: Embed,
        spread: int | None = None,
    ) -> OwnFeatures:
        """What `embed` makes of this rank's part of a split, or of `spread` blocks of it (collective)."""
        samples = group.together(lambda: self.samples(split), "looking up the split")
        data, rt = self.config.data, self.runtime
        blocks = evaluation_stream(
            self.index,
            split,
            BLOCK,
            rank=rt.rank,
            world=rt.world,
            limit=samples,
            spread=spread,
            size=data.image_size,
            workers=data.workers,
        )
        count = self._size(split, spread)
        shown = self._shown(blocks, label, -(-count // BLOCK))
        return own_features(prepare(shown), embed, count, device=rt.device)

    def _shown(
        self, blocks: Iterator[tuple[int, MicroBatch]], label: str, total: int
    ) -> Iterator[tuple[int, MicroBatch]]:
        """The blocks, with a progress bar on rank zero."""
        with counting(self.console, label, transient=True) as progress:
            for number, block in blocks:
                yield number, block
                progress(min(total, number + self.runtime.world), total, "")


def _scores(
    config: Config,
    plan: EvaluationPlan,
    classified: dict[str, Any] | None,
    reason: str | None,
    shown: FrozenFeatures,
) -> dict[str, Any]:
    """The scores of a protocol: those of classifiers, found on all ranks, and those of the test images `shown`."""
    if reason is not None:
        return scores.without_scores(config.evaluate.protocol, reason)
    if classified is None:
        return scores.paper_protocol(shown, config.train.global_batch, PAPER_BATCHES)
    rows = shown.labels >= 0
    with scores.gathered_warnings() as said:
        found = scores.structure(shown.embeddings[rows], shown.labels[rows])
    return classified | found | {"warnings": classified["warnings"] + said}


def _report(
    config: Config, run: RunDirectory, step: int, result: dict[str, Any], console: Console | None, metrics: list[str]
) -> None:
    assert console is not None
    path = run.write_evaluation(step, {"step": step, **result}, config.evaluate.weights)
    console.print(_table(step, result, metrics))
    if result.get("unscored"):
        say(console, f"no scores that need labels: {result['unscored']}")
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


def _value(name: str, metric: Metric, test: FrozenFeatures | None) -> float:
    """What a metric says of the test split."""
    assert test is not None
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
