"""Image bytes to pixels: an allow-list of formats, caps against bombs, errors that name the image.

The header is read first and refused when the format is not allowed or the picture is too large; only then
are pixels decoded, by Pillow (torchvision's own decoders are deprecated since 0.29). Labels are short
decimal numbers. Nothing else is ever decoded. NumPy only, so that workers and `prepare` start quickly.
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

from rkdo_dist.data.index import DataError

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_BYTES = 64 << 20  # of one encoded image
MAX_PIXELS = 1 << 25  # of one image: 33.5 million, 96 MiB decoded
_LONGEST = 64  # times the shorter side: what is longer is cut before it is resized, which would fill the memory
_LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")


def decode(payload: bytes, where: str, size: int | None = None) -> np.ndarray:
    """The pixels of an image: uint8 (3, H, W), RGB; grey images are repeated, transparency is dropped.

    Args:
        payload: the encoded image.
        where: what to call it in errors.
        size: if given, the result is (3, size, size): the shorter side is resized to it (bilinear,
            antialiased) and the centre is cut out; an image of that size already is left as it is. A JPEG whose
            shorter side is at least 2, 4 or 8 times `size` is decoded at a half, a quarter or an eighth, by the
            decoder's own averages; that follows from the file and `size` alone.

    Raises:
        DataError: not an allowed image, damaged, or more than `MAX_BYTES` or `MAX_PIXELS`.
    """
    with _open(payload, where) as image:
        if size is not None:
            image.draft(None, (size, size))  # of JPEGs; never below `size`
        return pixels_of(image, where, size)


def pixels_of(image: Image.Image, where: str, size: int | None = None) -> np.ndarray:
    """The pixels of a Pillow image, as `decode`.

    Raises:
        DataError: if it cannot be decoded.
    """
    flat = _loaded(image, where, convert=True)
    if size is not None and flat.size != (size, size):
        flat = _fit(flat, size)
    return np.ascontiguousarray(np.asarray(flat).transpose(2, 0, 1))


def check(payload: bytes, where: str) -> tuple[str, int, int]:
    """The format (one of `FORMATS`), height and width of an image that can be decoded.

    Raises:
        DataError: as `decode`.
    """
    with _open(payload, where) as image:
        kind = str(image.format)
        _loaded(image, where, convert=False)
        return kind, image.height, image.width


def header(payload: bytes, where: str) -> tuple[int, int]:
    """Height and width of an allowed image, from its header alone.

    Raises:
        DataError: as `decode`, except for damage that only decoding finds.
    """
    with _open(payload, where) as image:
        return image.height, image.width


def _open(payload: bytes, where: str) -> Image.Image:
    if len(payload) > MAX_BYTES:
        raise DataError(f"{where} has {len(payload)} bytes; the limit for one image is {MAX_BYTES}")
    try:
        image = Image.open(io.BytesIO(payload), formats=list(FORMATS))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{where} claims more pixels than the limit of {MAX_PIXELS}") from None
    except Exception as error:  # as above
        raise DataError(f"{where} is not a readable {'/'.join(FORMATS)} image ({_brief(error)})") from None
    if image.height * image.width > MAX_PIXELS:
        raise DataError(f"{where} claims {image.width} x {image.height} pixels; the limit is {MAX_PIXELS}")
    if image.format not in FORMATS:  # Pillow calls JPEG files with several frames MPO
        raise DataError(f"{where} is a {image.format} file; allowed are {', '.join(FORMATS)}")
    return image


def _loaded(image: Image.Image, where: str, convert: bool) -> Image.Image:
    try:
        image.load()
        if not convert or image.mode == "RGB":
            return image
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it
            image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data
        raise DataError(f"{where} cannot be decoded ({_brief(error)})") from None


def _fit(image: Image.Image, size: int) -> Image.Image:
    short, long = min(image.size), _LONGEST * min(image.size)
    if max(image.size) > long:  # 1 x 65535 pixels would become size x 65535 size
        left, top = (max(0, side - long) // 2 for side in image.size)
        image = image.crop((left, top, left + min(image.width, long), top + min(image.height, long)))
    scale = size / short
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def encode_png(pixels: np.ndarray) -> bytes:
    """Lossless PNG of uint8 (3, H, W); the bytes depend on the pixels and the versions of Pillow and zlib
    only."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(out, "PNG")
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
