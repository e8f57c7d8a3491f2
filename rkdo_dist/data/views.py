"""Random views of images, batched on their device, each sample with draws of its own.

The draws for a sample are a pure function of (seed, epoch, sample id, view), made on the CPU with integer
arithmetic that is the same everywhere. So a view does not depend on the rank, the worker, the other
samples of the batch or a restart. What is done to the pixels is what torchvision's v2 transforms do, with
the same distributions: random resized crop (antialiased bilinear), horizontal flip, colour jitter in
random order, grayscale, Gaussian blur, solarization, normalisation. torchvision and others draw once
for a whole batch or handle sample after sample; here every operation handles the batch at once, with
different parameters for each sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rkdo_dist.data.order import GOLDEN, finalised, hash64
from rkdo_dist.data.pixels import (
    HUE,
    Draws,
    Numbers,
    color_jitter,
    crop_lines,
    gaussian_blur,
    grayscale,
    resampled,
    resized_crop,
    solarize,
)

_STREAM_VIEWS = 16  # keeps these draws apart from those of `order`
_TRIES = 10
_RATIO = (3 / 4, 4 / 3)
_DRAWS = 2 * _TRIES + 16
_SIGMAS = (0.1, 2.0)  # of the blur, in pixels (SimCLR, appendix A)
_CACHED = 1 << 15  # pixels of views worked on at a time on a CPU


def uniforms(ids: np.ndarray, seed: int, epoch: int, view: int, count: int) -> np.ndarray:
    """Independent uniform numbers in [0, 1) for each sample: float64 (m, count), multiples of 2**-53.

    Two rounds of SplitMix64's finaliser over a counter: the first makes a key of (seed, epoch, view, id),
    the second makes the numbers of that key.
    """
    golden, epoch_key = np.uint64(GOLDEN), np.uint64(hash64(_STREAM_VIEWS, seed, epoch, view))
    key = finalised((epoch_key ^ finalised(ids.astype(np.uint64) + golden)) + golden)
    steps = np.arange(2, count + 2, dtype=np.uint64) * golden
    return (finalised(key[:, None] + steps) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class Views:
    """Makes views.

    Args:
        size: side of the square that comes out.
        crop_scale: smallest and largest share of the image's area in a crop; its shape is within 3:4 and 4:3.
        flip, jitter_probability, grayscale: probabilities.
        jitter: (brightness, contrast, saturation, hue): factors are drawn from 1 +- the value (not below
            0), hue shifts from +- the value (at most 0.5, a full turn is 1).
        blur: probability of a Gaussian blur, or one for each view; its standard deviation is uniform in [0.1, 2]
            pixels, its kernel about a tenth of the side (SimCLR, appendix A).
        solarize: probability that pixels of 128 and more are inverted, or one for each view (BYOL, appendix B).
        mean, std: of the normalisation, after pixels are brought to [0, 1]; numbers, or one for each channel.

    Raises:
        ValueError: for a value out of its range.
    """

    size: int
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    grayscale: float = 0.2
    blur: float | tuple[float, ...] = 0.0
    solarize: float | tuple[float, ...] = 0.0
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        for name, count, what in (
            ("mean", 3, "channel"),
            ("std", 3, "channel"),
            ("blur", 2, "view"),
            ("solarize", 2, "view"),
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != count:
                raise ValueError(f"{name} must be one number or {count}, one for each {what}, got {list(value)}")
        if not all(0 < value < math.inf for value in _listed(self.std)):
            raise ValueError(f"std must be above 0, got {self.std}")
        if not all(math.isfinite(value) for value in _listed(self.mean)):
            raise ValueError(f"mean must be a finite number, got {self.mean}")
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must satisfy 0 < low <= high <= 1, got {self.crop_scale}")
        if any(not 0 <= value < math.inf for value in self.jitter) or self.jitter[3] > 0.5:
            raise ValueError(f"jitter must not be negative, and hue at most 0.5, got {self.jitter}")
        for name in ("flip", "jitter_probability", "grayscale", "blur", "solarize"):
            if not all(0 <= value <= 1 for value in _listed(getattr(self, name))):
                raise ValueError(f"{name} must be a probability, got {getattr(self, name)}")

    def __call__(self, images: Tensor, ids: Tensor, seed: int, epoch: int, view: int) -> Tensor:
        """One view of each image.

        Args:
            images: uint8 (m, 3, H, W), on any device.
            ids: int64 (m,), best on the CPU (the draws are made there).
            seed, epoch, view: integers; different views of a sample have different numbers.

        Returns:
            float32 (m, 3, size, size) on the device of `images`.

        Raises:
            ValueError: for other shapes or dtypes.
        """
        _check(images, ids)
        draws = self.draw(ids.cpu().numpy(), seed, epoch, view, images.shape[-2], images.shape[-1])
        return self.apply(images, draws)

    def draw(self, ids: np.ndarray, seed: int, epoch: int, view: int, height: int, width: int) -> Draws:
        """The draws for a view of images of `height` x `width` pixels; `ids` is int64 (m,)."""
        u = uniforms(ids, seed, epoch, view, _DRAWS)
        areas, ratios, rest = u[:, :_TRIES], u[:, _TRIES : 2 * _TRIES], u[:, 2 * _TRIES :]
        spread = np.array(self.jitter)
        low = np.maximum(0.0, 1.0 - spread)
        low[HUE] = -spread[HUE]
        high = 1.0 + spread
        high[HUE] = spread[HUE]
        return Draws(
            boxes=_boxes(areas, ratios, rest[:, 0], rest[:, 1], self.crop_scale, height, width),
            flip=rest[:, 2] < self.flip,
            jitter=rest[:, 3] < self.jitter_probability,
            factors=low + (high - low) * rest[:, 4:8],
            order=np.argsort(rest[:, 8:12], axis=1),
            grayscale=rest[:, 12] < self.grayscale,
            blur=rest[:, 13] < _listed(self.blur)[view % len(_listed(self.blur))],
            sigmas=_SIGMAS[0] + (_SIGMAS[1] - _SIGMAS[0]) * rest[:, 14],
            solarize=rest[:, 15] < _listed(self.solarize)[view % len(_listed(self.solarize))],
        )

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """The views of uint8 (m, 3, H, W) images that `draws` describes: float32 (m, 3, size, size)."""
        numbers = Numbers.of(draws, hue=self.jitter[HUE] > 0).to(images.device)
        lines, weights = crop_lines(numbers, self.size)
        if images.device.type != "cpu":
            return self._changed(resampled(images, lines, weights), numbers)
        # Some sixty passes over the pixels: in pieces that stay in a core's cache they cost a fraction.
        piece = max(1, _CACHED // self.size**2)
        out = torch.empty((len(images), 3, self.size, self.size))
        places, order = out.unbind(0), numbers.alike()
        for some in np.split(order, range(piece, len(order), piece)):
            rows = torch.from_numpy(some)
            pixels = resampled(*(x.index_select(d, rows) for x, d in ((images, 0), (lines, 1), (weights, 1))))
            for row, view in zip(some.tolist(), self._changed(pixels, numbers.some(some)).unbind(0), strict=True):
                places[row].copy_(view)
        return out

    def _changed(self, pixels: Tensor, numbers: Numbers) -> Tensor:
        for change in (color_jitter, grayscale, gaussian_blur, solarize):
            pixels = change(pixels, numbers)
        return self._normalised(pixels)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """In place."""
        if not isinstance(self.mean, tuple) and not isinstance(self.std, tuple):
            return pixels.sub_(self.mean).div_(self.std)
        for channel, (mean, std) in enumerate(zip(_channels(self.mean), _channels(self.std), strict=True)):
            pixels[:, channel].sub_(mean).div_(std)  # numbers, as a tensor would be another transfer
        return pixels

    def weak(self) -> Views:
        """Those with the same crops and flips and no change of colour."""
        return replace(self, jitter=(0, 0, 0, 0), grayscale=0, blur=0, solarize=0)

    def plain(self, images: Tensor) -> Tensor:
        """Without randomness: the central square resized to `size`, normalised; float32 (m, 3, size, size).

        Raises:
            ValueError: unless images are uint8 (m, 3, H, W).
        """
        _check(images, None)
        count, _, height, width = images.shape
        side = min(height, width)
        box = np.array([(height - side) // 2, (width - side) // 2, side, side])
        if side == self.size:
            pixels = images[:, :, box[0] : box[0] + side, box[1] : box[1] + side].float().div_(255)
        else:
            pixels = resized_crop(images, Numbers.of_boxes(np.tile(box, (count, 1))).to(images.device), self.size)
        return self._normalised(pixels)


def _listed(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _channels(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * 3


def _check(images: Tensor, ids: Tensor | None) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 (m, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if ids is not None and (ids.shape != images.shape[:1] or ids.dtype != torch.int64):
        raise ValueError(f"ids must be int64 ({len(images)},), got {ids.dtype} {tuple(ids.shape)}")


def _boxes(
    areas: np.ndarray,
    ratios: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    scale: tuple[float, float],
    height: int,
    width: int,
) -> np.ndarray:
    """Crops as in torchvision's RandomResizedCrop: the first of ten tries that fits, else the largest
    central one."""
    area = height * width * (scale[0] + (scale[1] - scale[0]) * areas)
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    ratio = np.exp(low + (high - low) * ratios)
    widths = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    heights = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.argmax(axis=1)[:, None]
    found = fits.any(axis=1)
    h = np.where(found, np.take_along_axis(heights, first, 1)[:, 0], _central(height, width, 1 / _RATIO[0]))
    w = np.where(found, np.take_along_axis(widths, first, 1)[:, 0], _central(width, height, _RATIO[1]))
    top = np.where(found, (u * (height - h + 1)).astype(np.int64), (height - h) // 2)
    left = np.where(found, (v * (width - w + 1)).astype(np.int64), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1)


def _central(side: int, other: int, ratio: float) -> int:
    """A side of the central crop when no try fits: not longer than `ratio` times the other side."""
    return min(side, round(other * ratio))
