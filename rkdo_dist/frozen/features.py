"""Files of frozen features: what `rkdo embed` writes, arrays of anybody's, images in idx files (the MNIST format)."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_MOST_CLASSES = 1 << 24
_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


@dataclass(frozen=True)
class Features:
    """n frozen samples.

    Attributes:
        values: (n, f) float32, finite.
        labels: (n,) int64, -1 for none; None if there are none at all.
        keys: (n,) names of the samples; None if they have none.
        splits: (n,) names of their splits; None if not known.
        classes: names of the labels; empty if not known.
        pictures: (n, H, W) uint8, if the features are the pictures themselves.
        digest: SHA-256 (hex) of shape and values.
    """

    values: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    keys: Array | None
    splits: Array | None
    classes: tuple[str, ...]
    pictures: NDArray[np.uint8] | None
    digest: str

    def known(self) -> NDArray[np.int64]:
        """Positions of the samples with a label."""
        return np.flatnonzero(self.labels >= 0) if self.labels is not None else np.arange(0)


def read_features(path: Path, array: str = "features", labels: Path | None = None) -> Features:
    """Read a file of features.

    Args:
        path: .npz, .parquet (the extra `parquet`) or .safetensors with the array (n, f), and if known `labels` (n,),
            `keys`, `splits`, `classes` (in a parquet: columns `label`, `key`, `split`), as `rkdo embed` writes them; or
            an idx file, also gzipped, whose entries are the features.
        array: its name, such as "embeddings".
        labels: an idx file of labels, or an .npz with `labels`, in place of those of `path`.

    Raises:
        ValueError: for a file that is none of these, arrays that are missing (it names those that are there), that do
            not fit each other or are not numbers, and features that are not finite (it names the first such row).
    """
    found = _arrays(path, {array, "labels", "keys", "splits", "classes"})
    pictures = None
    if "idx" in found:
        images = found.pop("idx")
        if images.ndim < 2:
            raise ValueError(f"{path} holds {images.shape}, not features (n, f): labels are given by --labels")
        pictures = images if images.dtype == np.uint8 and images.ndim == 3 else None
        found[array] = images.reshape(len(images), math.prod(images.shape[1:]))
    if array not in found:
        raise ValueError(f"{path} has no array {array!r}: there are {', '.join(sorted(found)) or 'none'} (see --array)")
    if labels is not None:
        given = _arrays(labels, {"labels"})
        if not {"labels", "idx"} & set(given):
            raise ValueError(f"{labels} has no array 'labels': there are {', '.join(sorted(given)) or 'none'}")
        found["labels"] = given["labels" if "labels" in given else "idx"]
    values = _values(found[array], f"{path}: {array}")
    named = {name: found.get(name) for name in ("labels", "keys", "splits")}
    classes = found.get("classes", np.array([]))
    for name in ("keys", "splits", "classes"):
        _check_names(found.get(name), f"{path}: {name}")
    for name, some in named.items():
        if some is not None and some.shape != (len(values),):
            raise ValueError(f"{path}: {name} must be ({len(values)},) as there are rows of {array}, got {some.shape}")
    return Features(
        values=values,
        labels=_labels(named["labels"], path),
        keys=named["keys"],
        splits=named["splits"],
        classes=tuple(map(str, classes)),
        pictures=pictures,
        digest=_digest(values),
    )


def _check_names(names: Array | None, what: str) -> None:
    """Raise an error for what is no list of texts (or numbers) that can be written down."""
    if names is None:
        return
    try:
        "".join(map(str, names)).encode()
    except (TypeError, UnicodeEncodeError):
        names = np.zeros((0, 0))
    if names.ndim != 1:
        raise ValueError(f"{what} must be a list of names")


def _digest(values: Array) -> str:
    digest = hashlib.sha256(str(values.shape).encode())
    digest.update(values.data)
    return digest.hexdigest()


def _values(raw: Array, what: str) -> NDArray[np.float32]:
    if raw.ndim != 2 or raw.dtype.kind not in "fiub" or raw.size == 0:
        raise ValueError(f"{what} must be numbers (n, f), got {raw.dtype} {raw.shape}")
    with np.errstate(over="ignore"):  # said below
        values = np.ascontiguousarray(raw, dtype=np.float32)
    broken = 0
    first = None
    for start in range(0, len(values), 4096):  # no array of the features' size is made
        bad = np.flatnonzero(~np.isfinite(values[start : start + 4096]).all(axis=1))
        first = start + int(bad[0]) if first is None and len(bad) else first
        broken += len(bad)
    if first is not None:
        raise ValueError(f"{what} must be finite, but row {first} is not ({broken} of {len(values)} rows are not)")
    return values


def _labels(raw: Array | None, path: Path) -> NDArray[np.int64] | None:
    if raw is None:
        return None
    if raw.dtype.kind not in "iub":
        raise ValueError(f"{path}: labels must be whole numbers, -1 for none, got {raw.dtype}")
    if raw.size and raw.max() >= _MOST_CLASSES:
        raise ValueError(f"{path}: labels must be below {_MOST_CLASSES:,}, got {raw.max()}")
    labels = raw.astype(np.int64)
    return labels if (labels >= 0).any() else None


def _arrays(path: Path, wanted: set[str]) -> dict[str, Array]:
    """Arrays of a file by name, empty if they are not wanted; of an idx file its one array, called "idx"."""
    if not path.is_file():
        raise ValueError(f"{path} is not there, or not a file: give an .npz, .parquet, .safetensors or idx file")
    if path.suffix == ".npz":
        return _npz(path, wanted)
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".safetensors":
        return _safetensors(path, wanted)
    return {"idx": _idx(path)}


def _npz(path: Path, wanted: set[str]) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] if name in wanted else np.arange(0) for name in file.files}
        foreign = next((name for name, array in found.items() if not isinstance(array, np.ndarray)), None)
        if foreign is not None:
            raise ValueError(f"{foreign!r} in it is no array")
        return found
    except (
        ValueError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        RuntimeError,
    ) as error:  # the last: a password
        why = "it holds Python objects, which are not read" if "allow_pickle" in str(error) else str(error)
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays: {why}") from None


def _parquet(path: Path) -> dict[str, Array]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("a .parquet file needs pyarrow: pip install 'rkdo_dist[parquet]'; or use an .npz") from None
    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as a .parquet file: {' '.join(str(error).split())}") from None
    names = {"key": "keys", "split": "splits", "label": "labels"}
    found = {}
    for column in table.column_names:
        values = table[column].combine_chunks()
        try:
            if isinstance(values.type, pa.FixedSizeListType):
                array = values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)
            elif isinstance(values.type, pa.ListType):
                array = np.array(values.to_pylist(), dtype=np.float32)
            else:
                array = np.array(values.to_pylist())
        except (ValueError, TypeError):  # rows of several lengths, or without a value
            raise ValueError(f"{path}: the rows of {column} are not all there, or not of one length") from None
        found[names.get(column, column)] = array
    about = (table.schema.metadata or {}).get(b"classes")
    return found | ({"classes": _listed(about, f"{path}: classes")} if about else {})


def _safetensors(path: Path, wanted: set[str]) -> dict[str, Array]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:  # NumPy has no bfloat16
            found = {name: file.get_tensor(name) if name in wanted else None for name in file.keys()}  # noqa: SIM118
            text = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a .safetensors file: {error}") from None
    arrays = {
        name: np.arange(0) if x is None else (x.float() if x.is_floating_point() else x).numpy()
        for name, x in found.items()
    }
    told = {name: _listed(text[name], f"{path}: {name}") for name in ("keys", "splits", "classes") if name in text}
    return arrays | told


def _listed(text: str | bytes, what: str) -> Array:
    """A list of texts, in JSON."""
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what} must be a list of names (JSON)")
    return np.array(names, dtype=str)


def _idx(path: Path) -> Array:
    """The array of an idx file: two zero bytes, a type, the number of dimensions, the dimensions, the entries."""
    known = "an .npz, .parquet, .safetensors or idx file"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES:
                raise ValueError(f"{path} is not {known}")
            shape = np.frombuffer(file.read(4 * head[3]), ">u4").astype(np.int64).tolist()
            kind = np.dtype(_IDX_TYPES[head[2]])
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as {known}: {error}") from None
    if len(shape) != head[3] or len(content) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{path} is cut off or too long: its head promises {tuple(shape)} entries of {kind.itemsize}")
    return np.frombuffer(content, kind).reshape(shape).astype(kind.newbyteorder("="))
