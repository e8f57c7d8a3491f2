"""What a view does to the pixels of a batch, each image by its own numbers.

Values are those of torchvision's float kernels to 1e-5: resized crop (bilinear, antialiased), horizontal flip, colour
jitter in each image's own order, grayscale, Gaussian blur, solarization. The numbers of all images are one tensor, sent
to the device once. What an image is not to undergo has numbers that leave it as it is, bit for bit: factors 1 and 0,
and cuts to [0, 1], where every step has left it. So its result does not depend on the others of the batch, no shape
depends on the draws, and nothing waits for the device.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rkdo_dist.exchange.transfer import upload

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
SOLAR = 128 / 255  # pixels from here on are inverted (BYOL, appendix B)
_LUMA = (0.2989, 0.587, 0.114)  # of grey values, as in torchvision (ITU-R 601)
_WHITE = sum(_LUMA)
_TINY = float(np.finfo(np.float32).tiny)
_SLOTS = 6  # of linear changes of colour: three before the hue is turned, three after
_NAMES = {  # rows, and what they are for an image that is left as it is
    "begin": (2, 0), "length": (2, 0), "direction": (2, 1), "place": (1, -1), "factor": (_SLOTS, 1),
    "contrast": (_SLOTS, 0), "saturation": (_SLOTS, 0), "turned": (1, 0), "turn": (1, 1), "grayscale": (1, 0),
    "sigma": (1, 0), "solarize": (1, 0),
}  # fmt: skip
_ENDS = list(itertools.accumulate(rows for rows, _ in _NAMES.values()))
_ROWS = dict(zip(_NAMES, map(slice, [0, *_ENDS[:-1]], _ENDS), strict=True))
_NEUTRAL = np.concatenate([np.full((rows, 1), value, dtype=np.float32) for rows, value in _NAMES.values()])


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


class Numbers:
    """Numbers of m images, by name.

    Args:
        values: float32 (rows, m); `_ROWS` says which rows a name has, and what they are for an image that is left as it
            is.
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values, self._tensor = values, torch.from_numpy(values)
        self._used = (values != _NEUTRAL).any(axis=1).tolist()

    @staticmethod
    def of(draws: Draws, hue: bool = True) -> Numbers:
        """What the draws say.

        The changes of colour before an image's hue is turned have slots 0, 1 and 2 as far as they are used, those after
        it 3, 4 and 5.

        Args:
            hue: False leaves hue as it is (a turn by 0 would still round).
        """
        count = len(draws.boxes)
        values = np.repeat(_NEUTRAL, count, axis=1)
        every, place = np.arange(count), np.argmax(draws.order == HUE, axis=1)
        linear = draws.order[draws.order != HUE].reshape(count, 3)
        for k in range(3):
            slot, kind = np.where(k < place, k, 3 + k), linear[:, k]
            factor = np.where(draws.jitter, draws.factors[every, kind], 1.0)
            values[_ROWS["factor"]][slot, every] = factor
            values[_ROWS["contrast"]][slot, every] = _WHITE * (1 - factor) * (kind == CONTRAST)
            values[_ROWS["saturation"]][slot, every] = _WHITE * (1 - factor) * (kind == SATURATION)
        for name, value in {
            "begin": draws.boxes.T[:2],
            "length": draws.boxes.T[2:],
            "direction": [np.ones(count), np.where(draws.flip, -1, 1)],
            "place": np.where(draws.jitter, place, -1),
            "turned": draws.jitter & hue,
            "turn": 1 + draws.factors[:, HUE],
            "grayscale": draws.grayscale,
            "sigma": np.where(draws.blur, draws.sigmas, 0),
            "solarize": draws.solarize,
        }.items():
            values[_ROWS[name]] = value
        return Numbers(values)

    @staticmethod
    def of_boxes(boxes: np.ndarray) -> Numbers:
        """Crops as in `Draws`, and nothing else."""
        values = np.repeat(_NEUTRAL, len(boxes), axis=1)
        values[_ROWS["begin"]], values[_ROWS["length"]] = boxes.T[:2], boxes.T[2:]
        return Numbers(values)

    def some(self, images: np.ndarray) -> Numbers:
        """Those of some images."""
        return Numbers(self._values[:, images])

    def alike(self) -> np.ndarray:
        """The images in an order in which those that are treated alike are neighbours: int64 (m,)."""
        changes = np.concatenate([self.host("contrast") != 0, self.host("saturation") != 0])
        return np.lexsort([*changes[::-1], self.host("grayscale")[0], self.host("place")[0]])

    def to(self, device: torch.device) -> Numbers:
        """The same with tensors on a device, in one transfer that nobody waits for."""
        self._tensor = upload(self._tensor, device)
        return self

    def host(self, name: str) -> np.ndarray:
        """(rows, m) in host memory."""
        found: np.ndarray = self._values[_ROWS[name]]
        return found

    def used(self, name: str, row: int = 0) -> bool:
        """Whether it changes any image."""
        return bool(self._used[_ROWS[name].start + row])

    def every(self, name: str) -> Tensor:
        """(rows, m) on the device."""
        return self._tensor[_ROWS[name]]

    def each(self, name: str, row: int = 0, axes: int = 3) -> Tensor:
        """(m, 1, ...) on the device, with so many axes of length 1."""
        return self._tensor[_ROWS[name].start + row].view(-1, *[1] * axes)


def resized_crop(images: Tensor, numbers: Numbers, size: int) -> Tensor:
    """Crop, flip and resize each image by itself: float32 (m, 3, size, size) in [0, 1].

    Bilinear with antialiasing, as torchvision's resized_crop of float images.

    Args:
        images: uint8 (m, 3, H, W).
        numbers: boxes that lie inside the image, and flips after the crop.
    """
    return resampled(images, *crop_lines(numbers, size))


def crop_lines(numbers: Numbers, size: int) -> tuple[Tensor, Tensor]:
    """The lines of an image that make a line of the crop, and their weights: (2, m, size, taps), down and across.

    A triangle as wide as the spacing of the points (at least one pixel), cut at the ends of the part, with sum 1.
    """
    begin, length, direction = (numbers.every(name)[:, :, None, None] for name in ("begin", "length", "direction"))
    taps = max(2, math.ceil(2 * float(numbers.host("length").max()) / size))
    points = torch.arange(0.5 - size / 2, size / 2, dtype=torch.float32, device=begin.device)
    scale = length / size
    reach = scale.clamp(min=1)
    centres = (points[:, None] * direction).add_(size / 2).mul_(scale).sub_(0.5)
    lines = (centres - reach).floor_().add(torch.arange(1, taps + 1, device=begin.device))
    weights = (1 - (lines - centres).abs_().div_(reach)).clamp_(min=0)
    weights.mul_((lines >= 0) & (lines < length))
    weights.div_(weights.sum(dim=-1, keepdim=True))
    weights[0].div_(255)  # pixels are brought to [0, 1] on the way
    return torch.minimum(lines.clamp_(min=0), length - 1).add_(begin).long(), weights


def resampled(images: Tensor, lines: Tensor, weights: Tensor) -> Tensor:
    """Images of `crop_lines`: resizing is linear and separable."""
    rows = _sums_of_lines(images.float(), lines[0], weights[0])
    return _sums_of_lines(rows.transpose(2, 3), lines[1], weights[1]).transpose(2, 3).clamp_(0, 1)


def _sums_of_lines(pixels: Tensor, lines: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of lines of each channel: float32 (m, 3, size, W).

    Args:
        pixels: float32 (m, 3, H, W).
        lines, weights: (m, size, taps), of H.
    """
    (count, channels, height, width), (_, size, taps) = pixels.shape, lines.shape
    first = torch.arange(0, count * channels * height, height, device=pixels.device).view(count, channels, 1, 1)
    found, *_ = torch.embedding_bag(
        pixels.reshape(-1, width),
        (lines[:, None] + first).view(-1),
        torch.arange(0, count * channels * size * taps, taps, device=pixels.device),
        mode=0,  # sums
        per_sample_weights=weights[:, None].expand(-1, channels, -1, -1).reshape(-1),
    )
    return found.view(count, channels, size, width)


def color_jitter(pixels: Tensor, numbers: Numbers) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order; `pixels` is used up.

    Args:
        pixels: float32 (m, 3, H, W) in [0, 1].
    """
    for slot in range(_SLOTS):
        if slot == 3 and numbers.used("turned"):
            every = numbers.host("turned").all()
            turned = _turned(pixels, numbers.each("turn", axes=2), pixels if every else torch.empty_like(pixels))
            pixels = turned if every else _chosen(numbers.each("turned"), turned, pixels)
        _blend(pixels, numbers, slot)
    return pixels


def grayscale(pixels: Tensor, numbers: Numbers) -> Tensor:
    """Grey values in all channels, of the images chosen."""
    if not numbers.used("grayscale"):
        return pixels
    return _chosen(numbers.each("grayscale"), _luma(pixels).mul_(_WHITE), pixels)


def solarize(pixels: Tensor, numbers: Numbers) -> Tensor:
    """Bright pixels inverted, in the images chosen."""
    if not numbers.used("solarize"):
        return pixels
    inverted = (pixels >= SOLAR) & (numbers.each("solarize") > 0)
    return torch.where(inverted, 1 - pixels, pixels)


def gaussian_blur(pixels: Tensor, numbers: Numbers) -> Tensor:
    """Blur each image by itself, as torchvision's gaussian_blur: separable, reflected at the edges.

    Args:
        pixels: float32 (m, 3, size, size).
        numbers: standard deviations in pixels, 0 for none. The kernel has 2 (size // 20) + 1 taps, but not fewer than 3
            where there are pixels for them.
    """
    if not numbers.used("sigma"):
        return pixels
    size = pixels.shape[-1]
    radius = min(max(1, size // 20), size - 1)
    offsets = torch.arange(-radius, radius + 1, device=pixels.device)
    taps = (-0.5 * (offsets / numbers.each("sigma", axes=1).clamp(min=1e-3)).square()).exp_()
    taps.div_(taps.sum(dim=1, keepdim=True))
    places = (torch.arange(size, device=pixels.device)[:, None] + offsets).abs_()
    places = (size - 1 - (size - 1 - places).abs_()).expand(len(pixels), -1, -1)
    taps = taps[:, None].expand_as(places)
    rows = _sums_of_lines(pixels, places, taps)
    return _sums_of_lines(rows.transpose(2, 3), places, taps).transpose(2, 3)


def _chosen(which: Tensor, changed: Tensor, pixels: Tensor) -> Tensor:
    """`changed` for the images that have 1 in `which`, `pixels` for the others; in place, so that no sum changes order.

    Interpolation is exact at 0 and 1, and several times as fast as `where` on CPUs.
    """
    return pixels.lerp_(changed, which)


def _luma(pixels: Tensor) -> Tensor:
    """Grey values (m, 1, H, W) over `_WHITE`."""
    red, green, blue = pixels.unbind(1)
    return red.lerp(green, _LUMA[1] / (_LUMA[0] + _LUMA[1])).lerp_(blue, _LUMA[2] / _WHITE)[:, None]


def _blend(pixels: Tensor, numbers: Numbers, slot: int) -> None:
    """factor * pixels + (1 - factor) * reference, in [0, 1], in place.

    The reference is black for brightness, the mean grey value for contrast, each pixel's grey value for saturation.
    """
    factor, contrast, saturation = (
        numbers.each(name, slot) if numbers.used(name, slot) else None for name in ("factor", "contrast", "saturation")
    )
    if factor is None:
        return
    if contrast is None and saturation is None:
        pixels.mul_(factor).clamp_(0, 1)
        return
    reference = _luma(pixels)
    if contrast is not None:
        level = reference.mean(dim=(2, 3), keepdim=True).mul_(contrast)
        reference = level if saturation is None else torch.addcmul(level, reference, saturation)
    elif saturation is not None:
        reference.mul_(saturation)
    pixels.mul_(factor).add_(reference).clamp_(0, 1)


def _turned(pixels: Tensor, turn: Tensor, out: Tensor) -> Tensor:
    """Add `turn` - 1 (m, 1, 1), a share of a full turn, to the hue of (m, 3, H, W), keeping value and saturation.

    With h in turns from red and t = (red - (green + blue) / 2) / chroma, |h| = 1/4 - (t + t') / 6, where t' is what t
    has beyond +-1/2, and the sign is that of green - blue. Back again, a channel lies between the least and the largest
    value by the distance of h on the circle from 1/2 (red) or from its own hue (green, blue), cut to 1/6 and 1/3.
    Comparisons and `where` take five times as long on CPUs as what stands here. `out` may be the pixels
    themselves, which spares memory that is in no cache.
    """
    red, green, blue = pixels.unbind(1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    value, least = torch.maximum(red, high), torch.minimum(red, low)
    chroma = value - least
    # Grey has no hue: 0 / tiny is 0 there.
    t = torch.sub(red, torch.add(green, blue, out=high), alpha=0.5, out=low)
    t.div_(torch.clamp(chroma, min=_TINY, out=high))
    hue = torch.rsub(functional.softshrink(t, 0.5).add_(t), 0.25, alpha=1 / 6)
    hue = hue.copysign_(torch.sub(green, blue, out=low)).add_(turn).frac_()
    for channel, opposite in enumerate((1 / 2, 1 / 3, 2 / 3)):
        torch.sub(hue, opposite, out=out[:, channel])
    out.abs_().clamp_(1 / 6, 1 / 3)
    least.sub_(chroma)
    value.add_(chroma)
    chroma.mul_(6)
    torch.addcmul(least, chroma, out[:, 0], out=out[:, 0])
    torch.addcmul(value[:, None], chroma[:, None], out[:, 1:], value=-1, out=out[:, 1:])
    return out.clamp_(0, 1)
