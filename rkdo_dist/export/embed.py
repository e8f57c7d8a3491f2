"""`rkdo embed`: features of a source of images, on all ranks, each sample once, with its key."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import nn

from rkdo_dist.config import RunConfig
from rkdo_dist.console import Terminal, counting, say
from rkdo_dist.data.index import Progress, ShardIndex
from rkdo_dist.data.source import open_source
from rkdo_dist.data.stream import MicroBatch, evaluation_stream
from rkdo_dist.evaluate.evaluation import BLOCK
from rkdo_dist.evaluate.features import FrozenFeatures, gather_features, plain_features
from rkdo_dist.exchange import group
from rkdo_dist.export.formats import refuse_existing
from rkdo_dist.export.pretrained import PretrainedEncoder, load_encoder
from rkdo_dist.files import write_atomic
from rkdo_dist.ranks import surroundings
from rkdo_dist.ranks.agreement import agree
from rkdo_dist.ranks.runtime import Runtime

SUFFIXES = (".npz", ".parquet", ".safetensors")
WHAT = ("both", "features", "embeddings")


def embed(
    encoder_source: str,
    source: str,
    out: Path,
    *,
    splits: Sequence[str] = (),
    what: str = "both",
    force: bool = False,
    backbone: str | nn.Module | None = None,
    weights: str = "trained",
    on_corrupt: str = "abort",
    allow_remote: bool = False,
) -> None:
    """Write features and embeddings of every image of `source` (collective).

    The file holds `keys` (n,) (names of the samples), `splits` (n,), `features` float32 (n, f), `embeddings` float32
    (n, d), and, where they are known, `labels` int64 (n,) and `classes`. In a `.npz` and a `.parquet` keys are text; in
    a `.safetensors`, which holds numbers alone, a list in the header under "keys". The block of 256 images is the unit
    of arithmetic, so the numbers do not depend on how many ranks there are.

    Args:
        encoder_source, backbone, weights: as for `load_encoder`.
        source: as for `data.source`; its samples are embedded in the order of the index, split after split.
        out: a file that ends in .npz, .parquet (the extra `parquet`) or .safetensors.
        splits: which; none: all.
        what: "both", "features" or "embeddings".
        force: replace `out` if it is there.
        on_corrupt: "abort", or "skip" to leave out files of a folder that are not images.
        allow_remote: as `data.allow_remote`.

    Raises:
        ValueError: for a mistake in the request or a damaged sample, on every rank; nothing is written then.
    """
    defaults = RunConfig()
    with surroundings.joined(defaults.threads, defaults.timeout, "fast") as around:
        rt = around.runtime
        group.together(lambda: _check(out, what, force) if rt.is_main else None, "looking at --out")
        encoder = group.together(
            lambda: load_encoder(encoder_source, backbone=backbone, weights=weights), "loading the encoder"
        )
        index = group.together(
            lambda: open_source(source, allow_remote=allow_remote, on_corrupt=on_corrupt, workers=False),
            "reading the index",
        )
        agree({"step of the encoder": encoder.about.get("step"), "data": index.digest()})
        names = list(splits) or list(index.splits)
        for name in names:
            group.together(lambda name=name: index.split(name), "looking up the split")  # type: ignore[misc]
        encoder.to(rt.device)
        console = Terminal(stderr=True) if rt.is_main else None
        found = [(name, *_split(encoder, index, name, rt, console)) for name in names]
        group.together(lambda: _write(out, found, index, what) if rt.is_main else None, "writing the features")
        if console is not None:
            say(console, f"features: {out}")


def _check(out: Path, what: str, force: bool) -> None:
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out {out}: the file must end in {', '.join(SUFFIXES)}")
    if what not in WHAT:
        raise ValueError(f"--what must be one of {', '.join(WHAT)}, got {what!r}")
    if out.suffix == ".parquet":
        _pyarrow()
    refuse_existing([out], force)


def _split(
    encoder: PretrainedEncoder, index: ShardIndex, split: str, rt: Runtime, console: Console | None
) -> tuple[FrozenFeatures | None, list[str]]:
    """Features of a split on rank zero, and the keys of its samples in the order of their ids."""
    samples = index.split(split).samples
    mine: dict[int, str] = {}
    blocks = evaluation_stream(index, split, BLOCK, rank=rt.rank, world=rt.world, size=encoder.transform.size)
    total = -(-samples // BLOCK)

    def noted(progress: Progress) -> Iterator[tuple[int, MicroBatch]]:
        for number, block in blocks:
            mine.update(zip(block.ids.tolist(), block.keys, strict=True))
            yield number, block
            progress(min(total, number + rt.world), total, "")

    with counting(console, f"embedding {split}") as progress:
        features = plain_features(encoder, encoder.transform.plain, rt)
        found = gather_features(noted(progress), features, samples, device=rt.device)
    keys: dict[int, str] = {}
    for part in group.gather_objects(mine):
        keys.update(part)  # type: ignore[call-overload]
    return found, [keys[k] for k in sorted(keys)]


def _write(out: Path, found: list[tuple[str, FrozenFeatures | None, list[str]]], index: ShardIndex, what: str) -> None:
    keys = [key for _, _, some in found for key in some]
    parts = [features for _, features, _ in found if features is not None]
    arrays: dict[str, np.ndarray] = {"splits": np.array([name for name, _, some in found for _ in some])}
    if what != "embeddings":
        arrays["features"] = _joined([part.backbone for part in parts])
    if what != "features":
        arrays["embeddings"] = _joined([part.embeddings for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    if (labels >= 0).any():
        arrays["labels"] = labels
        arrays["classes"] = np.array(index.classes)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, {".npz": _npz, ".parquet": _parquet, ".safetensors": _safetensors}[out.suffix](keys, arrays))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Without a copy, if there is one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _npz(keys: list[str], arrays: dict[str, np.ndarray]) -> memoryview:
    buffer = io.BytesIO()
    np.savez(buffer, keys=np.array(keys), **arrays)  # type: ignore[arg-type]
    return buffer.getbuffer()


def _safetensors(keys: list[str], arrays: dict[str, np.ndarray]) -> memoryview:
    from safetensors.numpy import save

    numbers = {name: array for name, array in arrays.items() if array.dtype.kind != "U"}
    text = {name: json.dumps(array.tolist()) for name, array in arrays.items() if array.dtype.kind == "U"}
    return memoryview(save(numbers, {"keys": json.dumps(keys), **text}))


def _parquet(keys: list[str], arrays: dict[str, np.ndarray]) -> memoryview:
    pa = _pyarrow()
    columns = {"key": pa.array(keys), "split": pa.array(arrays["splits"].tolist())}
    for name, one in (("features", "features"), ("embeddings", "embeddings")):
        if name in arrays:
            flat = pa.array(np.ascontiguousarray(arrays[name]).reshape(-1))
            columns[one] = pa.FixedSizeListArray.from_arrays(flat, arrays[name].shape[1])
    if "labels" in arrays:
        columns["label"] = pa.array(arrays["labels"])
    table = pa.table(columns)
    if "classes" in arrays:
        table = table.replace_schema_metadata({"classes": json.dumps(arrays["classes"].tolist())})
    buffer = io.BytesIO()
    pa.parquet.write_table(table, buffer)
    return buffer.getbuffer()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("a .parquet file needs pyarrow: pip install 'rkdo_dist[parquet]'; or write a .npz") from None
    return pyarrow
