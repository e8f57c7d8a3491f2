"""`rkdo export` and `rkdo embed`: their arguments, and the one call each makes (imported when it is made)."""

from __future__ import annotations

import argparse

from rkdo_dist.commands.arguments import Command, add_overrides, file, given
from rkdo_dist.printable import printable

_OVERRIDES = "encoder.backbone=... if the backbone is your code"


def output_commands(command: Command) -> None:
    """Add both commands."""
    add = command(
        "export",
        _export,
        "write a run's encoder for torchvision, timm, ONNX or load_encoder",
        "runs/first --format torchvision --out resnet18.pth",
    )
    add("source", type=given, metavar="RUN", help="a run directory, a checkpoint, a saved encoder or hf://OWNER/NAME")
    add("--format", required=True, choices=("torchvision", "timm", "safetensors", "onnx"), help="who will load it")
    add("--out", type=file, required=True, metavar="FILE", help="beside it FILE.json and FILE.md are written")
    add("--weights", choices=("trained", "ema"), default="trained", help="as trained, or their average (train.ema)")
    add("--force", action="store_true", help="replace files that are there")
    add_overrides(add, _OVERRIDES)

    add = command(
        "embed",
        _embed,
        "write features and embeddings of images, with their keys",
        "runs/first path/to/folder --out features.npz",
    )
    add("source", type=given, metavar="RUN", help="as for export")
    add("data", type=given, metavar="SOURCE", help="as data.source: a folder of images, shards, an address")
    add("--out", type=file, required=True, metavar="FILE", help="ends in .npz, .parquet or .safetensors")
    add("--split", action="append", default=[], metavar="NAME", help="only this split; may be repeated (default: all)")
    add("--on-corrupt", choices=("abort", "skip"), default="abort", help="files that are not images: stop, or skip")
    add("--what", choices=("both", "features", "embeddings"), default="both", help="which arrays (default: both)")
    add("--weights", choices=("trained", "ema"), default="trained", help="as trained, or their average (train.ema)")
    add("--force", action="store_true", help="replace FILE")
    add_overrides(add, _OVERRIDES)


def _export(options: argparse.Namespace) -> int:
    backbone = _named_backbone(options)
    from rkdo_dist.export.formats import export

    asked = {"force": options.force, "weights": options.weights}
    for path in export(options.source, options.format, options.out, backbone=backbone, **asked):
        print(printable(str(path)))
    return 0


def _embed(options: argparse.Namespace) -> int:
    o, backbone = options, _named_backbone(options)
    from rkdo_dist.ranks.relaunch import with_all_ranks

    with_all_ranks(options.words)
    from rkdo_dist.export.embed import embed

    asked = {"splits": o.split, "what": o.what, "force": o.force, "on_corrupt": o.on_corrupt, "weights": o.weights}
    embed(o.source, o.data, o.out, backbone=backbone, **asked)
    return 0


def _named_backbone(options: argparse.Namespace) -> str | None:
    """The backbone that the user names, who has to if it is code."""
    settings = dict(word.partition("=")[::2] for word in options.overrides)
    other = next((key for key in settings if key != "encoder.backbone"), None)
    if other is not None:
        raise ValueError(f"{other} cannot be set here; only encoder.backbone=package.module:factory can")
    return settings.get("encoder.backbone")
