"""Initial weights from a file or the Hugging Face Hub, and the check that they match."""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rkdo_dist.web import waiting

_TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?:/([\w./-]+))?")
MODEL_FILE = "model.safetensors"


def read_weights(source: str) -> dict[str, Tensor]:
    """The tensors of a file of weights, by name, on the CPU.

    Args:
        source: a `.safetensors` file, a torch file (read with `weights_only=True`: tensors, no code), a directory that
            holds `model.safetensors`, or `hf://OWNER/NAME[@REVISION][/FILE]`.

    Raises:
        ValueError: if there is no such file, it is of another kind, or is damaged.
    """
    path = hub_file(source, MODEL_FILE) if source.startswith("hf://") else Path(source)
    if path.is_dir():
        path = path / MODEL_FILE
    if not path.is_file():
        raise ValueError(
            f"there are no weights {path}: name a .safetensors or torch file, hf://OWNER/NAME, DEFAULT or none"
        )
    try:
        if path.suffix == ".safetensors":
            return {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file may change later
        if path.suffix in _TORCH_FILES:
            return _tensors(torch.load(path, map_location="cpu", weights_only=True), str(path))
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds Python objects besides tensors, which would have to be executed: it is not read; save its "
            "state_dict alone, best as .safetensors"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as weights: {str(error).partition(chr(10))[0]}") from None
    raise ValueError(f"{path}: weights are read from .safetensors, or torch files ({', '.join(_TORCH_FILES)})")


def hub_file(source: str, default: str) -> Path:
    """The local copy of a file at `hf://OWNER/NAME[@REVISION][/FILE]` (HF_HOME, HF_HUB_OFFLINE, ... hold).

    Raises:
        ValueError: not such an address, nothing there, or huggingface_hub is not installed.
    """
    match = _HUB.fullmatch(source)
    if match is None:
        raise ValueError(
            f"{source} is not of the form hf://OWNER/NAME, hf://OWNER/NAME@REVISION or hf://OWNER/NAME/FILE"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"{source} needs huggingface_hub: pip install 'rkdo_dist[hub]'") from None
    repository, revision, name = match.groups()
    try:
        with waiting(source):
            return Path(hf_hub_download(repository, name or default, revision=revision))
    except Exception as error:  # its own kinds, HTTP's, and the file system's
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot get {name or default} of {source}: {reason[:300]}") from None


def _tensors(found: Any, where: str) -> dict[str, Tensor]:
    """The state dict in a torch file, alone or beside other entries under its customary name."""
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{where} holds no state dict (tensors by name)")
    return {str(name): tensor for name, tensor in found.items()}


def load_into(network: nn.Module, state: Mapping[str, Tensor], name: str, source: str, ignored: Sequence[str]) -> None:
    """Give a backbone the weights of `state`: all of its own, and nothing else.

    Wrappers' prefixes (`module.`, `_orig_mod.`) are taken off; of an encoder's weights (`backbone.*`, `head.*`) only
    the backbone's are used.

    Args:
        network: the backbone, changed in place; only if everything fits.
        state: weights by name.
        name, source: of the backbone and the weights, for messages.
        ignored: names of modules whose weights are left out (the classifier).

    Raises:
        ValueError: naming the keys that are missing, unexpected or of another shape.
    """
    own = network.state_dict()
    given = _unwrapped(state, own)
    given = {k: v for k, v in given.items() if not any(k == m or k.startswith(f"{m}.") for m in ignored)}
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in given if k not in own]
    shapes = [k for k in own if k in given and own[k].shape != given[k].shape]
    if missing or unexpected or shapes:
        raise ValueError(f"weights={source} does not match {name}: {_misfit(missing, unexpected, shapes, own, given)}")
    network.load_state_dict(given, strict=False)


def _unwrapped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given = dict(state)
    for prefix in ("module.", "_orig_mod."):
        if given and all(k.startswith(prefix) for k in given):
            given = {k.removeprefix(prefix): v for k, v in given.items()}
    if any(k.startswith("backbone.") for k in given) and not any(k.startswith("backbone.") for k in own):
        given = {k.removeprefix("backbone."): v for k, v in given.items() if k.startswith("backbone.")}
    return given


def _misfit(
    missing: list[str], unexpected: list[str], shapes: list[str], own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> str:
    said = []
    for keys, what in ((missing, "missing"), (unexpected, "unexpected")):
        if keys:
            said.append(f"{len(keys)} keys {what} ({_few(keys)})")
    if shapes:
        listed = _few([f"{k}: {tuple(given[k].shape)} in the file, {tuple(own[k].shape)} needed" for k in shapes], "; ")
        said.append(f"{len(shapes)} of another shape ({listed})")
    text = ", ".join(said)
    near = difflib.get_close_matches(missing[0], unexpected, n=1, cutoff=0.6) if missing else []
    return f"{text}; the file has {near[0]!r} where {missing[0]!r} is needed" if near else text


def _few(items: list[str], separator: str = ", ") -> str:
    shown = separator.join(items[:3])
    return shown if len(items) <= 3 else f"{shown}{separator}..."
