"""Image bytes to pixels: an allow-list of formats, caps against bombs, errors that name the image.

The header is read first (Pillow, no pixels) and refused when the format is not allowed or the picture is
too large; only then are pixels decoded (torchvision). Labels are short decimal numbers. Nothing else is
ever decoded.
"""

from __future__ import annotations

import io
import re
import struct
import warnings

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from rkdo_dist.data.index import DataError

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_BYTES = 64 << 20  # of one encoded image
MAX_PIXELS = 1 << 25  # of one image: 33.5 million, 96 MiB decoded
_LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")


def inspect(payload: bytes, where: str) -> tuple[str, int, int]:
    """The format (one of `FORMATS`), height and width in an image's header; no pixels are decoded.

    Args:
        payload: the encoded image.
        where: what to call it in errors.

    Raises:
        DataError: not an allowed image, or more than `MAX_BYTES` or `MAX_PIXELS`.
    """
    if len(payload) > MAX_BYTES:
        raise DataError(f"{where} has {len(payload)} bytes; the limit for one image is {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(payload), formats=list(FORMATS)) as image:
                kind, (width, height) = str(image.format), image.size
    except Image.DecompressionBombError:
        raise DataError(f"{where} claims more pixels than the limit of {MAX_PIXELS}") from None
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError) as error:
        raise DataError(f"{where} is not a readable {'/'.join(FORMATS)} image ({_brief(error)})") from None
    if height * width > MAX_PIXELS:
        raise DataError(f"{where} claims {width} x {height} pixels; the limit is {MAX_PIXELS}")
    if kind not in FORMATS:  # Pillow calls JPEG files with several frames MPO
        raise DataError(f"{where} is a {kind} file; allowed are {', '.join(FORMATS)}")
    return kind, height, width


def decode(payload: bytes, where: str) -> Tensor:
    """The pixels of an image: uint8 (3, H, W), RGB; grey images are repeated, transparency is dropped.

    Raises:
        DataError: as `inspect`, or if the pixels are damaged.
    """
    inspect(payload, where)
    try:
        buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        image = decode_image(buffer, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise DataError(f"{where} cannot be decoded ({_brief(error)})") from None
    if image.dtype == torch.uint16:  # 16-bit PNG
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image


def fit(image: Tensor, size: int) -> Tensor:
    """The central square of (3, H, W) uint8 after its shorter side is resized to `size` (bilinear,
    antialiased)."""
    if image.shape[-2:] == (size, size):
        return image
    return F.center_crop(F.resize(image, [size], antialias=True), [size, size])


def encode_png(pixels: Tensor) -> bytes:
    """Lossless PNG of uint8 (3, H, W); the bytes depend on the pixels and the versions of Pillow and zlib
    only."""
    out = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(out, "PNG")
    return out.getvalue()


def parse_label(payload: bytes, classes: int, where: str) -> int:
    """A class number from the text of a `.cls` member.

    Args:
        payload: decimal digits, white space around them allowed.
        classes: how many classes there are; 0 if unknown (any number is allowed then).

    Raises:
        DataError: not a number, or not one of the classes.
    """
    match = _LABEL.fullmatch(payload) if len(payload) <= 32 else None
    if match is None:
        raise DataError(f"{where} is not a class number: {payload[:32]!r}")
    label = int(match.group(1))
    if classes and label >= classes:
        raise DataError(f"{where} says class {label}, but the index has {classes} classes")
    return label


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "the data", text)[:160]
