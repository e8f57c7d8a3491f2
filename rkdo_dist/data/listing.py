"""Image files of a folder or of a tar of one, with split and class of each. No file is opened.

Rules, for a tree and for a tar alike (one folder around everything is taken off first; hidden names are left out):

- Folders `train`, `val`, `test`, `unlabeled` at the top are splits; what lies beside them is left out. Without any of
  them everything is the split `train`. `val` serves as `test` where there is no test.
- Folders inside a split are classes if every image of the labelled splits lies in one; a tree without splits has
  classes only if there are at least two such folders (torchvision's ImageFolder). Otherwise there are no labels.
- Files without an image's extension are not images: they are left out and counted.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rkdo_dist.data.errors import DataError
from rkdo_dist.data.images import EXTENSIONS

SPLITS = ("train", "val", "test", "unlabeled")
_IMAGE = tuple(f".{extension}" for extension in EXTENSIONS)


@dataclass(frozen=True)
class ImageFile:
    """An image: its name below the root, split, class (None without one), length, and its offset in a tar (or -1)."""

    name: str
    split: str
    label: str | None
    size: int
    offset: int


@dataclass(frozen=True)
class Listing:
    """The images of a folder or tar.

    Attributes:
        root: the folder or tar.
        files: sorted by name.
        classes: names in order; empty without labels.
        ignored: names of the files that are not images.
    """

    root: Path
    files: tuple[ImageFile, ...]
    classes: tuple[str, ...]
    ignored: tuple[str, ...]

    def split(self, name: str) -> tuple[ImageFile, ...]:
        """The images of a split."""
        return tuple(file for file in self.files if file.split == name)

    def where(self, file: ImageFile) -> str:
        """Name of an image in messages."""
        return f"{self.root}: {file.name}" if file.offset >= 0 else str(self.root / file.name)

    def read(self, file: ImageFile) -> bytes:
        """The bytes of an image.

        Raises:
            DataError: if it cannot be read or has a length that has changed since it was listed.
        """
        try:
            with open(self.root if file.offset >= 0 else self.root / file.name, "rb") as stream:
                stream.seek(max(0, file.offset))
                payload = stream.read(file.size + 1) if file.offset < 0 else stream.read(file.size)
        except OSError as error:
            raise DataError(f"cannot read {self.where(file)}: {error.strerror or error}") from error
        if len(payload) != file.size:
            longer = "has more than" if len(payload) > file.size else f"ends after {len(payload)} of"
            raise DataError(f"{self.where(file)} {longer} {file.size} bytes")
        return payload


def list_images(root: Path, *, labels: bool = True) -> Listing:
    """The images below a folder, or in a plain tar.

    Args:
        labels: False: no classes, whatever folders there are.

    Raises:
        DataError: no such folder or tar, a damaged tar, a member or file that is not an ordinary one, no image, or
            images beside class folders.
    """
    if root.is_dir():
        entries = sorted(_walk(root))
    elif root.is_file():
        entries = sorted(_members(root))
    else:
        raise DataError(f"there is no image folder or tar {root}")
    images = [entry for entry in entries if entry[0].lower().endswith(_IMAGE)]
    ignored = tuple(name for name, _, _ in entries if not name.lower().endswith(_IMAGE))
    if not images:
        found = f"only others, such as {ignored[0]}" if ignored else "no file at all"
        raise DataError(f"{root} holds no image ({', '.join(EXTENSIONS)}), {found}")
    described = {name[: -len(".cls")] for name in ignored if name.endswith(".cls")}
    if labels and root.is_file() and any(os.path.splitext(name)[0] in described for name, _, _ in images):
        raise DataError(
            f"{root} is a WebDataset shard, whose .cls members are labels, not a tar of images in folders: name the "
            f"directory {root.parent}, after `rkdo index {root.parent}` if it has no index.json, or read the pictures "
            f"without labels as data.source=imagefolder://{root}?labels=none"
        )
    files = _assigned(root, images, labels)
    names = {file.label for file in files if file.split != "unlabeled" and file.label is not None}
    return Listing(root, tuple(files), tuple(sorted(names)), ignored)


def _assigned(root: Path, images: list[tuple[str, int, int]], labels: bool) -> list[ImageFile]:
    """Each image with its split and class."""
    tops = {name.split("/")[0] for name, _, _ in images}
    around = 0 if tops & set(SPLITS) or len(tops) != 1 or any("/" not in name for name, _, _ in images) else 1
    split_folders = {name.split("/")[around] for name, _, _ in images if name.count("/") > around} & set(SPLITS)
    files, parents = [], []
    for name, size, offset in images:
        parts = name.split("/")[around:]
        if split_folders and parts[0] not in split_folders:
            continue
        split = parts.pop(0) if split_folders else "train"
        files.append(ImageFile(name, split, None, size, offset))
        parents.append(parts[0] if len(parts) > 1 else None)
    if not any(file.split == "train" for file in files):
        raise DataError(f"{root} has no images in train/, only in {', '.join(sorted(split_folders))}/")
    if labels:
        files = _labelled(root, files, parents, bool(split_folders))
    if not any(f.split == "test" for f in files):  # evaluation finds its samples under "test"
        files = [replace(f, split="test") if f.split == "val" else f for f in files]
    return files


def _labelled(root: Path, files: list[ImageFile], parents: list[str | None], has_splits: bool) -> list[ImageFile]:
    owned = [(f, parent) for f, parent in zip(files, parents, strict=True) if f.split != "unlabeled"]
    loose = next((f.name for f, parent in owned if parent is None), None)
    folders = {parent for _, parent in owned if parent is not None}
    if has_splits and loose is not None and folders:
        raise DataError(
            f"{root}: {loose} does not lie in a class folder, as other images do (<split>/<class>/<image>): "
            "move it, or read everything without labels"
        )
    if loose is not None or len(folders) < (1 if has_splits else 2):
        return files
    return [replace(f, label=parent) if f.split != "unlabeled" else f for f, parent in zip(files, parents, strict=True)]


def _walk(root: Path) -> Iterator[tuple[str, int, int]]:
    """Files of a tree as (path below root with /, length, -1); links to folders are not followed."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            path = Path(folder, name)
            shown = path.relative_to(root).as_posix()
            if not path.is_file():
                raise DataError(f"{path} is not an ordinary file")
            try:
                shown.encode()
            except UnicodeEncodeError:
                raise DataError(f"{root}: the file name {os.fsencode(shown)!r} is not UTF-8: rename it") from None
            yield shown, path.stat().st_size, -1


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Files of a tar as (name, length, offset)."""
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{path}: member {member.name!r} is not an ordinary file (a link or device)")
                parts = member.name.split("/")
                if member.name.startswith("/") or ".." in parts:
                    raise DataError(f"{path}: member {member.name!r} has an unsafe name")
                if not any(part.startswith(".") and part != "." for part in parts):
                    yield "/".join(p for p in parts if p not in ("", ".")), member.size, member.offset_data
            with open(path, "rb") as file:
                file.seek(archive.offset)
                end = file.read(tarfile.BLOCKSIZE)
            if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
                raise DataError(f"{path} is truncated or damaged at offset {archive.offset}; copy it again")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} is not a readable plain tar file ({error}); decompress it first if it is compressed"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
