"""Views: the pixels are torchvision's, the distributions are torchvision's, the draws belong to the
sample."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from rkdo_dist.data import views as module
from rkdo_dist.data.pixels import Draws, Numbers, color_jitter, resized_crop
from rkdo_dist.data.views import Views, uniforms

SIZES = [(32, 32, 32), (40, 28, 32), (96, 96, 64), (8, 8, 8), (64, 64, 20), (17, 99, 24), (50, 60, 130)]


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Random pixels with flat grey, black, white and saturated patches, where the hue has its corner
    cases."""
    images = torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    images[0] = 0
    images[1] = 255
    images[2] = 77
    images[3, 0], images[3, 1], images[3, 2] = 255, 0, 0
    images[4, :, : height // 2] = torch.tensor([9, 200, 200], dtype=torch.uint8)[:, None, None]
    images[5, :, : height // 2] = torch.tensor([200, 200, 9], dtype=torch.uint8)[:, None, None]
    return images


def reference_crop(images: Tensor, draws: Draws, size: int) -> Tensor:
    rows = []
    for k, box in enumerate(draws.boxes.tolist()):
        row = F.resized_crop(images[k].float() / 255, *box, [size, size], antialias=True)
        rows.append(F.horizontal_flip(row) if draws.flip[k] else row)
    return torch.stack(rows)


def reference_jitter(pixels: Tensor, draws: Draws) -> Tensor:
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    rows = []
    for k, row in enumerate(pixels):
        for operation in draws.order[k] if draws.jitter[k] else ():
            row = operations[operation](row, float(draws.factors[k, operation]))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_pixels_are_those_of_torchvision(height: int, width: int, size: int) -> None:
    images = pictures(40, height, width)
    views = Views(size, jitter=(0.8, 0.8, 0.8, 0.5), mean=0.3, std=0.7)
    draws = views.draw(np.arange(40), seed=1, epoch=2, view=0, height=height, width=width)
    cropped = reference_crop(images, draws, size)
    torch.testing.assert_close(resized_crop(images, Numbers.of(draws), size), cropped, atol=1e-6, rtol=0)
    jittered = reference_jitter(cropped, draws)
    assert (jittered - cropped).abs().max() > 0.3
    torch.testing.assert_close(color_jitter(cropped.clone(), Numbers.of(draws)), jittered, atol=1e-5, rtol=0)
    grey = torch.stack([F.rgb_to_grayscale(x, 3) if g else x for x, g in zip(jittered, draws.grayscale, strict=True)])
    expected = F.normalize(grey, [0.3] * 3, [0.7] * 3)
    torch.testing.assert_close(views(images, torch.arange(40), 1, 2, 0), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 8, 32, 64])
def test_blur_and_solarization_are_those_of_torchvision(size: int) -> None:
    images, ids = pictures(40, 40, 36), torch.arange(40)
    views = Views(size, blur=0.5, solarize=0.5, mean=(0.1, 0.4, 0.5), std=(0.7, 1.0, 0.3))
    draws = views.draw(np.arange(40), seed=1, epoch=2, view=0, height=40, width=36)
    plain = Views(size, mean=0.0, std=1.0)(images, ids, 1, 2, 0)  # the draws of all else are as they were
    kernel = [2 * min(max(1, size // 20), size - 1) + 1] * 2
    rows = []
    for k, row in enumerate(plain):
        row = F.gaussian_blur(row, kernel, [float(draws.sigmas[k])] * 2) if draws.blur[k] else row
        rows.append(F.solarize(row, 128 / 255) if draws.solarize[k] else row)
    assert 8 < draws.blur.sum() < 32
    assert 8 < (draws.blur & draws.solarize).sum() + (~draws.blur & ~draws.solarize).sum() < 32
    expected = F.normalize(torch.stack(rows), [0.1, 0.4, 0.5], [0.7, 1.0, 0.3])
    got = views(images, ids, 1, 2, 0)
    off = (got - expected).abs().amax((1, 2, 3))  # a pixel at 128 may be inverted or not, by the last bit
    assert (off < 1e-5).sum() >= 39
    if size > 1:
        assert (plain - torch.stack(rows)).abs().max() > 0.1
    if size == 32:
        centre = F.resize(F.center_crop(images.float() / 255, [36, 36]), [32, 32], antialias=True)
        normalised = F.normalize(centre, [0.1, 0.4, 0.5], [0.7, 1.0, 0.3])
        torch.testing.assert_close(views.plain(images), normalised, atol=2e-5, rtol=0)


def test_blur_and_solarization_are_drawn_as_asked_for_each_view() -> None:
    views, count = Views(8, blur=(1.0, 0.1), solarize=(0.0, 0.2)), 6000
    first, second = (views.draw(np.arange(count), 3, 0, view, 8, 8) for view in (0, 1))
    assert first.blur.all()
    assert not first.solarize.any()
    for chosen, probability in ((second.blur, 0.1), (second.solarize, 0.2), (second.blur & second.solarize, 0.02)):
        assert stats.binomtest(int(chosen.sum()), count, probability).pvalue > 1e-3
    assert stats.kstest(first.sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    assert (Views(8).draw(np.arange(count), 3, 0, 1, 8, 8).boxes == second.boxes).all()


@pytest.mark.parametrize("size", [1, 7, 24, 64])
def test_bits_do_not_depend_on_the_pieces_that_images_are_worked_on_in(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image at a time undergoes its own changes alone; all at once, each has the places of all others' changes."""
    images, ids = pictures(60, 40, 28), torch.arange(60)
    views = Views(size, jitter_probability=0.7, grayscale=0.3, blur=0.4, solarize=0.3, mean=(0.4, 0.5, 0.6))
    expected = views(images, ids, 5, 3, 1)
    for pixels in (1, 5 * size**2, 60 * size**2):
        monkeypatch.setattr(module, "_CACHED", pixels)
        assert torch.equal(views(images, ids, 5, 3, 1), expected)


class _Launches(TorchDispatchMode):
    """Counts the operators that an accelerator would have to start."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = str(func).split(".")[1]
        self.count += not (func.is_view or kind in ("_unsafe_view", "empty", "empty_like", "detach", "lift_fresh"))
        return func(*args, **(kwargs or {}))


def test_an_accelerator_starts_at_most_125_operators_for_a_view() -> None:
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8, device="meta")
    with _Launches() as launches:
        assert Views(32)(images, torch.arange(64), 1, 2, 0).shape == (64, 3, 32, 32)
    assert launches.count <= 125


def test_a_view_belongs_to_seed_epoch_sample_and_view_alone() -> None:
    images, ids = pictures(64, 32, 32), torch.arange(64) * 977
    views = Views(24, blur=0.5, solarize=0.2, mean=(0.4, 0.5, 0.6))
    expected = views(images, ids, 5, 3, 1)
    assert torch.equal(expected, views(images, ids, 5, 3, 1))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(123)  # no global state takes part
    assert torch.equal(views(images[order], ids[order], 5, 3, 1), expected[order])
    few = torch.cat([views(images[k : k + 7], ids[k : k + 7], 5, 3, 1) for k in range(0, 64, 7)])
    assert torch.equal(few, expected)
    for other in ((6, 3, 1), (5, 4, 1), (5, 3, 0)):
        different = (views(images, ids, *other) - expected).abs().amax((1, 2, 3)) > 0.1
        assert different[6:].float().mean() > 0.95
    assert (views(images, ids + 1, 5, 3, 1) - expected).abs().amax((1, 2, 3))[6:].min() > 0


def test_draws_are_pinned_for_ever() -> None:
    # A resumed run must meet the same views: these values may never change.
    ids = np.array([0, 1, 2**40, 10**15])
    digest = hashlib.sha256(uniforms(ids, seed=42, epoch=7, view=1, count=34).astype("<f8").tobytes()).hexdigest()
    assert digest == "6fd9c4b5fc5cc783b005d19ec5a09ce4f4c8d4268d199a5c224b383d278a9220"


def test_uniforms_are_uniform_and_independent() -> None:
    u = uniforms(np.arange(20_000), seed=3, epoch=0, view=0, count=34)
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(u.T) - np.eye(34)
    assert abs(correlation).max() < 5 / np.sqrt(20_000)
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.01
    other = uniforms(np.arange(20_000), seed=3, epoch=0, view=1, count=34)
    assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 0.01


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 30), (200, 20), (20, 200)])
def test_crops_are_distributed_as_torchvision_s(height: int, width: int) -> None:
    count = 4000
    boxes = Views(32).draw(np.arange(count), 7, 0, 0, height, width).boxes
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()
    assert (boxes[:, 2:] > 0).all()
    torch.manual_seed(7)
    theirs = v2.RandomResizedCrop(32, (0.2, 1.0))
    example = [torch.empty(3, height, width)]
    drawn = [theirs.make_params(example) for _ in range(count)]
    expected = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    for measure in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
    ):
        assert stats.ks_2samp(measure(boxes), measure(expected)).pvalue > 1e-3


def test_factors_and_frequencies_are_those_of_torchvision() -> None:
    count, spread = 6000, (0.4, 0.3, 1.5, 0.1)
    draws = Views(8, jitter=spread).draw(np.arange(count), 11, 0, 1, 8, 8)
    torch.manual_seed(11)
    theirs = v2.ColorJitter(*spread)
    drawn = [theirs.make_params([]) for _ in range(count)]
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        expected = [p[f"{name}_factor"] for p in drawn]
        assert stats.ks_2samp(draws.factors[:, k], expected).pvalue > 1e-3
    orders = np.unique(draws.order, axis=0, return_counts=True)[1]
    assert len(orders) == 24
    assert stats.chisquare(orders).pvalue > 1e-3
    for chosen, probability in ((draws.flip, 0.5), (draws.jitter, 0.8), (draws.grayscale, 0.2)):
        assert stats.binomtest(int(chosen.sum()), count, probability).pvalue > 1e-3


def test_whole_views_have_the_moments_of_torchvision_s() -> None:
    count, size = 800, 16
    ramp = torch.linspace(0, 255, 24)
    image = torch.stack([ramp[:, None].expand(24, 24), ramp[None].expand(24, 24), (ramp[:, None] + ramp[None]) / 2]).to(
        torch.uint8
    )
    theirs = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomResizedCrop(size, (0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    torch.manual_seed(0)
    expected = torch.stack([theirs(image) for _ in range(count)])
    ours = Views(size)(image.expand(count, 3, 24, 24), torch.arange(count), 0, 0, 0)
    for measure in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.var((1, 2, 3)),
        lambda x: x.mean((2, 3))[:, 0],
        lambda x: x[:, 2, 0, 0],
    ):
        assert stats.ks_2samp(measure(ours).numpy(), measure(expected).numpy()).pvalue > 1e-3


def test_switched_off_everything_is_a_plain_resize() -> None:
    images = pictures(10, 20, 20)
    off = Views(20, crop_scale=(1.0, 1.0), flip=0, jitter=(0, 0, 0, 0), grayscale=0)
    square = off.draw(np.arange(10), 0, 0, 0, 20, 20).boxes[:, 2:] == 20
    assert square.all()  # a share of 1 fits a square only as a square, or as the fallback
    torch.testing.assert_close(off(images, torch.arange(10), 0, 0, 0), off.plain(images), atol=1e-6, rtol=0)
    torch.testing.assert_close(off.plain(images), images.float() / 127.5 - 1, atol=1e-6, rtol=0)
    no_hue = Views(20, jitter=(0.4, 0.4, 0.4, 0.0), jitter_probability=1.0, grayscale=0)
    assert torch.isfinite(no_hue(images, torch.arange(10), 0, 0, 0)).all()


def test_plain_is_the_resized_central_square() -> None:
    images = pictures(8, 40, 30)
    expected = F.normalize(
        F.resize(F.center_crop(images.float() / 255, [30, 30]), [17, 17], antialias=True), [0.5], [0.5]
    )
    torch.testing.assert_close(Views(17).plain(images), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        Views(30).plain(images),
        F.normalize(F.center_crop(images.float() / 255, [30, 30]), [0.5], [0.5]),
        atol=1e-6,
        rtol=0,
    )


def test_wrong_arguments_are_named() -> None:
    for bad in ({"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.5, 0.2)}, {"flip": 1.5}, {"jitter": (0, 0, 0, 0.6)},
                {"jitter": (-1, 0, 0, 0)}, {"size": 0}, {"std": 0.0}, {"grayscale": float("nan")}, {"blur": 1.5},
                {"blur": (0.1, 0.2, 0.3)}, {"solarize": (0.1, -1.0)}, {"mean": (0.5, 0.5)}, {"std": (1.0, 0.0, 1.0)},
                {"mean": (0.5, 0.5, float("inf"))}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            Views(**{"size": 8, **bad})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images must be uint8 \(m, 3, H, W\), got torch.float32"):
        Views(8)(torch.rand(2, 3, 8, 8), torch.arange(2), 0, 0, 0)
    with pytest.raises(ValueError, match=r"ids must be int64 \(2,\), got torch.int64 \(3,\)"):
        Views(8)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(3), 0, 0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_views() -> None:
    images, ids = pictures(40, 40, 32), torch.arange(40)
    ours = Views(24)(images.cuda(), ids, 1, 2, 0).cpu()
    torch.testing.assert_close(ours, Views(24)(images, ids, 1, 2, 0), atol=1e-5, rtol=0)
