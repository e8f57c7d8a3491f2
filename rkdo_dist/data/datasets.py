"""A torch `Dataset` as a source of samples: torchvision's, the Hugging Face hub's, or the user's own.

An item is an image, or an image and a class number; a mapping with "image" and perhaps "label" will do as well. Images
are Pillow's, uint8 arrays (H, W) or (H, W, c), or uint8 tensors (H, W) or (c, H, W): as they are before any transform,
because the views are drawn here. The samples are put into a drawn order and cut into runs that take the place of
shards. Content cannot be verified sample by sample, as a `Dataset` has no checksums: some of its items are compared
between ranks and when a run is continued.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rkdo_dist.data.errors import DataError
from rkdo_dist.data.images import pixels_of
from rkdo_dist.data.index import Shard, ShardIndex, Split
from rkdo_dist.data.order import hash64, permutation, run_length
from rkdo_dist.web import waiting

_PROBES = 8  # items of a split that are looked at before training
_CALLED_TEST = ("test", "val", "valid", "validation")


class Opener:
    """Makes the splits when they are needed, so that only a name travels to loader workers.

    Args:
        name: for messages and the index.
        function: returns a data set, or data sets by split; a module-level function, so that workers can call it too.
        arguments: its arguments.
    """

    def __init__(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        self.name, self._function, self._arguments = name, function, arguments
        self._splits: dict[str, Any] | None = None

    def splits(self) -> dict[str, Any]:
        """The data sets by split.

        Raises:
            DataError: whatever the function raises, or if it returns something else.
        """
        if self._splits is None:
            try:
                made = self._function(*self._arguments)
            except DataError:
                raise
            except Exception as error:  # somebody else's code
                raise DataError(f"{self.name} cannot be opened: {_brief(error)}") from error
            self._splits = dict(made) if isinstance(made, Mapping) else {"train": made}
            for split, data in self._splits.items():
                if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
                    raise DataError(
                        f"{self.name} gives {type(data).__name__} for split {split!r}, not a data set with a length "
                        "and items by number"
                    )
        return self._splits

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_splits": None}


@dataclass(frozen=True)
class ItemRun:
    """Consecutive items of the drawn order, in the role of a shard."""

    opener: Opener
    split: str
    items: tuple[int, ...]

    def open(self, name: str) -> OpenItems:
        """Ready for reading."""
        return OpenItems(self, name)


class OpenItems:
    """Items of a data set, read when they are asked for.

    Attributes:
        keys: split and number of each item.
    """

    def __init__(self, run: ItemRun, name: str) -> None:
        self._run, self.name = run, name
        self._data = run.opener.splits()[run.split]
        self.keys = tuple(f"{run.split}-{item}" for item in run.items)
        self._last: tuple[int, tuple[Any, int | None]] | None = None

    def pixels(self, position: int, size: int | None) -> np.ndarray:
        """The image of an item, uint8 (3, H, W), fitted to `size` if that is given.

        Raises:
            DataError: if the data set raises, or gives something that is not an image.
        """
        return pixels_of(_image(self._item(position)[0], self.where(position)), self.where(position), size)

    def label(self, position: int) -> bytes | None:
        """The class number as text, None without one."""
        label = self._item(position)[1]
        return None if label is None or label < 0 else str(label).encode()

    def where(self, position: int) -> str:
        """Name of an item in errors."""
        return f"{self._run.opener.name}: item {self._run.items[position]} of split {self._run.split!r}"

    def check_unchanged(self) -> None:
        """Nothing is known of the data set's own storage."""

    def close(self) -> None:
        """Nothing is open."""

    def _item(self, position: int) -> tuple[Any, int | None]:
        if self._last is None or self._last[0] != position:
            try:
                item = self._data[self._run.items[position]]
            except Exception as error:  # somebody else's code
                raise DataError(f"{self.where(position)} cannot be read: {_brief(error)}") from error
            self._last = (position, _parts(item, self.where(position)))
        return self._last[1]


def dataset_index(opener: Opener, *, workers: bool = True) -> ShardIndex:
    """The index of a data set's splits ("val", "valid" or "validation" serve as "test" where there is none).

    Args:
        opener: makes them.
        workers: whether loader processes will read them, so that the opener must be sent there.

    Raises:
        DataError: a split without items, items that cannot be read or change when they are read twice, or an opener
            that cannot be sent to loader processes.
    """
    if workers:
        try:
            ForkingPickler.dumps(opener)
        except Exception as error:  # pickle raises almost anything
            raise DataError(
                f"{opener.name} cannot be sent to loader processes ({_brief(error)}): use data.workers=0, or an import "
                "path to a function that makes it"
            ) from None
    splits, sizes, classes = {}, set(), list[str]()
    names = _named(list(opener.splits()))
    for name, split in names.items():
        data = opener.splits()[split]
        if not len(data):
            raise DataError(f"{opener.name}: split {split!r} has no items")
        runs, size = _runs(opener, name, split, len(data))
        splits[name] = Split(name, runs)
        sizes |= size
        classes = classes or [str(c) for c in getattr(data, "classes", None) or ()]
    if "train" not in splits:
        raise DataError(f"{opener.name} has no split 'train', only {', '.join(splits)}")
    return ShardIndex(
        root=Path(),
        title=opener.name,
        splits=splits,
        classes=tuple(classes),
        image_size=sizes.pop() if len(sizes) == 1 else None,
        source=f"dataset {opener.name}",
        notes=(f"{opener.name}: {', '.join(f'{s.samples} items in {s.name}' for s in splits.values())}",),
    )


def _named(found: Sequence[str]) -> dict[str, str]:
    """Names of our splits, with the data set's own."""
    names = {name: name for name in found}
    if "test" not in names:
        other = next((name for name in _CALLED_TEST if name in names), None)
        if other is not None:
            names["test"] = names.pop(other)
    return names


def _runs(opener: Opener, name: str, split: str, count: int) -> tuple[tuple[Shard, ...], set[tuple[int, int]]]:
    order = permutation(count, hash64(0, *name.encode()))
    probes = {int(k): _probe(opener, split, int(k)) for k in order[:: max(1, count // _PROBES)][:_PROBES]}
    digest = hashlib.sha256(repr([(k, probe[0]) for k, probe in sorted(probes.items())]).encode()).hexdigest()
    limit = run_length(count)
    runs = tuple(
        Shard(
            name=f"{name}-{number:05d}",
            samples=len(order[start : start + limit]),
            sha256=hashlib.sha256(f"{digest} {name} {start}".encode()).hexdigest(),
            bytes=0,
            content=ItemRun(opener, split, tuple(int(k) for k in order[start : start + limit])),
        )
        for number, start in enumerate(range(0, count, limit))
    )
    return runs, {size for _, size in probes.values()}


def _probe(opener: Opener, split: str, item: int) -> tuple[str, tuple[int, int]]:
    """SHA-256 of an item's pixels and label, and its (height, width); read twice, as views need the same item again."""
    digests, size = [], (0, 0)
    for _ in range(2):
        opened = OpenItems(ItemRun(opener, split, (item,)), opener.name)
        pixels = opened.pixels(0, None)
        digests.append(hashlib.sha256(pixels.tobytes() + (opened.label(0) or b"")).hexdigest())
        size = (pixels.shape[1], pixels.shape[2])
    if digests[0] != digests[1]:
        raise DataError(
            f"{opener.name}: item {item} of split {split!r} differs when it is read again: take random "
            "transforms out of the data set (views.* draws the views)"
        )
    return digests[0], size


def _parts(item: Any, where: str) -> tuple[Any, int | None]:
    """Image and class number of an item."""
    if isinstance(item, Mapping):
        image = next((item[name] for name in ("image", "img", "jpg", "png") if name in item), None)
        label = next((item[name] for name in ("label", "labels", "cls", "fine_label") if name in item), None)
        if image is None:
            raise DataError(f'{where} has no "image" but {", ".join(map(str, item))}')
    elif isinstance(item, tuple | list):
        image, label = item[0], item[1] if len(item) > 1 else None
    else:
        image, label = item, None
    try:
        return image, None if label is None else int(label)
    except (TypeError, ValueError):
        raise DataError(f"{where} has the label {str(label)[:60]!r}, not a class number") from None


def _image(image: Any, where: str) -> Image.Image:
    """A Pillow image of a Pillow image, array or tensor."""
    if isinstance(image, Image.Image):
        return image
    array = image.numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DataError(
            f"{where} is {type(image).__name__} {array.dtype} {array.shape}: give images before any transform, "
            "Pillow's or uint8 (H, W), (H, W, c) or (c, H, W)"
        )
    if array.ndim == 3:
        channels_first = array.shape[0] <= 4 and (isinstance(image, torch.Tensor) or array.shape[-1] > 4)
        if channels_first:
            array = array.transpose(1, 2, 0)
        if array.shape[-1] == 1:
            array = array[..., 0]
        elif array.shape[-1] not in (3, 4):
            raise DataError(f"{where} has {array.shape[-1]} channels: 1, 3 or 4 are supported")
    return Image.fromarray(np.ascontiguousarray(array))


def imported(path: str) -> Callable[..., Any]:
    """The function that `package.module:function` names.

    Raises:
        DataError: if it cannot be imported, or is none.
    """
    module, _, name = path.partition(":")
    if module == "python":
        raise DataError(f"data.source={path} was an object that Python code gave: name the data with data.source=...")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's code
        raise DataError(f"data.source={path} cannot be imported: {_brief(error)}") from error
    if not callable(function):
        raise DataError(f"data.source={path} is {type(function).__name__}, not a function that returns a data set")
    return function


def user_splits(path: str) -> Any:
    """What the user's function returns."""
    return imported(path)()


def given_index(data: Any, *, workers: bool = True) -> ShardIndex:
    """The index of a data set that Python code gives as an object, or of several by split.

    Raises:
        DataError: as `dataset_index`, or if loader processes cannot have the object.
    """
    one = next(iter(data.values()), None) if isinstance(data, Mapping) else data
    kind = type(one)
    main = sys.modules["__main__"]
    if workers and kind.__module__ == "__main__" and not hasattr(main, "__file__"):
        raise DataError(
            f"loader processes cannot have a {kind.__name__}, which was defined in an interactive session: use "
            "data.workers=0, or define it in a module"
        )
    return dataset_index(Opener(f"python:{kind.__name__}", _itself, data), workers=workers)


def _itself(data: Any) -> Any:
    return data


def torchvision_splits(name: str, root: str, download: bool) -> dict[str, Any]:
    """The splits of a torchvision data set by its class name, without transforms.

    Raises:
        DataError: an unknown name, or files that are not there.
    """
    from torchvision import datasets  # `import torchvision` takes a second

    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, torch.utils.data.Dataset)):
        near = difflib.get_close_matches(name, datasets.__all__, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise DataError(f"torchvision has no data set {name!r}{hint}")
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {"root": root} if "root" in known else {}
    if "download" in known:
        options["download"] = download
    with waiting(f"torchvision's download of {name}") if download else nullcontext():
        return dict(_torchvision_splits(kind, known, options))


def _torchvision_splits(kind: Any, known: Mapping[str, Any], options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if "train" in known:
        yield "train", kind(**options, train=True)
        yield "test", kind(**options, train=False)
    elif "split" in known:
        yield "train", kind(**options, split="train")
        for split in ("test", "val"):
            try:
                yield split, kind(**options, split=split)
            except ValueError:  # torchvision's word for a split that a data set does not have
                continue
            return
    else:
        yield "train", kind(**options)


def hub_splits(name: str) -> dict[str, Any]:
    """The splits of a data set of the Hugging Face hub (or a local folder of one) through the library `datasets`.

    Raises:
        DataError: if the library is not installed, or has no such data set.
    """
    try:
        import datasets
    except ImportError:
        raise DataError("hf:// data sets need the library `datasets`: pip install 'rkdo_dist[datasets]'") from None
    with waiting(f"the data set {name} of the Hugging Face hub"):
        return dict(datasets.load_dataset(name))


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
