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
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rkdo_dist.data.order import GOLDEN, finalised, hash64

_STREAM_VIEWS = 16  # keeps these draws apart from those of `order`
_TRIES = 10
_RATIO = (3 / 4, 4 / 3)
_DRAWS = 2 * _TRIES + 16
_SIGMAS = (0.1, 2.0)  # of the blur, in pixels (SimCLR, appendix A)
_SOLAR = 128 / 255  # pixels from here on are inverted (BYOL, appendix B)
_LUMA = (0.2989, 0.587, 0.114)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_CACHED = 1 << 19  # numbers worked on at a time on a CPU
_LARGE = 1 << 14  # output pixels from which sparse resizing sample by sample beats dense matrices on a CPU


@dataclass(frozen=True)
class Draws:
    """Random draws of one view of m images (NumPy arrays, int64, float64 and bool).

    Attributes:
        boxes: (m, 4) top, left, height, width of the crop, in pixels.
        flip, jitter, grayscale, blur, solarize: (m,) whether it is applied.
        sigmas: (m,) of the blur, in pixels.
        factors: (m, 4) of brightness, contrast, saturation and hue.
        order: (m, 4) the four jitter operations in the order of their application.
    """

    boxes: np.ndarray
    flip: np.ndarray
    jitter: np.ndarray
    factors: np.ndarray
    order: np.ndarray
    grayscale: np.ndarray
    blur: np.ndarray
    sigmas: np.ndarray
    solarize: np.ndarray

    def rows(self, some: slice) -> Draws:
        """The draws of some of the images."""
        return Draws(**{name: value[some] for name, value in vars(self).items()})


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
        low[_HUE] = -spread[_HUE]
        high = 1.0 + spread
        high[_HUE] = spread[_HUE]
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
        if images.device.type != "cpu":
            return self._apply(images, draws)
        # About fifty passes over the pixels: in pieces that stay in a core's cache they cost half as much.
        piece = max(1, _CACHED // (3 * self.size**2))
        out = torch.empty((len(images), 3, self.size, self.size))
        for k in range(0, len(images), piece):
            out[k : k + piece] = self._apply(images[k : k + piece], draws.rows(slice(k, k + piece)))
        return out

    def _apply(self, images: Tensor, draws: Draws) -> Tensor:
        pixels = resized_crop(images, draws.boxes, draws.flip, self.size)
        if any(self.jitter):
            color_jitter(pixels, draws, hue=self.jitter[_HUE] > 0)
        _on_rows(pixels, draws.grayscale, lambda some, _: _luma(some).expand_as(some))
        sigmas = torch.as_tensor(draws.sigmas, dtype=torch.float32).to(pixels.device, non_blocking=True)
        _on_rows(pixels, draws.blur, lambda some, rows: gaussian_blur(some, sigmas[rows]))
        _on_rows(pixels, draws.solarize, lambda some, _: torch.where(some >= _SOLAR, 1 - some, some))
        return self._normalised(pixels)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """In place."""
        mean, std = (
            torch.tensor(value, dtype=torch.float32, device=pixels.device)[:, None, None]
            if isinstance(value, tuple)
            else value
            for value in (self.mean, self.std)
        )
        return pixels.sub_(mean).div_(std)

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
            pixels = resized_crop(images, np.tile(box, (count, 1)), np.zeros(count, dtype=bool), self.size)
        return self._normalised(pixels)


def _listed(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


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


def resized_crop(images: Tensor, boxes: np.ndarray, flip: np.ndarray, size: int) -> Tensor:
    """Crop, flip and resize each image by itself: float32 (m, 3, size, size) in [0, 1].

    Bilinear with antialiasing, as torchvision's resized_crop of float images. Resizing is linear and
    separable, so it is two batched matrix products with a (size, W) and a (size, H) matrix of
    interpolation weights for each sample. Large images on a CPU are resized one by one, because the
    matrices are then mostly zeros.

    Args:
        images: uint8 (m, 3, H, W).
        boxes: int64 (m, 4): top, left, height, width inside the image.
        flip: bool (m,): mirrored after the crop.
    """
    count, _, height, width = images.shape
    if images.device.type == "cpu" and size * size >= _LARGE:
        return _resized_one_by_one(images, boxes, flip, size)
    placed = torch.as_tensor(boxes, dtype=torch.float32).to(images.device, non_blocking=True)
    mirrored = torch.as_tensor(flip).to(images.device, non_blocking=True)
    across = _weights(placed[:, 1], placed[:, 3], width, size)
    across = torch.where(mirrored[:, None, None], across.flip(1), across).div_(255)
    down = _weights(placed[:, 0], placed[:, 2], height, size)
    rows = torch.bmm(images.view(count, 3 * height, width).float(), across.transpose(1, 2))
    return torch.matmul(down[:, None], rows.view(count, 3, height, size)).clamp_(0, 1)


def _weights(begin: Tensor, length: Tensor, whole: int, size: int) -> Tensor:
    """Interpolation weights (m, size, whole) from the part [begin, begin + length) of a line to `size`
    points.

    A triangle as wide as the spacing of the points (at least one pixel), cut at the ends of the part, with
    sum 1.
    """
    scale = (length / size)[:, None, None]
    pixels = torch.arange(whole, device=begin.device, dtype=torch.float32)[None, None, :] - begin[:, None, None]
    centres = scale * (torch.arange(size, device=begin.device, dtype=torch.float32) + 0.5)[None, :, None]
    weights = (1 - (pixels + 0.5 - centres).abs_().div_(scale.clamp(min=1.0))).clamp_(min=0)
    weights.mul_((pixels >= 0) & (pixels < length[:, None, None]))
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _resized_one_by_one(images: Tensor, boxes: np.ndarray, flip: np.ndarray, size: int) -> Tensor:
    out = images.new_empty((len(images), 3, size, size), dtype=torch.float32)
    for k, (top, left, height, width) in enumerate(boxes.tolist()):
        part = images[k : k + 1, :, top : top + height, left : left + width].float()
        resized = functional.interpolate(part, (size, size), mode="bilinear", antialias=True)
        out[k] = resized[0].flip(-1) if flip[k] else resized[0]
    return out.div_(255).clamp_(0, 1)


def color_jitter(pixels: Tensor, draws: Draws, hue: bool = True) -> None:
    """Brightness, contrast, saturation and hue in each sample's own order, in place, where `draws.jitter`
    is set.

    Args:
        pixels: float32 (m, 3, H, W) in [0, 1].
        hue: False leaves hue as it is (a shift of 0 would still round).
    """
    factors = torch.as_tensor(draws.factors, dtype=torch.float32).to(pixels.device, non_blocking=True)
    for place in range(4):
        operation = draws.order[:, place]
        kinds = torch.as_tensor(operation).to(pixels.device, non_blocking=True)

        def blend(some: Tensor, rows: Tensor, kinds: Tensor = kinds) -> Tensor:
            kind = kinds[rows]
            return _blend(some, kind, factors[rows].gather(1, kind[:, None])[:, 0])

        _on_rows(pixels, draws.jitter & (operation != _HUE), blend)
        if hue:
            _on_rows(
                pixels,
                draws.jitter & (operation == _HUE),
                lambda some, rows: _turn_hue(some, factors[rows, _HUE]),
            )


def gaussian_blur(pixels: Tensor, sigmas: Tensor) -> Tensor:
    """Blur each image by itself, as torchvision's gaussian_blur: separable, reflected at the edges.

    Blurring is linear, so it is two batched products with a (size, size) matrix for each sample.

    Args:
        pixels: float32 (n, 3, size, size).
        sigmas: (n,) standard deviations in pixels, on the same device. The kernel has 2 (size // 20) + 1 taps, but not
            fewer than 3 where there are pixels for them.
    """
    size = pixels.shape[-1]
    radius = min(max(1, size // 20), size - 1)
    offsets = torch.arange(-radius, radius + 1, device=pixels.device)
    taps = (-0.5 * (offsets / sigmas[:, None]).square()).exp_()
    taps.div_(taps.sum(dim=1, keepdim=True))
    places = (torch.arange(size, device=pixels.device)[:, None] + offsets).abs_()
    places = (size - 1 - (size - 1 - places).abs()).expand(len(pixels), size, len(offsets))
    matrix = pixels.new_zeros(len(pixels), size, size)
    matrix.scatter_add_(2, places, taps[:, None].expand_as(places))
    return torch.matmul(torch.matmul(matrix[:, None], pixels), matrix[:, None].transpose(2, 3))


def _on_rows(pixels: Tensor, chosen: np.ndarray, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the chosen samples by change(their pixels, their row numbers)."""
    rows = torch.as_tensor(np.flatnonzero(chosen)).to(pixels.device, non_blocking=True)
    if len(rows):
        pixels.index_copy_(0, rows, change(pixels.index_select(0, rows), rows))


def _luma(pixels: Tensor) -> Tensor:
    """Grey values (n, 1, H, W), weighted as in torchvision (ITU-R 601)."""
    red, green, blue = pixels.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]


def _blend(pixels: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """factor * pixels + (1 - factor) * reference, in [0, 1], in place.

    The reference is black for brightness, the mean grey value for contrast, each pixel's grey value for
    saturation.
    """
    kind, factor = kind[:, None, None, None], factor[:, None, None, None]
    grey = _luma(pixels)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    share = 1 - factor
    reference = grey.mul_(share * (kind == _SATURATION)).add_(mean * share * (kind == _CONTRAST))
    return pixels.mul_(factor).add_(reference).clamp_(0, 1)


def _turn_hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Add `shift` (n,), a share of a full turn, to the hue of (n, 3, H, W), keeping value and saturation.

    Hue in sixths of a turn without cases: sort the channels, and let the base of the sixth follow from
    which of them were exchanged. Back again, a channel is the smallest one plus chroma times clamp(|h - 3|
    - 1), clamp(2 - |h - 2|) or clamp(2 - |h - 4|), each cut to [0, 1].
    """
    red, green, blue = pixels.unbind(1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    base = (green < blue).to(pixels.dtype).mul_(-6)
    exchanged = (red < high).to(pixels.dtype)
    middle = torch.minimum(red, high)
    smallest = torch.minimum(middle, low)
    chroma = torch.maximum(red, high).sub_(smallest)
    base.addcmul_(exchanged, base * -2 - 2)  # -2 - base where red is not the largest
    # Grey has no hue: 0 / tiny is 0 there.
    hue = middle.sub_(low).div_(chroma.clamp(min=torch.finfo(pixels.dtype).tiny)).add_(base).abs_()
    hue.add_(6 * shift[:, None, None])
    hue.sub_((hue / 6).floor_().mul_(6))
    out = torch.empty_like(pixels)
    torch.sub(hue, 3, out=out[:, 0]).abs_().sub_(1)
    torch.sub(hue, 2, out=out[:, 1]).abs_().neg_().add_(2)
    torch.sub(hue, 4, out=out[:, 2]).abs_().neg_().add_(2)
    return out.clamp_(0, 1).mul_(chroma[:, None]).add_(smallest[:, None]).clamp_(0, 1)
