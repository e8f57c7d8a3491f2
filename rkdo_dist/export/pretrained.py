"""A trained encoder with its transform, from a run, a checkpoint, a file or the Hugging Face Hub, and back again.

    encoder = rkdo_dist.load_encoder("runs/first")
    features, embeddings = encoder.features(encoder.transform(image)[None])

A saved encoder is a directory of `config.json` and `model.safetensors`, the layout of the Hub, or one `.safetensors`
file whose header holds what `config.json` says.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rkdo_dist import __version__, checkpoint, documents, parts
from rkdo_dist.config import Config
from rkdo_dist.data.images import pixels_of
from rkdo_dist.data.views import Views
from rkdo_dist.encoders import MODEL_FILE, Encoder, hub_file, is_code, read_weights
from rkdo_dist.files import write_atomic
from rkdo_dist.rundir import RunDirectory, instead_of_run

CONFIG_FILE, CARD_FILE = "config.json", "README.md"
_THREE = documents.either(documents.NUMBER, documents.row_of(*3 * [documents.NUMBER]))
_ABOUT = documents.shape(
    library=documents.TEXT,
    encoder=documents.OBJECT,
    transform=documents.shape(size=documents.COUNT, mean=_THREE, std=_THREE),
    step_=documents.COUNT,
    evaluation_=documents.maybe(documents.OBJECT),
    settings_=documents.object_of(documents.OBJECT),
)
WEIGHTS = ("trained", "ema")
_ENCODER = ("backbone", "head", "embedding_dim", "stem", "head_width", "head_depth")  # settings


@dataclasses.dataclass(frozen=True)
class Transform:
    """A picture as the encoder was evaluated on it: RGB, the shorter side resized, the centre cut out, normalised.

    Args:
        size: side of the square.
        mean, std: of the normalisation, after pixels are brought to [0, 1]; numbers, or one for each channel.
    """

    size: int
    mean: Any = 0.5
    std: Any = 0.5

    def __call__(self, image: Image.Image) -> Tensor:
        """A Pillow image of any mode and size to float32 (3, size, size)."""
        pixels = torch.from_numpy(pixels_of(image, "the image", self.size).copy())
        return self.plain(pixels[None])[0]

    def plain(self, images: Tensor) -> Tensor:
        """uint8 (m, 3, H, W) to float32 (m, 3, size, size)."""
        return Views(self.size, mean=self.mean, std=self.std).plain(images)


class PretrainedEncoder(Encoder):
    """An `Encoder` in evaluation mode with the transform of its images and what is known of its training.

    Args:
        about: `encoder` (arguments of `Encoder`), `transform` (arguments of `Transform`), and whatever else is known.
        backbone: in place of the backbone that `about` names.

    Attributes:
        transform: maps a Pillow image to the tensor that `features` takes, without the batch dimension.
        about: as given.
    """

    def __init__(self, about: Mapping[str, Any], backbone: str | nn.Module | None = None) -> None:
        known = {name: about["encoder"][name] for name in (*_ENCODER, "unit_norm") if name in about["encoder"]}
        super().__init__(**{**known, **({} if backbone is None else {"backbone": backbone})})
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["transform"].items()}
        self.transform = Transform(**{k: given[k] for k in ("size", "mean", "std")})
        self.about = dict(about)
        self.eval()

    @classmethod
    def from_pretrained(cls, source: str | Path, *, backbone: str | nn.Module | None = None) -> PretrainedEncoder:
        """A saved encoder: a directory, or `OWNER/NAME` on the Hub where there is no such directory."""
        name = str(source)
        return load_encoder(name if "://" in name or Path(name).exists() else f"hf://{name}", backbone=backbone)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and, if there is none, `README.md`; what is there is replaced."""
        root = Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        write_atomic(root / MODEL_FILE, self.to_bytes())
        write_atomic(root / CONFIG_FILE, json.dumps(self.about, indent=2) + "\n")
        if not (root / CARD_FILE).exists():
            write_atomic(root / CARD_FILE, model_card(self.about))

    def push_to_hub(self, repository: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to `OWNER/NAME` on the Hub; returns the address of the commit.

        Raises:
            ValueError: if huggingface_hub is not installed, or the Hub does not answer or refuses.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise ValueError("push_to_hub needs huggingface_hub: pip install 'rkdo_dist[hub]'") from None
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            try:
                name = api.create_repo(repository, private=private, exist_ok=True).repo_id
                return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload the encoder"))
            except Exception as error:  # its own kinds, HTTP's, and the file system's
                raise ValueError(f"cannot push to {repository}: {' '.join(str(error).split())[:300]}") from error

    def to_bytes(self) -> bytes:
        """All weights and `about` as the content of one `.safetensors` file."""
        return save(plain_state(self), {"format": "pt", "rkdo_dist": json.dumps(self.about)})


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name: on the CPU, contiguous, sharing no memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}


def load_encoder(
    source: str | Path, *, backbone: str | nn.Module | None = None, weights: str = "trained"
) -> PretrainedEncoder:
    """A trained encoder, in evaluation mode.

    Args:
        source: a run directory (its newest whole checkpoint), the directory of one checkpoint, a directory of
            `save_pretrained`, a `.safetensors` file of `rkdo export --format safetensors`, or `hf://OWNER/NAME`.
        backbone: needed if the backbone is code of the user's: its import path, which is then imported, or a module.
            Code is never imported because a file names it.
        weights: of a run or checkpoint: "trained", or "ema" for their moving average (`train.ema`).

    Returns:
        A module with `features(images)` -> features (n, f) and embeddings (n, d), and `transform`.

    Raises:
        ValueError: nothing there, something else, damaged, a backbone that is code and was not given, or weights
            that are not there.
    """
    where = str(source)
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    path, hub = Path(source), where.startswith("hf://")
    if weights != "trained" and (hub or path.is_file() or (path / CONFIG_FILE).is_file()):
        raise ValueError(f"{where} holds one set of weights: weights={weights} is a choice for a run or a checkpoint")
    if hub:
        about = _parsed(hub_file(f"{where}/{CONFIG_FILE}", CONFIG_FILE).read_text(encoding="utf-8"), where)
        return _filled(about, read_weights(where), where, backbone)
    if path.is_file():
        return _filled(_header(path), read_weights(str(path)), where, backbone)
    if (path / CONFIG_FILE).is_file():
        about = _parsed((path / CONFIG_FILE).read_text(encoding="utf-8"), where)
        return _filled(about, read_weights(str(path)), where, backbone)
    return _of_run(path, backbone, weights)


def _of_run(path: Path, backbone: str | nn.Module | None, weights: str) -> PretrainedEncoder:
    if (path / "config.yaml").is_file():
        run = RunDirectory(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", checkpoint.CheckpointWarning)  # whoever trains the run is told
            found = checkpoint.load_latest(run.checkpoints)
        if found is None:
            raise ValueError(f"{path} has no checkpoint yet: train it first")
    elif (path / "manifest.json").is_file():
        run, found = RunDirectory(path.resolve().parents[1]), checkpoint.load(path)
    else:
        raise ValueError(
            f"{path} is not a run, a checkpoint, a saved encoder or a .safetensors file: name one of them, or "
            f"hf://OWNER/NAME{instead_of_run(path)}"
        )
    config = run.config()
    run.refuse_foreign(found, config)
    return _filled(_about(run, config, found, weights), found.weights(weights), str(path), backbone)


def _about(run: RunDirectory, config: Config, found: checkpoint.Checkpoint, weights: str) -> dict[str, Any]:
    """What `config.json` says of an encoder; whoever gets the file has nothing else."""
    last = run.history().last
    return {
        "library": "rkdo_dist",
        "version": __version__,
        "encoder": {name: getattr(config.encoder, name) for name in _ENCODER} | {"unit_norm": parts.unit_norm(config)},
        "transform": {
            "size": _image_size(run, config),
            **{k: list(v) if isinstance(v := getattr(config.views, k), tuple) else v for k in ("mean", "std")},
            "resize": "the shorter side to size, bilinear with antialiasing; then the central square",
            "pixels": "RGB in [0, 1], minus mean, divided by std",
        },
        "run": run.path.resolve().name,
        "step": found.step,
        "weights": weights,
        "settings": {
            section: values
            for section, values in dataclasses.asdict(config).items()
            if section in ("field", "views", "encoder", "train")
        },
        "evaluation": last if last and last.get("weights_are", "trained") == weights else None,
    }


def _image_size(run: RunDirectory, config: Config) -> int:
    """The side of the images the run was trained on: asked for, or noted by the run, or that of the data."""
    if config.data.image_size is not None:
        return config.data.image_size
    noted = run.environment().get("image_size")
    return noted if isinstance(noted, int) else parts.make_views(config, parts.open_index(config)).size


def _header(path: Path) -> dict[str, Any]:
    """`about` from the header of a `.safetensors` file."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: an encoder is loaded from a run, or a .safetensors file of `rkdo export`")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("rkdo_dist")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if text is None:
        raise ValueError(
            f"{path} holds weights, but not which encoder they are of: give the run instead, or a file of "
            "`rkdo export RUN --format safetensors`"
        )
    return _parsed(text, str(path))


def _about_form(value: Any, place: str) -> str:
    return "it was not saved by rkdo_dist" if value.get("library") != "rkdo_dist" else _ABOUT(value, place)


def _parsed(text: str, where: str) -> dict[str, Any]:
    return documents.parsed(text, f"{where} ({CONFIG_FILE})", _about_form, "export the encoder again")


def _filled(
    about: dict[str, Any], state: Mapping[str, Tensor], where: str, backbone: str | nn.Module | None
) -> PretrainedEncoder:
    named = about["encoder"].get("backbone")
    if backbone is None and str(named).startswith("python:"):
        raise ValueError(
            f"the backbone of {where} is a module that Python code gave, {named}: give one of the same kind, "
            "load_encoder(..., backbone=module)"
        )
    if backbone is None and is_code(str(named)):
        raise ValueError(
            f"the backbone of {where} is code, {named}, which is imported only where you name it: "
            f"load_encoder(..., backbone={named!r}) or encoder.backbone={named} on the command line"
        )
    with torch.random.fork_rng():  # the random weights drawn here are all replaced
        try:
            encoder = PretrainedEncoder(about, backbone)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{where} does not describe an encoder: {error}") from None
    try:
        encoder.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {where} do not fit its encoder: {' '.join(str(error).split())[:300]}"
        ) from None
    return encoder


def model_card(about: Mapping[str, Any]) -> str:
    """A model card in Markdown: what the encoder is, how to use it, its scores and settings."""
    encoder, transform = about["encoder"], about["transform"]
    scores = {k: v for k, v in (about.get("evaluation") or {}).items() if isinstance(v, int | float) and k != "step"}
    settings = about.get("settings", {})
    lines = [
        "---",
        "library_name: rkdo_dist",
        "tags: [self-supervised, image-feature-extraction]",
        "---",
        f"# {encoder['backbone']}, trained by rkdo_dist",
        "",
        f"Objective `{settings.get('field', {}).get('objective', '?')}`, step {about.get('step', '?')}; "
        f"embeddings of width {encoder['embedding_dim']}.",
        "",
        "```python",
        "import rkdo_dist",
        'encoder = rkdo_dist.load_encoder("PATH, or hf://OWNER/NAME")',
        "features, embeddings = encoder.features(encoder.transform(image)[None])",
        "```",
        "",
        f"Images: RGB of {transform['size']} x {transform['size']}, mean {transform['mean']}, std {transform['std']}.",
        "",
        "## Scores",
        "",
        *([f"- {name}: {value:.4f}" for name, value in scores.items()] or ["No evaluation was made."]),
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(settings, indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)
