"""Index of a set of shards: tar files, sample counts, checksums, classes.

`index.json` is beside the shards and is the only description of them that is trusted; a reader checks every
shard against it before using a sample. It is plain JSON and is checked strictly: nothing in it can make a
reader open a file outside its directory, start a program, or, unless that is allowed, fetch anything.

Checksums of single samples, which only say where a damaged shard is damaged, are in it too; where they are long, they
are in `index.checks` beside it, eight bytes a sample, which is read when there is damage to locate.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rkdo_dist.data.errors import DataError
from rkdo_dist.data.remote import Address, default_cache, fetch, is_url, read_all
from rkdo_dist.files import TEMPORARY, read_regular, sync_file, write_atomic

INDEX_NAME = "index.json"
Progress = Callable[[int, int, str], None]  # done, of how many, what is being done now
FORMAT, VERSION = "rkdo-shards", 1
_MAX_INDEX_BYTES = 256 << 20
_MAX_INLINE = 32 << 20  # characters of checksums in the index itself: three million samples
_SIDE = ".checks"  # suffix of the file of the others
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ChecksAt:
    """Checksums of a shard's samples in the side file of an index.

    Attributes:
        path: the file; None: out of reach.
        offset, length: bytes of the shard's.
    """

    path: Path | None
    offset: int
    length: int

    def read(self) -> str:
        """As in an index: base64; "" if they cannot be read."""
        try:
            if self.path is not None:
                with open(self.path, "rb") as file:
                    file.seek(self.offset)
                    return base64.b64encode(file.read(self.length)).decode()
        except OSError:
            pass
        return ""


class OpenSamples(Protocol):
    """Samples that can be read by their position; `keys` has one for each."""

    name: str

    @property
    def keys(self) -> Sequence[str]: ...

    def pixels(self, position: int, size: int | None) -> np.ndarray:
        """uint8 (3, H, W), see `images.decode`; verified."""

    def label(self, position: int) -> bytes | None:
        """The class number as text, None without one."""

    def where(self, position: int) -> str:
        """Name of a sample in errors."""

    def check_unchanged(self) -> None:
        """Raises DataError if somebody has written to the samples since they were opened."""

    def close(self) -> None:
        """Close what is open."""


class Content(Protocol):
    """Samples that do not come from a tar file."""

    def open(self, name: str) -> OpenSamples:
        """Ready for reading."""


@dataclass(frozen=True)
class Shard:
    """One tar file of WebDataset samples, or as many samples of another source.

    Attributes:
        name: file name relative to the index.
        samples: how many samples it holds.
        sha256: of the whole file, 64 hexadecimal digits.
        bytes: length of the file.
        checks: checksums of its samples, by which damage is located (`archive.checksums`), or where they are; "" if
            there are none.
        content: where the samples are if they are in no tar file (`folder`, `datasets`); `sha256` then describes them.
    """

    name: str
    samples: int
    sha256: str
    bytes: int
    checks: str | ChecksAt = ""
    content: Content | None = field(default=None, repr=False, compare=False)

    def tree(self) -> dict[str, Any]:
        """As it is stored."""
        found = {name: value for name, value in vars(self).items() if name not in ("content", "checks")}
        if isinstance(self.checks, ChecksAt):
            return {**found, "checks_bytes": self.checks.length}
        return {**found, "checks": self.checks}


@dataclass(frozen=True)
class Split:
    """A named list of shards; a sample's id is its position in their concatenation."""

    name: str
    shards: tuple[Shard, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples in each shard."""
        return tuple(shard.samples for shard in self.shards)

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(self.counts)


@dataclass(frozen=True)
class ShardIndex:
    """A directory of shards.

    Attributes:
        root: the directory that shard names are relative to; the cache if they lie elsewhere.
        splits: by name ("train", "test", "unlabeled", ...).
        classes: class names; a sample's label is a position in it. Empty when there are no labels.
        image_size: (height, width) of every image, or None when it varies.
        source, identity, seed, shard_size: what the shards were made from and how.
        address: of the index, if the shards lie elsewhere (see `remote`); None: they are files below `root`.
        notes: what a user should know of the source before training on it.
        title: what messages call the source, if it is not a directory.
        verified: directory of this job on this node, where its processes note which shards they have verified; None:
            each process verifies for itself.
    """

    root: Path
    splits: Mapping[str, Split]
    classes: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    source: str = ""
    identity: str = ""
    seed: int | None = None
    shard_size: int | None = None
    address: Address | None = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)
    title: str = field(default="", repr=False, compare=False)
    verified: Path | None = field(default=None, repr=False, compare=False)

    @property
    def place(self) -> str:
        """Location of the shards, for messages."""
        if self.title:
            return self.title
        return str(self.root) if self.address is None else self.address.shown

    def file_of(self, shard: Shard) -> Path:
        """The local file of a shard, fetched into the cache first if it lies elsewhere.

        Raises:
            DataError: if it cannot be fetched.
        """
        if self.address is None:
            return self.root / shard.name
        return fetch(self.address.beside(shard.name), shard.sha256, shard.bytes, self.root)

    def name_of(self, shard: Shard) -> str:
        """Name of a shard in messages."""
        if shard.content is not None:
            return f"{self.place} ({shard.name})"
        return str(self.root / shard.name) if self.address is None else self.address.beside(shard.name).shown

    def split(self, name: str) -> Split:
        """The split called `name`.

        Raises:
            DataError: if there is none, naming those there are.
        """
        if name not in self.splits:
            raise DataError(f"{self.place} has no split {name!r}; it has {', '.join(self.splits) or 'none'}")
        return self.splits[name]

    def digest(self) -> str:
        """SHA-256 over the content that a run depends on (not over where it lies)."""
        return hashlib.sha256(json.dumps(to_tree(replace(self, address=None)), sort_keys=True).encode()).hexdigest()


def to_tree(index: ShardIndex) -> dict[str, Any]:
    """The index as the JSON object that is stored; no secret part of an address gets into it."""
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "source": index.source,
        "identity": index.identity,
        "seed": index.seed,
        "shard_size": index.shard_size,
        "image_size": list(index.image_size) if index.image_size else None,
        "classes": list(index.classes),
        "splits": {name: [s.tree() for s in split.shards] for name, split in index.splits.items()},
    }
    return tree if index.address is None else {**tree, "base": index.address.base}


def save_index(index: ShardIndex, path: str | os.PathLike[str] | None = None) -> Path:
    """Write the index atomically to `path` (default: index.json in its root); returns the path."""
    target = Path(path) if path is not None else index.root / INDEX_NAME
    checks = [shard.checks for split in index.splits.values() for shard in split.shards]
    if sum(_MAX_INLINE + 1 if isinstance(c, ChecksAt) else len(c) for c in checks) > _MAX_INLINE:
        index = _with_checks_apart(index, target.with_suffix(_SIDE))
    write_atomic(target, json.dumps(to_tree(index), indent=1) + "\n")
    return target


def _with_checks_apart(index: ShardIndex, target: Path) -> ShardIndex:
    """The index with the checksums of samples in a file of their own, which is written."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY}")
    splits: dict[str, Split] = {}
    try:
        with open(temporary, "xb") as file:
            for split in index.splits.values():
                shards = []
                for shard in split.shards:
                    text = shard.checks.read() if isinstance(shard.checks, ChecksAt) else shard.checks
                    offset = file.tell()
                    file.write(base64.b64decode(text))
                    shards.append(replace(shard, checks=ChecksAt(target, offset, file.tell() - offset)))
                splits[split.name] = Split(split.name, tuple(shards))
        sync_file(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return replace(index, splits=splits)


def load_index(path: str | os.PathLike[str], *, allow_remote: bool = False) -> ShardIndex:
    """Read and check an index.

    Args:
        path: a directory with index.json in it, or that file, or the http(s) or object-store URL of
            either: then the shards lie beside it, and are fetched as they are needed into the cache
                (`remote.default_cache`).
        allow_remote: follow a local index to shards that it says lie elsewhere.

    Raises:
        DataError: no such directory, no index in it, not an index, or an invalid value; the message names
            the file and what to do.
    """
    if is_url(path):
        address = Address(str(path))
        if not address.shown.endswith(".json"):
            address = address.below(INDEX_NAME)
        tree = _parse(read_all(address, _MAX_INDEX_BYTES), address.shown)
        return _checked(tree, address.shown, default_cache(), address)
    given = Path(path)
    target = given / INDEX_NAME if given.is_dir() else given
    tree = _parse(_read(given, target), str(target))
    base = tree.get("base") if isinstance(tree, dict) else None
    if base is None:
        return _checked(tree, str(target), target.parent, None)
    if not isinstance(base, str):
        raise DataError(f'{target}: "base" must be a URL, got {base!r}')
    address = Address(base).below(INDEX_NAME)
    if not allow_remote:
        raise DataError(
            f"the shards of {target} lie at {address.shown.removesuffix(INDEX_NAME)}: they are fetched only where that "
            "is allowed expressly"
        )
    return _checked(tree, str(target), default_cache(), address)


def _read(given: Path, target: Path) -> bytes:
    if not given.exists():
        raise DataError(f"there is no shard directory {given}; make one with `rkdo prepare SOURCE --out {given}`")
    try:
        return read_regular(target, _MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise DataError(
            f"{given} holds no {INDEX_NAME}: either it is not a shard directory or its preparation was not "
            f"finished; run `rkdo prepare SOURCE --out {given}`"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {target}: {error.strerror or error}") from error


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is not valid JSON; prepare the shards again with --force") from None


def _checked(tree: Any, where: str, root: Path, address: Address | None) -> ShardIndex:
    try:
        side = None if address is not None else Path(where).with_suffix(_SIDE)
        return replace(_from_tree(tree, root, side), address=address)
    except _Bad as error:
        raise DataError(f"{where}: {error}") from None


class _Bad(Exception):
    """An invalid value in an index."""


def _from_tree(tree: Any, root: Path, side: Path | None) -> ShardIndex:
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise _Bad(f'not a shard index (expected an object with "format": "{FORMAT}")')
    if tree.get("version") != VERSION:
        raise _Bad(f"version {tree.get('version')!r} is not supported (this program reads version {VERSION})")
    classes = tree.get("classes")
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise _Bad('"classes" must be a list of names')
    size = tree.get("image_size")
    if size is not None and not (isinstance(size, list) and len(size) == 2 and all(_is_count(v) and v for v in size)):
        raise _Bad(f'"image_size" must be null or [height, width], got {size!r}')
    splits = tree.get("splits")
    if not isinstance(splits, dict) or not splits:
        raise _Bad('"splits" must be an object with at least one split')
    built, offset = {}, 0
    for name, shards in splits.items():
        if not isinstance(shards, list) or not shards:
            raise _Bad(f"split {name!r} has no shards")
        found = []
        for k, entry in enumerate(shards):
            found.append(_shard(entry, f"shard {k} of split {name!r}", side, offset))
            checks = found[-1].checks
            offset += checks.length if isinstance(checks, ChecksAt) else 0
        built[name] = Split(name, tuple(found))
        if not built[name].samples:
            raise _Bad(f"split {name!r} has no samples")
        bad = next((k for k, shard in enumerate(found) if not _fits(shard.checks, shard.samples)), None)
        if bad is not None:
            raise _Bad(f'shard {bad} of split {name!r}: "checks" must be base64 of eight bytes a sample, or ""')
    names = [shard.name for split in built.values() for shard in split.shards]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise _Bad(f"shard {twice!r} is listed twice")
    seed, shard_size = tree.get("seed"), tree.get("shard_size")
    return ShardIndex(
        root=root,
        splits=built,
        classes=tuple(classes),
        image_size=(size[0], size[1]) if size else None,
        source=str(tree.get("source", "")),
        identity=str(tree.get("identity", "")),
        seed=seed if isinstance(seed, int) else None,
        shard_size=shard_size if isinstance(shard_size, int) else None,
    )


def _shard(entry: Any, where: str, side: Path | None, offset: int) -> Shard:
    if not isinstance(entry, dict):
        raise _Bad(f"{where} must be an object, got {entry!r}")
    name, digest = entry.get("name"), entry.get("sha256")
    check_name(name, where)
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise _Bad(f'{where}: "sha256" must be 64 hexadecimal digits, got {digest!r}')
    for number in ("samples", "bytes"):
        if not _is_count(entry.get(number)):
            raise _Bad(f'{where}: "{number}" must be a whole number >= 0, got {entry.get(number)!r}')
    checks = entry.get("checks", "")
    if not isinstance(checks, str):
        raise _Bad(f'{where}: "checks" must be text, got {checks!r}')
    if "checks_bytes" in entry:
        if not _is_count(entry["checks_bytes"]):
            raise _Bad(f'{where}: "checks_bytes" must be a whole number >= 0, got {entry["checks_bytes"]!r}')
        return Shard(str(name), entry["samples"], digest, entry["bytes"], ChecksAt(side, offset, entry["checks_bytes"]))
    return Shard(str(name), entry["samples"], digest, entry["bytes"], checks)


def _fits(checks: str | ChecksAt, samples: int) -> bool:
    """Whether these may be checksums of so many samples; those in a file of their own are not read here."""
    try:
        return not checks or isinstance(checks, ChecksAt) or len(base64.b64decode(checks, validate=True)) == 8 * samples
    except ValueError:
        return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def check_name(name: Any, where: str) -> None:
    """Refuse shard names that could lead anywhere but to a file below the index."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise _Bad(f"{where}: {name!r} is not a file name")
    if ":" in name:
        raise _Bad(f"{where}: {name[:64]!r}: no scheme or colon is allowed; shards are files beside their index")
    if name.startswith("/") or ".." in name.split("/"):
        raise _Bad(f"{where}: {name!r} leads out of the directory of the index")
