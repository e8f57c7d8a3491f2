"""Rows of p and features that a user gives in a file, matched with the samples of a split.

| file | content |
|---|---|
| rows, `.npz` or `.parquet` | `row`, `column`, `p`, one of each for an entry p(column\\|row) > 0; rows sum to 1 |
| features, `.npz` | `features` (n, f) or `embeddings` (n, d), as `rkdo embed` writes them |

In rows, `row` and `column` are sample keys (text) or positions in the split (integers from 0). Features belong to the
samples that `keys` (n,) names (of those whose `splits` entry is this split, where there is one); without keys, to the
samples in order.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkdo_dist.data.errors import DataError
from rkdo_dist.field.persistent import Rows

TOLERANCE = 1e-4  # of a row's sum: entries may be float32, or rounded in a text


def read_rows(path: Path, samples: int, keys: Callable[[], Sequence[str]]) -> Rows:
    """The rows of a file, one for every sample, without a rest; divided by their sums.

    Args:
        samples: n of the split.
        keys: returns their keys, by position; called if the file names samples by key.

    Raises:
        DataError: naming file and row: not such a file, unknown keys or positions, a sample without a row, an entry
            that is there twice, not finite or not positive, a row that does not sum to 1.
    """
    row, column, p = _columns(path, ("row", "column", "p"))
    if not len(row) == len(column) == len(p):
        raise DataError(f"{path}: row, column and p must be equally long, got {len(row)}, {len(column)}, {len(p)}")
    text = {"row": row.dtype.kind == "U", "column": column.dtype.kind == "U"}
    known = {key: k for k, key in enumerate(keys())} if any(text.values()) else {}
    row, column = (_positions(path, name, x, samples, known) for name, x in (("row", row), ("column", column)))
    p = _numbers(path, "p", p).reshape(-1)
    if not (p > 0).all():
        k = int(np.flatnonzero(~(p > 0))[0])
        raise DataError(f"{path}: p must be above 0 and finite, but that of row {row[k]}, column {column[k]} is {p[k]}")
    order = np.lexsort((column, -p, row))  # of each row the largest first
    row, column, p = row[order], column[order], p[order]
    counts = np.bincount(row, minlength=samples)
    if not counts.all():
        missing = np.flatnonzero(counts == 0)
        raise DataError(
            f"{path} has no row for {len(missing)} of the {samples} samples of the split (first: position {missing[0]})"
        )
    pairs = np.sort(row * samples + column)
    twice = pairs[1:][pairs[1:] == pairs[:-1]]
    if len(twice):
        raise DataError(f"{path}: row {twice[0] // samples} has column {twice[0] % samples} twice")
    sums = np.bincount(row, weights=p, minlength=samples)
    wrong = np.flatnonzero(np.abs(sums - 1) > TOLERANCE)
    if len(wrong):
        raise DataError(
            f"{path}: rows must sum to 1, but that of sample {wrong[0]} sums to {sums[wrong[0]]:.6g} "
            f"({len(wrong)} rows do not)"
        )
    slot = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    columns = np.full((samples, counts.max()), samples, dtype=np.int32)
    probabilities = np.zeros(columns.shape, dtype=np.float32)
    columns[row, slot], probabilities[row, slot] = column, p / sums[row]
    rest = torch.zeros(samples)
    return Rows(torch.from_numpy(columns), torch.from_numpy(probabilities), rest, samples)


def read_features(path: Path, split: str, samples: int, keys: Callable[[], Sequence[str]]) -> Tensor:
    """Features of every sample of a split, (n, f) float32 in the order of ids.

    Args:
        split, samples: its name and n.
        keys: as for `read_rows`.

    Raises:
        DataError: naming the file: not such a file, features of other samples, not finite.
    """
    if path.suffix != ".npz":
        raise DataError(f"field.features={path} must be a .npz file, as `rkdo embed --out features.npz` writes it")
    with _opened(path) as file:
        name = next((x for x in ("features", "embeddings") if x in file.files), None)
        if name is None:
            raise DataError(f"{path} has neither features nor embeddings, but {', '.join(file.files) or 'nothing'}")
        found = _numbers(path, name, _array(path, file, name))
        given = _array(path, file, "keys") if "keys" in file.files else None
        splits = _array(path, file, "splits") if "splits" in file.files else None
    if found.ndim != 2:
        raise DataError(f"{path}: {name} must be a matrix with a row for each sample, got the shape {found.shape}")
    if given is None:
        if len(found) != samples:
            raise DataError(
                f"{path} has {len(found)} rows and no keys, but split {split!r} has {samples} samples: "
                "embed this data set with `rkdo embed`"
            )
    else:
        if len(given) != len(found):
            raise DataError(f"{path}: keys and {name} must be equally long, got {len(given)} and {len(found)}")
        use = np.arange(len(given)) if splits is None else np.flatnonzero(splits == split)
        place = {str(given[k]): k for k in use}
        wanted = keys()
        missing = [key for key in wanted if key not in place]
        if missing:
            raise DataError(
                f"{path} has no features for {len(missing)} of the {samples} samples of split {split!r} "
                f"(first {missing[0]!r}): embed this data set with `rkdo embed`"
            )
        found = found[[place[key] for key in wanted]]
    broken = np.flatnonzero(~np.isfinite(found).all(1))
    if len(broken):
        raise DataError(f"{path}: {name} must be finite, but those of sample {broken[0]} are not ({len(broken)} rows)")
    return torch.from_numpy(found.astype(np.float32))


def _columns(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    if path.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(f"reading {path} needs pyarrow: pip install 'rkdo_dist[parquet]'; or use a .npz") from None
        try:
            table = pyarrow.parquet.read_table(path)
            missing = [name for name in names if name not in table.column_names]
            if not missing:
                return [np.asarray(table[name].to_pylist()) for name in names]
        except (OSError, pyarrow.ArrowException) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
            raise DataError(f"{path} cannot be read as a .parquet file: {reason}") from error
    elif path.suffix == ".npz":
        with _opened(path) as file:
            missing = [name for name in names if name not in file.files]
            if not missing:
                return [_array(path, file, name) for name in names]
    else:
        raise DataError(f"{path} must be a .npz or a .parquet file with {', '.join(names)}")
    raise DataError(f"{path} has no {missing[0]}: rows are given by the columns {', '.join(names)}")


def _opened(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"{path} cannot be read as a .npz file: {reason}") from error


def _array(path: Path, file: Any, name: str) -> np.ndarray:
    try:
        found: np.ndarray = file[name]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {name} cannot be read: {error}") from error
    return found


def _numbers(path: Path, name: str, found: np.ndarray) -> np.ndarray:
    if found.dtype.kind not in "fiu":
        raise DataError(f"{path}: {name} must be numbers, got {found.dtype}")
    return found.astype(np.float64) if name == "p" else found


def _positions(path: Path, name: str, found: np.ndarray, samples: int, known: dict[str, int]) -> np.ndarray:
    """Positions of samples that are named by key or by position."""
    if found.dtype.kind == "U":
        unknown = [key for key in found.tolist() if key not in known]
        if unknown:
            raise DataError(
                f"{path}: {name} {unknown[0]!r} is not the key of a sample of the split ({len(unknown)} are not)"
            )
        return np.array([known[key] for key in found.tolist()], dtype=np.int64)
    if found.dtype.kind not in "iu":
        raise DataError(f"{path}: {name} must be keys or positions, got {found.dtype}")
    outside = found[(found < 0) | (found >= samples)]
    if len(outside):
        raise DataError(f"{path}: {name} {outside[0]} is not one of the {samples} samples of the split (0 ... n - 1)")
    return found.astype(np.int64)
