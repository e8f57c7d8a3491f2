"""`rkdo export`: the encoder's weights as other libraries load them, a description and a model card beside them."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from rkdo_dist.encoders import backbone_state
from rkdo_dist.export.pretrained import PretrainedEncoder, load_encoder, model_card, plain_state
from rkdo_dist.files import write_atomic

# What a file of each format may be called.
FORMATS = {
    "torchvision": (".pth", ".pt", ".safetensors"),
    "timm": (".safetensors", ".pth", ".pt"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
}


def export(
    source: str | Path,
    kind: str,
    out: Path,
    *,
    force: bool = False,
    backbone: str | nn.Module | None = None,
    weights: str = "trained",
) -> list[Path]:
    """Write an encoder as a file of another library's.

    - "torchvision", "timm": the backbone's weights, which `torchvision.models.NAME().load_state_dict(weights,
      strict=False)` and `timm.create_model(NAME, num_classes=0).load_state_dict(weights)` take as they are; only the
      classifier is missing. A backbone of the one is exported to the other where both have the same.
    - "safetensors": backbone and head, for `rkdo_dist.load_encoder`.
    - "onnx": a graph from `images` (n, 3, S, S) to `features` (n, f) and `embeddings` (n, d), for any n (the extra
      `onnx`).

    Beside OUT are written OUT.json (the encoder, the transform of its images, settings) and OUT.md (a model card).

    Args:
        source, backbone, weights: as for `load_encoder`.
        kind: a key of `FORMATS`.
        out: the file; its ending says how it is written.
        force: replace files that are there.

    Returns:
        The files written.

    Raises:
        ValueError: a file that is there already, an ending or format that there is not, a backbone that the library
            does not have; nothing is written then.
    """
    if kind not in FORMATS:
        raise ValueError(f"unknown format {kind!r}; use one of {', '.join(FORMATS)}")
    if out.suffix not in FORMATS[kind]:
        raise ValueError(f"--out {out}: a file for {kind} ends in {' or '.join(FORMATS[kind])}")
    beside = [out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.md")]
    refuse_existing([out, *beside], force)
    encoder = load_encoder(source, backbone=backbone, weights=weights)
    about = {**encoder.about, "format": kind, "file": out.name}
    if kind == "onnx":
        content = _onnx(encoder)
    elif kind == "safetensors":
        content = encoder.to_bytes()
    else:
        content = _written(_for_library(encoder, kind), out.suffix)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(beside[0], json.dumps(about, indent=2) + "\n")
    write_atomic(beside[1], model_card(about))
    write_atomic(out, content)
    return [out, *beside]


def refuse_existing(paths: list[Path], force: bool) -> None:
    """Raise ValueError if one of the files to be written is there."""
    there = [path for path in paths if path.exists()]
    if there and not force:
        raise ValueError(f"{there[0]} is there already: choose another --out, or replace it with --force")


def _for_library(encoder: PretrainedEncoder, library: str) -> dict[str, Tensor]:
    """The backbone's weights, if the library has a model of its name with the same ones."""
    asked = encoder.about["encoder"]
    name = str(asked["backbone"]).removeprefix("torchvision/").removeprefix("timm/")
    own = plain_state(encoder.backbone)
    theirs = backbone_state(f"{library}/{name}")
    for key in sorted(own.keys() | theirs.keys()):
        if key not in theirs or key not in own or own[key].shape != theirs[key].shape:
            stem = " (encoder.stem=cifar has another first layer)" if asked.get("stem") == "cifar" else ""
            raise ValueError(
                f"{asked['backbone']} does not fit {library}'s {name}: they differ in {key}{stem}; "
                "use --format safetensors or onnx"
            )
    return own


def _written(state: dict[str, Tensor], suffix: str) -> bytes:
    if suffix == ".safetensors":
        return save(state, {"format": "pt"})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class _Both(nn.Module):
    def __init__(self, encoder: PretrainedEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder.features(images)


def _onnx(encoder: PretrainedEncoder) -> bytes:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError("--format onnx needs onnx and onnxscript: pip install 'rkdo_dist[onnx]'") from None
    size = encoder.transform.size
    try:
        program = torch.onnx.export(
            _Both(encoder).eval(),
            (torch.zeros(2, 3, size, size),),
            input_names=["images"],
            output_names=["features", "embeddings"],
            dynamic_shapes={"images": {0: torch.export.Dim("n", min=1)}},
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # a backbone may use what ONNX has not
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{encoder.about['encoder']['backbone']} cannot be written as ONNX: {reason}") from error
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        program.save(f"{folder}/encoder.onnx", external_data=False)
        return Path(folder, "encoder.onnx").read_bytes()
