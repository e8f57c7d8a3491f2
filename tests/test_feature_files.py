"""Files of features that anybody may have written: what is odd in them is refused by the file's name, or understood."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rkdo_dist.frozen.features import read_features

X = np.arange(12, dtype=np.float32).reshape(4, 3)


def npz(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **({"features": X} | arrays))
    return path


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"classes": np.array("a")}, "classes must be a list of names"),
        ({"keys": np.array(["\ud800"] * 4)}, "keys must be a list of names"),
        ({"splits": np.zeros((4, 1))}, "splits must be a list of names"),
        ({"labels": np.array([0, 1, 2, 10**12])}, "labels must be below 16,777,216, got 1000000000000"),
        ({"labels": np.array([0, 1, 2, 2**63], dtype=np.uint64)}, "labels must be below 16,777,216"),
        ({"features": X.astype(np.float64) * 1e300}, "features must be finite, but row 0 is not"),
        ({"features": np.zeros((4, 3), [("a", "f4")])}, "features must be numbers"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_arrays(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_features(npz(tmp_path / "f.npz", arrays))
    assert str(tmp_path / "f.npz") in str(caught.value)


def test_members_that_are_no_arrays(tmp_path: Path) -> None:
    path, array = tmp_path / "f.npz", io.BytesIO()
    np.save(array, X)
    for name, content, flag, words in (
        ("features", b"abc", 0, "'features' in it is no array"),
        ("features.npy", array.getvalue(), 1, "password"),
    ):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, content)
        raw = bytearray(path.read_bytes())
        raw[6] |= flag  # "encrypted", in the member's header and in the directory
        raw[raw.index(b"PK\x01\x02") + 8] |= flag
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=words):
            read_features(path)


def test_numbers_that_numpy_does_not_have(tmp_path: Path) -> None:
    path, x = tmp_path / "f.safetensors", torch.from_numpy(X)
    save_file({"features": x.bfloat16(), "beside": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    assert np.array_equal(read_features(path).values, X)
    for name, text in (("keys", "no JSON"), ("classes", "null"), ("keys", "[[1], [1, 2]]"), ("splits", '["\\ud800"]')):
        save_file({"features": x}, path, {name: text})
        with pytest.raises(ValueError, match=f"{path}: {name} must be"):
            read_features(path)


def test_an_idx_file_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"\0\0\x08\x03" + b"\0" * 12)
    with pytest.raises(ValueError, match=r"must be numbers \(n, f\)"):
        read_features(path)
