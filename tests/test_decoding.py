"""Decoding of large JPEGs at a fraction of their size: a function of the file and the size asked for."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from rkdo_dist.data.errors import DataError
from rkdo_dist.data.images import decode


def photo(width: int, height: int) -> Image.Image:
    """Smooth, with an edge and some noise."""
    y, x = np.mgrid[:height, :width] / 60
    waves = [np.sin(x * k + y) * np.cos(y * k - x) for k in (1, 2, 3)]
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    pixels = 128 + 80 * np.stack(waves, axis=-1) + 40 * (x > y)[..., None] + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def whole(payload: bytes, size: int) -> np.ndarray:
    """Decoded in full, then fitted."""
    with Image.open(io.BytesIO(payload)) as image:
        return decode(encoded(image.convert("RGB"), "PNG"), "it", size)


@pytest.mark.parametrize(("size", "share"), [(188, 1), (187, 2), (96, 2), (93, 4), (32, 8), (5, 8)])
def test_a_jpeg_is_decoded_at_the_smallest_fraction_that_holds_the_size(size: int, share: int) -> None:
    payload = encoded(photo(500, 375))
    got = decode(payload, "it", size)
    with Image.open(io.BytesIO(payload)) as image:
        image.draft(None, (500 // share, 375 // share))
        assert image.size == (-(-500 // share), -(-375 // share))
        expected = decode(encoded(image, "PNG"), "it", size)
    assert np.array_equal(got, expected)
    full = whole(payload, size)
    assert np.array_equal(got, full) == (share == 1)
    assert np.abs(got.astype(int) - full).mean() < 4


@pytest.mark.parametrize(("width", "height", "size"), [(63, 64, 32), (32, 32, 32), (12, 12, 12), (40, 20, 12)])
def test_smaller_images_and_other_formats_keep_their_bits(width: int, height: int, size: int) -> None:
    payload = encoded(photo(width, height))
    assert np.array_equal(decode(payload, "it", size), whole(payload, size))
    png = encoded(photo(500, 375), "PNG")
    assert np.array_equal(decode(png, "it", 32), whole(png, 32))


def test_twice_the_size_needs_no_further_step() -> None:
    payload = encoded(photo(64, 64))
    with Image.open(io.BytesIO(payload)) as image:
        image.draft(None, (32, 32))
        half = np.asarray(image)
    assert np.array_equal(decode(payload, "it", 32), half.transpose(2, 0, 1))


def test_damage_is_still_found() -> None:
    payload = encoded(photo(500, 375))
    with pytest.raises(DataError, match="it cannot be decoded"):
        decode(payload[: len(payload) // 2], "it", 32)


def test_a_strip_is_cut_before_it_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    made, resize = [], Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *more: object) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(image, size, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", watched)
    for shape in ((65535, 1, 3), (1, 65535, 3), (130, 2, 3)):
        pixels = np.zeros(shape, np.uint8)
        longest = int(np.argmax(shape[:2]))
        middle = [slice(None)] * 2
        middle[longest] = slice(shape[longest] // 2 - 40, shape[longest] // 2 + 40)
        pixels[tuple(middle)] = 200
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        found = decode(data.getvalue(), "strip", 16)
        assert found.shape == (3, 16, 16)
        assert (found == 200).all()
    assert max(made) <= 16 * 16 * 64
