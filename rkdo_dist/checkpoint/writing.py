"""Writing of checkpoints: built under a temporary name, flushed, renamed; then `latest`; then old ones are removed."""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rkdo_dist.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    PARTS,
    STATE,
    CheckpointError,
    manifest_of,
    plausible,
    to_json,
    verify,
)
from rkdo_dist.checkpoint.optimizer import OptimizerState
from rkdo_dist.checkpoint.reading import LATEST, SET_ASIDE, CheckpointWarning, steps_in
from rkdo_dist.files import TEMPORARY, sync_directory, sync_file, write_atomic, write_synced

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def save(
    directory: str | os.PathLike[str],
    step: int,
    model: Mapping[str, Tensor],
    optimizer: OptimizerState | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
    parts: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write the checkpoint of a step, then point `latest` to it and remove all but the newest `keep`.

    On one rank. Where several ranks write, call `begin` on one, `write_part` on the owners, and after a
    barrier `commit` on the first again. If the step has a checkpoint already, an equal one is kept and
    another replaced.

    Args:
        directory: the `checkpoints` directory; made if missing.
        step: >= 0.
        model: parameters and buffers by global name, on any device.
        optimizer: from `optimizer_to_tensors`.
        extra: JSON-able.
        keep: how many to keep, >= 1.
        parts: tensors by the part's name (letters, digits, `_`, `.`, `-`).

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: if it cannot be written (no space, no permission); earlier checkpoints are
            untouched then.
        ValueError: for a bad argument.
    """
    _check_keep(keep)
    building = begin(directory, step)
    for name, tensors in (parts or {}).items():
        write_part(building, name, tensors)
    return commit(building, model, optimizer, extra, keep)


def begin(directory: str | os.PathLike[str], step: int) -> Path:
    """Remove the remains of an interrupted save and make the temporary directory of a new one; see `save`.

    Returns:
        The temporary directory, for `write_part` and `commit`.

    Raises:
        CheckpointError: if that is impossible.
    """
    if step < 0:
        raise ValueError(f"the step of a checkpoint must not be negative, got {step}")
    root = Path(directory)
    building = root / f".{step}{TEMPORARY}"
    with _explained(building, "begun"):
        root.mkdir(parents=True, exist_ok=True)
        sync_directory(root.parent)
        for entry in list(root.iterdir()):
            left = entry.name.startswith(".") and entry.name.endswith(TEMPORARY)
            replaced = entry.name.endswith(SET_ASIDE) and (root / entry.name.removesuffix(SET_ASIDE)).is_dir()
            if left or replaced:
                _remove(entry)
        building.mkdir()
        (building / PARTS).mkdir()
    return building


def write_part(building: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write one part of a checkpoint that `begin` has begun, flushed to the disk; on the part's owner.

    Args:
        building: from `begin`.
        name: a global name, the same whatever the world size; letters, digits, `_`, `.`, `-`.
        tensors: by name, on any device.

    Raises:
        CheckpointError: if it cannot be written.
        ValueError: for an impossible name.
    """
    if not _PART.fullmatch(name):
        raise ValueError(f"a part's name has letters, digits, '_', '.' and '-' only, got {name!r}")
    with _explained(building, "written"):
        _write_tensors(building / PARTS / f"{name}.safetensors", tensors)


def commit(
    building: Path,
    model: Mapping[str, Tensor],
    optimizer: OptimizerState | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Complete the checkpoint that `begin` has begun, after all parts are written; arguments as `save`."""
    _check_keep(keep)
    root, step = building.parent, int(building.name[1:].removesuffix(TEMPORARY))
    with _explained(building, "written"):
        _write_tensors(building / MODEL, model)
        if optimizer is not None:
            _write_tensors(building / OPTIMIZER, optimizer.tensors)
        state = {"format": FORMAT, "step": step, "extra": dict(extra or {})}
        state["optimizer"] = None if optimizer is None else {"groups": optimizer.groups, "scalars": optimizer.scalars}
        write_synced(building / STATE, to_json(state))
        sync_directory(building / PARTS)
        write_synced(building / MANIFEST, manifest_of(building, step))
        sync_directory(building)
        final = _put_in_place(building, root / str(step))
        sync_directory(root)
        write_atomic(root / LATEST, f"{step}\n")
    _prune(root, step, keep)
    return final


def _check_keep(keep: int) -> None:
    if keep < 1:
        raise ValueError(f"at least one checkpoint must be kept, got keep={keep}")


def _put_in_place(building: Path, final: Path) -> Path:
    """Rename; a checkpoint of the same step is kept if it is whole and equal, and otherwise replaced.

    A directory cannot be replaced in one operation: the old one is set aside first, where `load_latest`
    finds it.
    """
    aside = final.with_name(final.name + SET_ASIDE)
    if final.is_dir():
        try:
            equal = verify(final) == verify(building)
        except CheckpointError:
            equal = False
        if equal:
            _remove(building)
            return final
        _remove(aside)
        os.rename(final, aside)
    os.rename(building, final)
    _remove(aside)
    return final


def _prune(root: Path, step: int, keep: int) -> None:
    """Remove the oldest checkpoints below `step`, and those that are incomplete, which do not count."""
    older = sorted((s for s in steps_in(root) if s < step), reverse=True)
    whole = [s for s in older if plausible(root / str(s))]
    for s in set(older) - set(whole[: keep - 1]):
        try:
            _remove(root / str(s))
            _remove(root / f"{s}{SET_ASIDE}")
        except OSError as error:
            warnings.warn(f"cannot remove the old checkpoint {root / str(s)}: {error}", CheckpointWarning, stacklevel=4)


def _remove(path: Path) -> None:
    """Remove what is at `path`, a directory under a temporary name: no half of it must look like a checkpoint."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        doomed = path
        if not path.name.endswith(TEMPORARY):
            doomed = path.with_name(f".{path.name}.removed{TEMPORARY}")
            os.rename(path, doomed)
        shutil.rmtree(doomed)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write and flush. Tensors that share memory are written apart: each name has its own values."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; a checkpoint's {path.name} holds tensors only")
        value = tensor.detach().cpu().contiguous()
        if value.numel() and value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        plain[name] = value
    save_file(plain, path)
    sync_file(path)


@contextmanager
def _explained(building: Path, done: str) -> Iterator[None]:
    """Turn errors of the file system into a CheckpointError that says what to do, and leave nothing half-done."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))  # how the safetensors library reports them
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        shutil.rmtree(building, ignore_errors=True)
        advice = {
            errno.ENOSPC: "free some space on its disk or keep fewer checkpoints",
            errno.EDQUOT: "free some of your quota or keep fewer checkpoints",
            errno.EACCES: "make the directory writable",
            errno.EPERM: "make the directory writable",
            errno.EROFS: "choose a directory on a disk that is not read-only",
        }.get(number or 0, "check the disk")
        why = os.strerror(number) if number else str(error)
        step = building.name[1:].removesuffix(TEMPORARY)
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be {done} in {building.parent}: {why}; {advice}. "
            "Earlier checkpoints are untouched."
        ) from error
