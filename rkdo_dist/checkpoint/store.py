"""A directory of checkpoints: written whole or not at all, verified when read."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rkdo_dist import documents
from rkdo_dist.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    PARTS,
    STATE,
    CheckpointError,
    Facts,
    facts_of,
    manifest_of,
    plausible,
    read_manifest,
    to_json,
    verify,
)
from rkdo_dist.checkpoint.optimizer import OptimizerState
from rkdo_dist.exchange import group
from rkdo_dist.files import TEMPORARY, sync_directory, sync_file, write_atomic, write_synced

LATEST = "latest"
AVERAGE = "average"  # the part that holds the moving average of the weights (train.ema)
_SET_ASIDE = ".replaced"  # suffix of a checkpoint while another of the same step replaces it
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


_STATE = documents.shape(
    format=documents.COUNT, step=documents.COUNT, extra=documents.OBJECT,
    optimizer=documents.maybe(documents.shape(groups=documents.LIST, scalars=documents.OBJECT)),
)  # fmt: skip


class CheckpointWarning(UserWarning):
    """An older checkpoint than the newest is used, or an old one could not be removed."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its directory.
        step: its step.
        model: parameters and buffers by name, on the CPU.
        optimizer: for `tensors_to_optimizer`; None if none was saved.
        extra: what the caller added.
        parts: names of the parts, for `part`.
    """

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: OptimizerState | None
    extra: dict[str, Any]
    parts: tuple[str, ...]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of a part, on the CPU (read now; the checksum was verified when the checkpoint was
        loaded).

        Raises:
            CheckpointError: if there is no such part.
        """
        if name not in self.parts:
            raise CheckpointError(f"{self.path} has no part {name!r}, only {', '.join(self.parts) or 'none'}")
        return _read_tensors(self.path / PARTS / f"{name}.safetensors")

    def weights(self, which: str) -> dict[str, Tensor]:
        """Parameters and buffers by name: "trained", or "ema" for their moving average.

        Raises:
            CheckpointError: if the run keeps no average.
        """
        if which == "ema" and AVERAGE not in self.parts:
            raise CheckpointError(f"{self.path} holds no average of the weights: it was trained without train.ema")
        return self.part(AVERAGE) if which == "ema" else self.model


class Kept(Protocol):
    """What is kept from step to step beside weights and optimizer, in parts of every checkpoint."""

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the parts that this rank writes, by the part's name (collective)."""

    def restore(self, found: Checkpoint) -> None:
        """Continue with what a checkpoint holds, whatever the number of ranks that wrote it.

        Raises:
            ValueError: if it has none, or it does not fit.
        """


# -- writing -----------------------------------------------------------------------------------------------------------


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

    On one rank. Where several ranks write, call `begin` on one, `write_parts` on the owners, and after a
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
    if keep < 1:
        raise ValueError(f"at least one checkpoint must be kept, got keep={keep}")
    building = begin(directory, step)
    return commit(building, model, optimizer, extra, keep, write_parts(building, parts or {}))


def begin(directory: str | os.PathLike[str], step: int) -> Path:
    """Remove the remains of an interrupted save and make the temporary directory of a new one; see `save`.

    Returns:
        The temporary directory, for `write_parts` and `commit`.

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
            replaced = entry.name.endswith(_SET_ASIDE) and (root / entry.name.removesuffix(_SET_ASIDE)).is_dir()
            if left or replaced:
                _remove(entry)
        building.mkdir()
        (building / PARTS).mkdir()
    return building


def write_parts(building: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> Facts:
    """Write parts of a checkpoint that `begin` has begun, flushed to the disk; on their owner.

    Args:
        building: from `begin`.
        parts: tensors, on any device, by the part's global name, the same whatever the world size; letters, digits,
            `_`, `.`, `-`.

    Returns:
        Their lines of the manifest, for `commit`, which need not read the files then.

    Raises:
        CheckpointError: if one cannot be written.
        ValueError: for an impossible name.
    """
    facts: Facts = {}
    for name, tensors in parts.items():
        if not _PART.fullmatch(name):
            raise ValueError(f"a part's name has letters, digits, '_', '.' and '-' only, got {name!r}")
        with _explained(building, "written"):
            _write_tensors(building / PARTS / f"{name}.safetensors", tensors)
            facts |= facts_of(building, f"{PARTS}/{name}.safetensors")
    return facts


def commit(
    building: Path,
    model: Mapping[str, Tensor],
    optimizer: OptimizerState | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
    known: Facts | None = None,
) -> Path:
    """Complete the checkpoint that `begin` has begun, after all parts are written; arguments as `save`.

    Args:
        known: from `write_parts`, of any parts.
    """
    root, step = building.parent, int(building.name[1:].removesuffix(TEMPORARY))
    with _explained(building, "written"):
        _write_tensors(building / MODEL, model)
        if optimizer is not None:
            _write_tensors(building / OPTIMIZER, optimizer.tensors)
        state = {"format": FORMAT, "step": step, "extra": dict(extra or {})}
        state["optimizer"] = None if optimizer is None else {"groups": optimizer.groups, "scalars": optimizer.scalars}
        write_synced(building / STATE, to_json(state))
        sync_directory(building / PARTS)
        write_synced(building / MANIFEST, manifest_of(building, step, known))
        sync_directory(building)
        final = _put_in_place(building, root / str(step))
        sync_directory(root)
        write_atomic(root / LATEST, f"{step}\n")
    _prune(root, step, keep)
    return final


def _put_in_place(building: Path, final: Path) -> Path:
    """Rename; a checkpoint of the same step is kept if it is whole and equal, and otherwise replaced.

    A directory cannot be replaced in one operation: the old one is set aside first, where `load_latest`
    finds it.
    """
    aside = final.with_name(final.name + _SET_ASIDE)
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
    older = sorted((s for s in _steps_in(root) if s < step), reverse=True)
    whole = [s for s in older if plausible(root / str(s))]
    for s in set(older) - set(whole[: keep - 1]):
        try:
            _remove(root / str(s))
            _remove(root / f"{s}{_SET_ASIDE}")
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
    path.chmod(stat.S_IMODE(path.parent.stat().st_mode) & 0o666)  # as readable as its directory; 0600 otherwise
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


# -- reading -----------------------------------------------------------------------------------------------------------


def load_latest(directory: str | os.PathLike[str], together: bool = False) -> Checkpoint | None:
    """The newest complete checkpoint: the one that `latest` names, or else the newest complete one before it.

    If it is not the one that `latest` names, a `CheckpointWarning` gives the reason.

    Args:
        directory: the `checkpoints` directory; it need not exist.
        together: see `load`.

    Returns:
        None if there is no checkpoint at all; the remains of an interrupted first save do not count.

    Raises:
        CheckpointError: if there are checkpoints and none is complete.
    """
    root = Path(directory)
    names, complaints = _candidates(root)
    if together:
        names, complaints = group.from_rank_zero((names, complaints))
    for name in names:
        try:
            found = load(root / name, together)
            if found.step != int(name.removesuffix(_SET_ASIDE)):
                raise CheckpointError(f"the checkpoint {root / name} is of step {found.step}")
        except (CheckpointError, group.RankError) as error:
            complaints.append(str(error))
            continue
        if complaints:
            warnings.warn(f"{'; '.join(complaints)}. Using {root / name}", CheckpointWarning, stacklevel=2)
        return found
    if not names:
        return None
    raise CheckpointError(
        f"no checkpoint in {root} is complete: {'; '.join(complaints)}. Restore one, or remove them to start over"
    )


def _candidates(root: Path) -> tuple[list[str], list[str]]:
    """Names of the directories to try, the one that `latest` names first; and what is wrong with that."""
    steps = sorted(_steps_in(root), reverse=True) if root.is_dir() else []
    if not steps:
        return [], []
    named, complaints = _pointer(root)
    if named is None or named not in steps:
        if named is not None:
            complaints.append(f"{root / LATEST} names step {named}, which is not there")
        order = steps
    else:
        newer = [s for s in steps if s > named]
        if newer:
            complaints.append(f"{root / LATEST} names step {named}, though there are newer: {newer[::-1]}")
        order = [named, *(s for s in steps if s < named), *newer]
    names = [name for step in order for name in (str(step), f"{step}{_SET_ASIDE}")]
    return [name for name in names if (root / name).is_dir()], complaints


def load(path: str | os.PathLike[str], together: bool = False) -> Checkpoint:
    """Read a checkpoint's directory, after verifying the checksum of every file.

    Args:
        together: by all ranks (collective): the ranks of a node hash a share of its files each, and all get one verdict
            (`RankError` with several ranks).

    Raises:
        CheckpointError: if it is missing, incomplete or damaged, naming the file.
    """
    root = Path(path)
    if not together:
        return _read(root, verify(root))
    manifest = group.together(lambda: verify(root, *group.on_node()), f"verifying {root}")
    return group.together(lambda: _read(root, manifest), f"reading {root}")


def _read(root: Path, manifest: dict[str, Any]) -> Checkpoint:
    try:
        state = documents.read(root / STATE, _STATE, "put it back", newest=FORMAT)
        model, plain, optimizer = _read_tensors(root / MODEL), state["optimizer"], None
        if state["step"] != manifest["step"] or (plain is None and OPTIMIZER in manifest["files"]):
            raise CheckpointError(f"the checkpoint {root} is damaged: {STATE} is another checkpoint's")
        if OPTIMIZER in manifest["files"]:
            optimizer = OptimizerState(_read_tensors(root / OPTIMIZER), plain["groups"], plain["scalars"])
        parts = tuple(Path(n).name.removesuffix(".safetensors") for n in manifest["files"] if n.startswith(f"{PARTS}/"))
        return Checkpoint(root, manifest["step"], model, optimizer, state["extra"], parts)
    except (OSError, ValueError, SafetensorError) as error:
        named = isinstance(error, CheckpointError | documents.DamagedError)
        raise CheckpointError(str(error) if named else f"the checkpoint {root} cannot be read: {error}") from error


def model_digest(directory: str | os.PathLike[str], step: int, which: str = "trained") -> str | None:
    """SHA-256 (hex) of the weights of a step's checkpoint, as its manifest has it; None if there is no checkpoint.

    Args:
        which: "trained", or "ema" for their moving average.
    """
    file = f"{PARTS}/{AVERAGE}.safetensors" if which == "ema" else MODEL
    for name in (str(step), f"{step}{_SET_ASIDE}"):
        try:
            return read_manifest(Path(directory) / name)["files"][file]["sha256"]
        except (CheckpointError, KeyError):
            continue
    return None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors, copied: the library maps the file, which may be pruned while they live."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _steps_in(root: Path) -> set[int]:
    """The steps that have a checkpoint, whole or not, in place or set aside."""
    names = (entry.name.removesuffix(_SET_ASIDE) for entry in root.iterdir() if entry.is_dir())
    return {int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", name)}


def _pointer(root: Path) -> tuple[int | None, list[str]]:
    """The step that `latest` names, or None and why not."""
    try:
        with open(root / LATEST, "rb") as file:
            text = file.read(32)
    except OSError as error:
        return None, [f"{root / LATEST} cannot be read: {error.strerror}"]
    if not re.fullmatch(rb"(0|[1-9][0-9]{0,17})\n", text):
        return None, [f"{root / LATEST} is damaged"]
    return int(text), []
