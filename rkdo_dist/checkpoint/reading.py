"""Reading of checkpoints: verified; if the newest is damaged, the newest one that is complete."""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rkdo_dist.checkpoint.manifest import MODEL, OPTIMIZER, PARTS, STATE, CheckpointError, read_manifest, verify
from rkdo_dist.checkpoint.optimizer import OptimizerState

LATEST = "latest"
SET_ASIDE = ".replaced"  # suffix of a checkpoint while another of the same step replaces it


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


def load_latest(directory: str | os.PathLike[str]) -> Checkpoint | None:
    """The newest complete checkpoint: the one that `latest` names, or else the newest complete one before it.

    If it is not the one that `latest` names, a `CheckpointWarning` gives the reason.

    Args:
        directory: the `checkpoints` directory; it need not exist.

    Returns:
        None if there is no checkpoint at all; the remains of an interrupted first save do not count.

    Raises:
        CheckpointError: if there are checkpoints and none is complete.
    """
    root = Path(directory)
    steps = sorted(steps_in(root), reverse=True) if root.is_dir() else []
    if not steps:
        return None
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
    for step in order:
        for path in (root / str(step), root / f"{step}{SET_ASIDE}"):
            if not path.is_dir():
                continue
            try:
                found = load(path)
                if found.step != step:
                    raise CheckpointError(f"the checkpoint {path} is of step {found.step}")
            except CheckpointError as error:
                complaints.append(str(error))
                continue
            if complaints:
                warnings.warn(f"{'; '.join(complaints)}. Using {path}", CheckpointWarning, stacklevel=2)
            return found
    raise CheckpointError(
        f"no checkpoint in {root} is complete: {'; '.join(complaints)}. Restore one, or remove them to start over"
    )


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint's directory, after verifying the checksum of every file.

    Raises:
        CheckpointError: if it is missing, incomplete or damaged, naming the file.
    """
    root = Path(path)
    manifest = verify(root)
    try:
        state = json.loads((root / STATE).read_bytes())
        model = _read_tensors(root / MODEL)
        optimizer = None
        if OPTIMIZER in manifest["files"]:
            optimizer = OptimizerState(_read_tensors(root / OPTIMIZER), **state["optimizer"])
        parts = tuple(Path(n).name.removesuffix(".safetensors") for n in manifest["files"] if n.startswith(f"{PARTS}/"))
        return Checkpoint(root, manifest["step"], model, optimizer, state["extra"], parts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint {root} cannot be read: {type(error).__name__}: {error}") from error


def model_digest(directory: str | os.PathLike[str], step: int) -> str | None:
    """SHA-256 (hex) of the weights of a step's checkpoint, as its manifest has it; None if there is no checkpoint."""
    for name in (str(step), f"{step}{SET_ASIDE}"):
        try:
            return read_manifest(Path(directory) / name)["files"][MODEL]["sha256"]
        except CheckpointError:
            continue
    return None


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors, copied: the library maps the file, which may be pruned while they live."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def steps_in(root: Path) -> set[int]:
    """The steps that have a checkpoint, whole or not, in place or set aside."""
    names = (entry.name.removesuffix(SET_ASIDE) for entry in root.iterdir() if entry.is_dir())
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
