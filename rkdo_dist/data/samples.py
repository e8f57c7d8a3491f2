"""Samples of verified shards: fetched by position, decoded, replaced if asked for, packed for transport.

A cursor keeps one shard open and reads windows (see `order`) through it; a lookup reads any sample by its id.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rkdo_dist.data.errors import Unreachable
from rkdo_dist.data.images import parse_label
from rkdo_dist.data.index import DataError, OpenSamples, ShardIndex, Split
from rkdo_dist.data.order import Window, substitutes
from rkdo_dist.data.shards import keep_tables, open_shard

FIRST = 64  # samples of a split that are read before the first step
OPEN_SHARDS = 64  # that a lookup holds open: file descriptors are few


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one lane at one step.

    Attributes:
        keys: sample keys, m of them.
        ids: int64 (m,): positions in the split.
        images: uint8 (m, 3, H, W).
        labels: int64 (m,): class numbers; -1 where there is none.
        skipped: how many of them replace a sample that could not be read.
        second: the samples whose views are the second ones, in the same order (`partners`); None: the same samples.
    """

    keys: list[str]
    ids: Tensor
    images: Tensor
    labels: Tensor
    skipped: int = 0
    second: MicroBatch | None = None


@dataclass(frozen=True)
class Reading:
    """How samples are read.

    Attributes:
        index, split: where they are.
        size: side of the images delivered (others are resized and cut, see `images.decode`); None: as they
            are, and all must agree.
        on_corrupt: "abort", or "skip" to put other samples in place of those that cannot be read.
    """

    index: ShardIndex
    split: Split
    size: int | None = None
    on_corrupt: str = "abort"

    def __post_init__(self) -> None:
        if self.on_corrupt not in ("abort", "skip"):
            raise ValueError(f"on_corrupt must be 'abort' or 'skip', got {self.on_corrupt!r}")


@dataclass(frozen=True)
class Sample:
    """A decoded sample: image uint8 (3, H, W), label -1 for none; `replaced` if it stands in for an
    unreadable one."""

    key: str
    id: int
    image: np.ndarray
    label: int
    replaced: bool = False


class Cursor:
    """Reads windows one after another through at most one open shard."""

    def __init__(self, reading: Reading, seed: int = 0, epoch: int = 0) -> None:
        self._reading = reading
        self._draw = (seed, epoch)
        self._shard: int | None = None
        self._open: OpenSamples | None = None
        self._substitute: tuple[int, OpenSamples] | None = None
        self._order: tuple[Window, np.ndarray] | None = None  # of the last window, which is read in several calls
        self._bases = np.concatenate([[0], np.cumsum(reading.split.counts)])

    def samples(self, windows: Iterator[Window] | Sequence[Window]) -> Iterator[Sample]:
        """The samples of `windows` in order; the open shard stays open for the next call."""
        for window in windows:
            opened = self._shard_of(window)
            if opened is not None:
                opened.check_unchanged()
            for position in self._positions(window):
                yield self._one(opened, window.shard, int(position))

    def close(self) -> None:
        """Close the open shard."""
        for opened in (self._open, self._substitute[1] if self._substitute else None):
            if opened is not None:
                opened.close()
        self._open, self._substitute, self._shard = None, None, None

    def _positions(self, window: Window) -> np.ndarray:
        whole = replace(window, skip=0)
        if self._order is None or self._order[0] != whole:
            self._order = whole, whole.positions()
        return self._order[1][window.skip :]

    def _shard_of(self, window: Window) -> OpenSamples | None:
        """The window's shard, opened if it is not open; None if it is unusable and samples may be
        replaced."""
        if window.shard != self._shard:
            self.close()
            try:
                self._open = open_shard(self._reading.index, self._reading.split.shards[window.shard])
            except DataError as error:
                if not self._may_skip(error):
                    raise
            self._shard = window.shard
        return self._open

    def _one(self, opened: OpenSamples | None, shard: int, position: int) -> Sample:
        if opened is not None:
            try:
                return self._read(opened, shard, position)
            except DataError as error:
                if not self._may_skip(error):
                    raise
        return self._replacement(opened, shard, position)

    def _may_skip(self, error: DataError) -> bool:
        return may_skip(self._reading, error)

    def _read(self, opened: OpenSamples, shard: int, position: int) -> Sample:
        return read(self._reading, opened, position, int(self._bases[shard]) + position)

    def _replacement(self, opened: OpenSamples | None, shard: int, position: int) -> Sample:
        """Another sample for one that cannot be read: the next readable one of its shard, or, if the shard
        is unusable, of the first usable shard in an order drawn from its number. Every rank and worker
        chooses alike."""
        shards = self._reading.split.shards
        if opened is None:
            if self._substitute is None:
                self._substitute = self._find_substitute(shard)
            shard, opened = self._substitute
        count = shards[shard].samples
        for step in range(count):
            try:
                sample = self._read(opened, shard, (position + step) % count)
            except DataError as error:
                if not self._may_skip(error):
                    raise
                continue
            return Sample(sample.key, sample.id, sample.image, sample.label, replaced=True)
        raise DataError(f"{opened.name} has no readable sample to put in the place of a damaged one")

    def _find_substitute(self, broken: int) -> tuple[int, OpenSamples]:
        shards = self._reading.split.shards
        for other in substitutes(len(shards), broken, *self._draw):
            if shards[other].samples:
                try:
                    return other, open_shard(self._reading.index, shards[other])
                except DataError as error:
                    if not self._may_skip(error):
                        raise
        raise DataError(f"no shard of split {self._reading.split.name!r} in {self._reading.index.place} can be read")


class Lookup:
    """Reads any sample by its id, verified, through shards that stay open.

    The first use of a shard in a process hashes it whole, as a cursor does; its table is then kept.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._bases = np.concatenate([[0], np.cumsum(reading.split.counts)])
        self._open: OrderedDict[int, OpenSamples] = OrderedDict()
        keep_tables(reading.split.samples)

    def partner(self, of: Sample, id: int) -> Sample:
        """Sample `id`, whose view is the second one of `of`; `of` itself, if `id` is damaged and may be replaced.

        Raises:
            DataError: as `Reading.on_corrupt` says.
        """
        if id == of.id:
            return replace(of, replaced=False)  # counted once, as the first view
        shard = int(np.searchsorted(self._bases, id, side="right")) - 1
        try:
            return read(self._reading, self._opened(shard), id - int(self._bases[shard]), id)
        except DataError as error:
            if not may_skip(self._reading, error):
                raise
            return replace(of, replaced=True)

    def close(self) -> None:
        """Close all shards."""
        for opened in self._open.values():
            opened.close()
        self._open.clear()

    def _opened(self, shard: int) -> OpenSamples:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = open_shard(self._reading.index, self._reading.split.shards[shard])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open[shard].check_unchanged()
        return self._open[shard]


def read(reading: Reading, opened: OpenSamples, position: int, id: int) -> Sample:
    """The sample at a position of open samples, decoded; `id` is its number in the split.

    Raises:
        DataError: if it cannot be trusted or decoded.
    """
    where = opened.where(position)
    image = opened.pixels(position, reading.size)
    promised = reading.index.image_size if reading.size is None else None
    if promised is not None and image.shape[1:] != promised:
        (height, width), (tall, wide) = promised, image.shape[1:]
        raise DataError(
            f"{where} has {wide} x {tall} pixels, but {reading.index.place} says {width} x {height}: index or prepare "
            "the data again, or set data.image_size"
        )
    text = opened.label(position)
    label = -1 if text is None else parse_label(text, len(reading.index.classes), where)
    return Sample(opened.keys[position], id, image, label)


def check_first(reading: Reading) -> None:
    """Read the first samples of a split as a run would; shards that lie elsewhere are not fetched for this.

    Raises:
        DataError: for samples that do not fit the index or cannot be read, unless they may be replaced.
    """
    if reading.index.address is not None:
        return
    first = next(shard for shard in reading.split.shards if shard.samples)
    try:
        opened = open_shard(reading.index, first)
    except DataError as error:
        if not may_skip(reading, error):
            raise
        return
    try:
        for k in range(min(FIRST, first.samples)):
            try:
                read(reading, opened, k, k)
            except DataError as error:
                if not may_skip(reading, error):
                    raise
    finally:
        opened.close()


def may_skip(reading: Reading, error: DataError) -> bool:
    """Whether something else may take the place of a sample that gave `error`."""
    return reading.on_corrupt == "skip" and not isinstance(error, Unreachable)


@dataclass
class Packed:
    """Samples in transport between processes: two tensors, however many lanes."""

    keys: list[str]
    images: Tensor  # uint8 (n, 3, H, W)
    numbers: Tensor  # int64 (3, n): ids, labels, 1 where the sample replaces another

    def pin_memory(self) -> Packed:
        """Called by the loader when it pins: one page-locked buffer, as the numbers stay on the host."""
        return Packed(self.keys, self.images.pin_memory(), self.numbers)

    def split(self, parts: int, paired: bool = False) -> Iterator[MicroBatch]:
        """Equal parts in order, without copying; `paired`: the second half of each are the other half's `second`."""
        size = len(self.keys) // parts
        for k in range(0, len(self.keys), size):
            if paired:
                middle, stop = k + size // 2, k + size
                yield replace(self._part(k, middle), second=self._part(middle, stop))
            else:
                yield self._part(k, k + size)

    def _part(self, start: int, stop: int) -> MicroBatch:
        ids, labels, replaced = self.numbers[:, start:stop]
        return MicroBatch(self.keys[start:stop], ids, self.images[start:stop], labels, int(replaced.sum()))


def pack(samples: list[Sample]) -> Packed:
    """Samples of one size as tensors that travel cheaply between processes.

    Raises:
        DataError: if their images differ in size.
    """
    shapes = sorted({sample.image.shape[1:] for sample in samples})
    if len(shapes) > 1:
        first, second = shapes[:2]
        raise DataError(
            f"images of different sizes in one batch ({first[1]} x {first[0]} and {second[1]} x {second[0]}): "
            "set data.image_size, to which all are then resized"
        )
    return Packed(
        [sample.key for sample in samples],
        torch.from_numpy(np.stack([sample.image for sample in samples])),
        torch.tensor([[getattr(s, name) for s in samples] for name in ("id", "label", "replaced")], dtype=torch.int64),
    )
