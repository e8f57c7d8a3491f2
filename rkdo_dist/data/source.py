"""Data sources: a path, or an address whose scheme names the kind of source.

| source | content |
|---|---|
| a directory with index.json, `shards://DIR_OR_URL`, a URL | prepared or indexed WebDataset shards (`index`) |
| any other directory, a tar, `imagefolder://PATH` | images as they are (`folder`); `?labels=none` leaves classes out |
| `torchvision://NAME?root=DIR` | a data set of torchvision by its class name; `&download=true` fetches it |
| `hf://datasets/NAME` | a data set of the Hugging Face hub, through the library `datasets` |
| `package.module:function` | what the function returns: a torch `Dataset`, or several by split |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl

from rkdo_dist.data import datasets
from rkdo_dist.data.errors import DataError
from rkdo_dist.data.folder import folder_index
from rkdo_dist.data.foreign import index_shards
from rkdo_dist.data.index import INDEX_NAME, Progress, ShardIndex, load_index
from rkdo_dist.data.listing import list_images
from rkdo_dist.data.remote import is_url
from rkdo_dist.files import at_home

_IMPORT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def open_source(
    source: str,
    *,
    allow_remote: bool = False,
    on_corrupt: str = "abort",
    workers: bool = True,
    progress: Progress | None = None,
) -> ShardIndex:
    """The index of whatever `source` names; see the table of this module.

    Args:
        source: a path or an address.
        allow_remote: follow a local index to shards that it says lie elsewhere.
        on_corrupt: what becomes of files of a folder that are not images, see `folder.folder_index`.
        workers: whether loader processes will read the samples.
        progress: for a folder that is indexed for the first time.

    Raises:
        DataError: nothing there, or something that cannot be used; the message names it and says what to do.
    """
    scheme, rest = _scheme(source)
    if scheme == "shards":
        return load_index(rest, allow_remote=allow_remote)
    if scheme == "imagefolder":
        place, options = _options(source, rest, ("labels",))
        if options.get("labels", "folder") not in ("folder", "none"):
            raise DataError(f"{source}: labels must be folder or none, got {options['labels']!r}")
        labels = options.get("labels") != "none"
        return folder_index(Path(place), labels=labels, on_corrupt=on_corrupt, progress=progress)
    if scheme == "torchvision":
        name, options = _options(source, rest, ("root", "download"))
        download = _flag(source, "download", options.get("download", "false"))
        opener = datasets.Opener(
            f"torchvision://{name}", datasets.torchvision_splits, name, at_home(options.get("root", "data")), download
        )
        return datasets.dataset_index(opener, workers=workers)
    if scheme == "hf":
        opener = datasets.Opener(source, datasets.hub_splits, rest.removeprefix("datasets/"))
        return datasets.dataset_index(opener, workers=workers)
    if scheme == "import":
        datasets.imported(source)
        return datasets.dataset_index(datasets.Opener(source, datasets.user_splits, source), workers=workers)
    return _local(source, allow_remote, on_corrupt, progress)


def index(sources: Sequence[str], out: str | None = None, progress: Progress | None = None) -> ShardIndex:
    """Describe shards, or read any other source through once, as `rkdo index` does.

    Args:
        sources: one source, or several tar shards or their URLs.
        out: where index.json of shards goes, see `foreign.index_shards`.

    Raises:
        DataError: as `open_source` and `foreign.index_shards`.
    """
    scheme, place = _scheme(sources[0])
    path = Path(place)
    shards = is_url(place) or (path.is_file() and not _holds_folders(path)) or any(path.rglob("*.tar"))
    if len(sources) > 1 or scheme == "shards" or (not scheme and shards):
        return index_shards(place if len(sources) == 1 else sources, out=out, progress=progress)
    return open_source(sources[0], progress=progress)


def _holds_folders(path: Path) -> bool:
    """Whether a file is a tar of images in folders, which training reads as such, rather than a shard."""
    try:
        return any("/" in file.name for file in list_images(path).files)
    except DataError:
        return False  # whoever opens it says why


def _local(source: str, allow_remote: bool, on_corrupt: str, progress: Progress | None) -> ShardIndex:
    """A path without scheme, or a URL of shards."""
    path = Path(source)
    if is_url(source) or path.name == INDEX_NAME or (path / INDEX_NAME).is_file():
        return load_index(source, allow_remote=allow_remote)
    if not path.exists():
        raise DataError(f"there is no {source}: give a folder of images, or of shards made by `rkdo prepare`")
    if path.is_dir() and (path / ".prepare.json").exists():
        return load_index(source, allow_remote=allow_remote)  # says that a preparation was not finished
    if path.is_dir() and any(path.glob("*.tar")):
        raise DataError(f"{source} holds tar files but no {INDEX_NAME}: describe them with `rkdo index {source}`")
    return folder_index(path, on_corrupt=on_corrupt, progress=progress)


def _scheme(source: str) -> tuple[str, str]:
    """The kind of source, and the rest of the address; "" for a path or another kind of URL."""
    scheme, separator, rest = source.partition("://")
    if separator and scheme in ("shards", "imagefolder", "torchvision"):
        return scheme, rest
    if separator and scheme == "hf" and rest.startswith("datasets/") and not rest.endswith((".json", "/")):
        return scheme, rest
    if not separator and _IMPORT.fullmatch(source) and not Path(source).exists():
        return "import", source
    return "", source


def _options(source: str, rest: str, allowed: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The part before the question mark, and the options after it."""
    place, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise DataError(f"{source}: unknown option {unknown[0]!r}; allowed: {', '.join(allowed)}")
    if not place:
        raise DataError(f"{source} names nothing after ://")
    return place, options


def _flag(source: str, name: str, text: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise DataError(f"{source}: {name} must be true or false, got {text!r}")
    return text.lower() in _TRUE
