"""The manifest of a checkpoint: length and SHA-256 of every file, and of itself."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from pathlib import Path
from typing import Any

from rkdo_dist import documents
from rkdo_dist.files import read_regular, sha256_of

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
MODEL, OPTIMIZER, PARTS = "model.safetensors", "optimizer.safetensors", "parts"
Facts = dict[str, dict[str, Any]]  # of files: "bytes" and "sha256"
_LONGEST = 1 << 26  # bytes; a longer manifest is not parsed
_FILE = documents.shape(bytes=documents.COUNT, sha256=documents.TEXT)
_FORM = documents.shape(format=documents.COUNT, step=documents.COUNT, files=documents.object_of(_FILE))


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names it and says what to do."""


def manifest_of(root: Path, step: int, known: Facts | None = None) -> bytes:
    """The manifest for the files in `root`, of which it reads every byte but of those that are `known`.

    Raises:
        OSError: if one cannot be read.
    """
    paths = [p for p in root.rglob("*.safetensors") if not p.name.startswith(".")] + [root / STATE]
    names, found = [p.relative_to(root).as_posix() for p in sorted(paths)], dict(known or {})
    for name in names:
        if name not in found:
            found |= facts_of(root, name)
    return _signed({"format": FORMAT, "step": step, "files": {name: found[name] for name in names}})


def facts_of(root: Path, name: str) -> Facts:
    """Length and SHA-256 of a file, by its name below `root`."""
    return {name: {"bytes": (root / name).stat().st_size, "sha256": sha256_of(root / name)}}


def to_json(value: Any) -> bytes:
    """JSON in the form of all files of a checkpoint; floats are restored bit by bit."""
    return (json.dumps(value, indent=1) + "\n").encode()


def _signed(manifest: dict[str, Any]) -> bytes:
    """The manifest's bytes, with the digest of all the rest at its end."""
    return to_json({**manifest, "sha256": hashlib.sha256(to_json(manifest)).hexdigest()})


def verify(root: Path, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """The manifest of a checkpoint, after verifying the length of every file, and the SHA-256 of a share of them.

    Raises:
        CheckpointError: if a file is missing or has changed, naming it.
    """
    manifest = read_manifest(root)
    for number, (name, facts) in enumerate(manifest["files"].items()):
        if not _as_long_as(root / name, facts["bytes"]):
            raise CheckpointError(f"the checkpoint {root} is damaged: {name} is missing or has the wrong length")
        if number % shares != share:
            continue
        try:
            digest = sha256_of(root / name)
        except OSError as error:
            raise CheckpointError(f"the checkpoint {root} cannot be read: {name}: {error.strerror}") from error
        if digest != facts["sha256"]:
            raise CheckpointError(
                f"the checkpoint {root} is damaged: {name} has changed since it was written (SHA-256)"
            )
    return manifest


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest, after verifying its own digest.

    Raises:
        CheckpointError: if it is missing, has changed, or is of another version.
    """
    try:
        content = read_regular(root / MANIFEST, _LONGEST)
        manifest = json.loads(content)
        digest = manifest.pop("sha256")
        whole = _signed(manifest) == content and len(digest) == 64
        files = manifest["files"]
        safe = (
            not _FORM(manifest, "")
            and {MODEL, STATE} <= set(files)
            and all(
                re.fullmatch(rf"({PARTS}/)?[\w-][\w.-]*", name) and set(facts) == {"bytes", "sha256"}
                for name, facts in files.items()
            )
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"the checkpoint {root} is incomplete: it has no {MANIFEST}") from error
    except OSError as error:
        raise CheckpointError(f"the checkpoint {root} cannot be read: {MANIFEST}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = safe = False
    if not whole or not safe:
        raise CheckpointError(f"the checkpoint {root} is damaged: {MANIFEST} is not as it was written")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{root / MANIFEST} has format {manifest['format']}; this version reads {FORMAT}")
    return manifest


def plausible(root: Path) -> bool:
    """Whether a checkpoint has its manifest and files of the right lengths, without reading them."""
    try:
        manifest = read_manifest(root)
    except CheckpointError:
        return False
    return all(_as_long_as(root / name, facts["bytes"]) for name, facts in manifest["files"].items())


def _as_long_as(path: Path, length: int) -> bool:
    """Whether `path` is a regular file (not a link or device) of `length` bytes."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == length
