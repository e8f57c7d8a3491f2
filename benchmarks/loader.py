"""Images a second that loader workers read: verified, decoded, fitted, packed, handed over.

    python benchmarks/loader.py [--images 512] [--rounds 3] [--source ../shared/data/cifar10-jpeg.tar] [--out OUT.json]

Pictures are synthetic, with the waves, edges and noise that give JPEGs of photographs' lengths, written as shards. A
core's rate is by processor time of one process that reads; rates with 1 and 2 workers are by the clock, and mean
something on an idle machine alone. "draft" is decoding at a fraction (`data.images.decode`) against decoding in full.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from rkdo_dist.data.images import decode
from rkdo_dist.data.index import ShardIndex, load_index
from rkdo_dist.data.prepare import prepare
from rkdo_dist.data.source import open_source
from rkdo_dist.data.stream import lane_stream

CASES = ((32, 32, None), (96, 96, None), (256, 256, None), (500, 375, 224), (500, 375, 96))  # width, height, image_size


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Waves, edges and noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    pixels = np.zeros((height, width, 3))
    for _ in range(6):
        a, b, phase = draw.normal(0, 12, 3)
        pixels += 22 * np.sin(a * x + b * y + phase)[..., None] * draw.normal(0, 1, 3)
    for _ in range(8):
        a, b, c = draw.normal(0, 1, 3)
        pixels += (a * (x - 0.5) + b * (y - 0.5) > 0.3 * c)[..., None] * draw.normal(0, 25, 3)
    pixels += 128 + draw.normal(0, 5, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def shards(folder: Path, width: int, height: int, images: int) -> ShardIndex:
    for k in range(images):
        path = folder / "images" / "train" / f"{k:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k % 64, width, height).save(path, quality=90)
    prepare("imagefolder", folder / "shards", folder / "images", shard_size=max(50, images // 4))
    return load_index(folder / "shards")


def rate(index: ShardIndex, size: int | None, images: int, workers: int) -> float:
    """Images a second: of processor time without workers, else of the clock between the first batch and the last."""
    clock = time.perf_counter if workers else time.process_time
    micro = max(1, min(32, images // 8))
    stream = lane_stream(index, "train", seed=0, all_lanes=1, micro_batch=micro, epochs=3, size=size, workers=workers)
    steps = min(images, index.split("train").samples) // micro
    for _ in itertools.islice(stream, steps):  # shards are verified, and workers are there
        pass
    began = clock()
    found = sum(len(batch.lanes[0].keys) for batch in itertools.islice(stream, steps))
    seconds = clock() - began
    stream.close()
    return found / seconds


def draft_gain(width: int, height: int, size: int) -> float:
    """Time of decoding in full against decoding at a fraction, to the same size."""
    out = io.BytesIO()
    picture(0, width, height).save(out, "JPEG", quality=90)

    def full() -> None:
        with Image.open(io.BytesIO(out.getvalue())) as image:
            scale = size / min(width, height)
            image.convert("RGB").resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)

    times: list[list[float]] = [[], []]
    for _ in range(9):
        for found, action in zip(times, (full, lambda: decode(out.getvalue(), "it", size)), strict=True):
            began = time.process_time()
            for _ in range(5):
                action()
            found.append(time.process_time() - began)
    return statistics.median(a / b for a, b in zip(*times, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512, help="of 32 pixels; a quarter as many of the largest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--source", help="real images beside the synthetic ones, as data.source")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        cases = []
        for number, (width, height, size) in enumerate(CASES):
            count = options.images if width < 200 else options.images // 4
            cases.append((f"{width} x {height}", size, shards(Path(folder) / str(number), width, height, count), count))
        if options.source:
            cases.append((Path(options.source).name, None, open_source(options.source), options.images))
        for name, size, index, count in cases:
            rounds = [[rate(index, size, count, workers) for workers in (0, 1, 2)] for _ in range(options.rounds)]
            core, one, two = (statistics.median(column) for column in zip(*rounds, strict=True))
            gain = draft_gain(500, 375, size) if size is not None else None
            results.append({"images": name, "size": size, "a_core": core, "1_worker": one, "2_workers": two})
            results[-1]["draft_gain"] = gain
            fitted = f" to {size}" if size else ""
            print(f"{name + fitted:24} {core:8.0f} images/s of a core, {one:8.0f} with 1 worker, {two:8.0f} with 2"
                  + (f"; draft {gain:.2f} times as fast" if gain else ""), flush=True)  # fmt: skip
    if options.out:
        facts = {"machine": platform.processor() or platform.machine(), "results": results}
        options.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
