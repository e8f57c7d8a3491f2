"""Parts of a step: views and encoder, which embed micro-batches (lanes), and a strategy, which does the rest.

The objective couples every sample of the global batch, so a step (`training.loop`) has two passes over the
micro-batches of this rank (GradCache, Gao et al. 2021): embed them all; form the loss and its gradient with respect to
embeddings; push each micro-batch's embedding gradient into the parameters. With `recompute` the first pass keeps no
activations and the second embeds again, so memory holds the activations of one micro-batch only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rkdo_dist.batch_norm import BatchStatistics
from rkdo_dist.data.order import hash64
from rkdo_dist.data.stream import MicroBatch
from rkdo_dist.exchange.transfer import upload
from rkdo_dist.ranks.runtime import Runtime
from rkdo_dist.training.average import WeightAverage
from rkdo_dist.training.averaged import Averaged
from rkdo_dist.training.exact import Exact
from rkdo_dist.training.persistent import Pair, PersistentField
from rkdo_dist.training.relation import RelationalField
from rkdo_dist.training.strategy import Position, StepSettings, Strategy

TEACHER = 2  # the number of the view that a teacher sees; those of the student are 0 and 1
_STREAM_ENCODER = 17  # keeps these draws apart from those of `data.order` and `data.views`
# images (m, 3, H, W) uint8 on the device, ids (m,) on the CPU, epoch, view -> (m, 3, S, S) float32
MakeView = Callable[[Tensor, Tensor, int, int], Tensor]


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Embeddings (m, d) of a lane's two views, and its batch statistics, one row per forward.

    Attributes:
        key: where a teacher's key is in the place of `v`.
    """

    u: Tensor
    v: Tensor
    statistics: Tensor
    key: Tensor | None = None

    def pair(self) -> Pair:
        """Both views, with their graph."""
        return self.u, self.v

    def detached(self) -> Embedded:
        """The same without graph."""
        return Embedded(self.u.detach(), self.v.detach(), self.statistics, self.key)


class Step:
    """The parts that `training.loop.train_step` uses.

    Args:
        encoder: images to unit-norm embeddings; the same weights on every rank.
        make_view: draws a view of a micro-batch; a pure function, so that it can be called again.
        runtime: ranks, device, precision.
        settings: how to compute.
        optimizer: moves the weights; None leaves the gradient in the parameters' `.grad`.
        persistent: the rows of a persistent field, for objectives of that kind.
        average: moves after the weights have.
        relational: what a recursion with restart keeps, for objectives of that kind.
        compiled: embeds training lanes in the encoder's place (`training.compiled`); None: the encoder does.

    Attributes:
        strategy: how gradients are summed, and who owns weights and optimizer state.
        statistics: batch norm's running statistics, which move once a step.
        average: of the weights, if there is one; its `model` embeds images with the averaged weights.
    """

    def __init__(
        self,
        encoder: nn.Module,
        make_view: MakeView,
        runtime: Runtime,
        settings: StepSettings,
        optimizer: torch.optim.Optimizer | None = None,
        persistent: PersistentField | None = None,
        average: WeightAverage | None = None,
        relational: RelationalField | None = None,
        compiled: nn.Module | None = None,
    ) -> None:
        self.make_view, self.runtime, self._settings = make_view, runtime, settings
        self.statistics = BatchStatistics(encoder)
        kind = _strategy(runtime, settings)
        self.strategy = kind(encoder, optimizer, runtime, settings, persistent, relational, compiled)
        self.average, self._encoder = average, encoder
        self._teachers = {"student": (encoder, self.statistics)}
        if average is not None:
            self._teachers["ema"] = average.model, BatchStatistics(average.model)
        self._counts: dict[torch.Size, list[int]] | None = None if compiled is None else {}

    def uploaded(self, lanes: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Lanes with their images on the device, for all passes of a step."""

        def there(lane: MicroBatch) -> MicroBatch:
            images = upload(lane.images, self.runtime.device)
            return dataclasses.replace(lane, images=images, second=None if lane.second is None else there(lane.second))

        return [there(lane) for lane in lanes]

    def embed(self, lanes: Sequence[MicroBatch], at: Position, keys: Sequence[Tensor] | None = None) -> list[Embedded]:
        """The first pass: both views of every lane, with their graph unless it would only be computed again.

        Args:
            keys: take the place of the second view's embeddings, which are then not computed.
        """
        again, found = self._settings.recompute, []
        # A graph that is compiled without gradient would round otherwise than the one of the second pass.
        with torch.set_grad_enabled(not again or self._counts is not None):
            for number, lane in enumerate(lanes):
                embedded = self._embed(lane, number, at, None if keys is None else keys[number])
                found.append(embedded.detached() if again else embedded)
        return found

    def keys(self, lanes: Sequence[MicroBatch], at: Position, teacher: str) -> list[Tensor]:
        """A teacher's embeddings (m, d) of its view of every lane, without graph.

        It is in evaluation mode, except that batch norms normalise a lane by its own statistics, as the encoder's do:
        running statistics are behind those of a network that is being trained, and keys of another scale than rows.

        Args:
            teacher: "student", or "ema" (with an average).
        """
        model, statistics = self._teachers[teacher]
        found = []
        with torch.no_grad(), self.runtime.autocast(), statistics.evaluating():
            for lane in lanes:
                view = self.make_view(lane.images, lane.ids, at.epoch, TEACHER)
                found.append(model(view.contiguous(memory_format=torch.channels_last)))
        return found

    def embed_again(self, lanes: Sequence[MicroBatch], embedded: list[Embedded], at: Position) -> Iterator[Pair]:
        """The second pass: every lane's embeddings with their graph, kept from the first or computed when asked for."""
        for number, lane in enumerate(lanes):
            kept = embedded[number]
            embedded[number] = kept.detached()  # so that a lane's graph lives no longer than its backward pass
            if self._settings.recompute:
                kept = self._embed(lane, number, at, kept.key, again=True)
            yield kept.pair()

    def _embed(self, lane: MicroBatch, number: int, at: Position, key: Tensor | None, again: bool = False) -> Embedded:
        """Embed both views of a lane, or the first, where there is a key for the second.

        Randomness inside the encoder (dropout) is keyed by the lane, so doing it `again` repeats the first time,
        except that batch norm's running statistics are left alone.
        """
        device, model = self.runtime.device, self.strategy.model
        images = [x.images for x in ([lane] if lane.second is None else [lane, lane.second])]
        # Draws of the second view are the row's own, whichever sample it shows.
        inputs = [
            self.make_view(images[view % len(images)], lane.ids, at.epoch, view)
            for view in ((0, 1) if key is None else (0,))
        ]
        inputs = [torch.cat(inputs)] if self._settings.views_together else inputs
        # Convolutions are faster so: 7 % of a ResNet-18's step on CPUs. Values are the same but for rounding.
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        outputs, statistics = [], []
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.runtime.autocast():
            lane_key = hash64(_STREAM_ENCODER, self._settings.seed, at.epoch, at.step, at.first_lane + number)
            counts = [None if again else self._counted(x) for x in inputs]
            torch.manual_seed(lane_key >> 1)
            for x, known in zip(inputs, counts, strict=True):
                with self.statistics.discarding() if again else self.statistics.collecting(known):
                    outputs.append(model(x))
                statistics.append(x.new_zeros(0) if again else self.statistics.take())
        if key is not None:
            return Embedded(outputs[0], key, torch.stack(statistics), key)
        u, v = outputs[0].chunk(2) if self._settings.views_together else outputs
        return Embedded(u, v, torch.stack(statistics))

    def _counted(self, images: Tensor) -> list[int] | None:
        """What a compiled pass does not count of batch norm's statistics, by one pass of the encoder for each shape."""
        if self._counts is None:
            return None
        if images.shape not in self._counts:
            with torch.no_grad(), self.statistics.collecting():
                self._encoder(images)
            self.statistics.take()
            self._counts[images.shape] = self.statistics.counts
        return self._counts[images.shape]


def _strategy(runtime: Runtime, settings: StepSettings) -> type[Strategy]:
    if runtime.zero_stage:
        from rkdo_dist.training.zero import Zero  # imports DeepSpeed

        return Zero
    return Exact if settings.reduction == "exact" else Averaged
