"""`rkdo init`: starting configurations and a launch script for the data and the machine at hand."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from rkdo_dist.addresses import shown
from rkdo_dist.data.index import DataError, ShardIndex
from rkdo_dist.data.source import open_source
from rkdo_dist.files import write_atomic

_SMALL = 48  # images up to this size get a ResNet with the stem for small images
_USUAL = 224  # what larger images, or images of different sizes, are brought to


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found: of the data (None: none were named) and of the machine."""

    source: str
    size: int | None
    samples: int
    split: str
    labelled: bool
    test: bool
    broken: bool
    devices: int
    bf16: bool
    cores: int
    slurm: bool

    @property
    def machine(self) -> str:
        """The machine in words."""
        return f"a machine of {self.devices} GPUs and {self.cores} cores"


def init(directory: Path, source: str | None, force: bool = False) -> list[Path]:
    """Write `rkdo.yaml`, `infonce.yaml` (the same with another objective), `train.sh` and, on a cluster, `slurm.sh`.

    Args:
        directory: made if missing.
        source: as `data.source`; None: the digits that ship with scikit-learn.
        force: replace files that are there.

    Returns:
        The files written.

    Raises:
        ValueError: if one is there already, or the data cannot be read; nothing is written then.
    """
    found = look(source)
    files = {
        "rkdo.yaml": _configuration(found, "rkdo"),
        "infonce.yaml": _configuration(found, "infonce"),
        "train.sh": _script(found),
        **({"slurm.sh": _slurm(found)} if found.slurm else {}),
    }
    there = [directory / name for name in files if (directory / name).exists()]
    if there and not force:
        raise ValueError(f"{there[0]} is there already: name another directory, or replace it with --force")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomic(directory / name, text)
        if name.endswith(".sh"):
            (directory / name).chmod(0o755)
    return [directory / name for name in files]


def look(source: str | None) -> Found:
    """What the data and the machine are like."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    machine: dict[str, Any] = {
        "devices": torch.cuda.device_count(),
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
        "cores": cores,
        "slurm": shutil.which("sbatch") is not None,
    }
    if source is None:
        return Found("data/digits", 8, 1437, "train", True, True, False, **machine)
    broken = False
    try:
        index = open_source(source, workers=False)
    except DataError:  # of files that cannot be read, or for another reason, which the next call gives too
        index, broken = open_source(source, on_corrupt="skip", workers=False), True
    split = "train" if "train" in index.splits else next(iter(index.splits))
    place = source if "://" in source or not Path(source).exists() else str(Path(source).resolve())
    samples, labelled = index.split(split).samples, bool(index.classes)
    return Found(shown(place), _side(index), samples, split, labelled, "test" in index.splits, broken, **machine)


def _side(index: ShardIndex) -> int | None:
    """The side of the images, if they are squares of one size."""
    size = index.image_size
    return size[0] if size is not None and size[0] == size[1] else None


def _ranks(found: Found) -> int:
    """A power of two of processes: one for each GPU; without GPUs one for every four cores, at most four."""
    wanted = found.devices or min(4, max(1, found.cores // 4))
    return 1 << (wanted.bit_length() - 1)


def _batch(found: Found) -> int:
    """A power of two of samples in a step: 256 if the data give at least four steps in an epoch, else fewer."""
    return max(8, min(256, 1 << max(3, (found.samples // 4).bit_length() - 1)))


def _configuration(found: Found, objective: str) -> str:
    ranks, batch = _ranks(found), _batch(found)
    small = found.size is not None and found.size <= _SMALL
    size = "null           # as they are" if small else f"{_USUAL}           # every image is brought to this size"
    micro = max(2, min(32 if found.devices == 0 else 128, batch // ranks))
    digits = found.source == "data/digits"
    judged = (
        "linear and k-NN accuracy on the split `test`"
        if found.test and found.labelled
        else ("the data have no labels or no split `test`, so evaluations give what needs neither")
    )
    corrupt = "  on_corrupt: skip           # some files are no images that can be read\n" if found.broken else ""
    views = (
        "views:                       # digits change their meaning when flipped; colours they have none\n"
        "  crop_scale: [0.5, 1.0]\n  flip: 0.0\n  jitter: [0.4, 0.4, 0.0, 0.0]\n  grayscale: 0.0\n"
        if digits
        else "views:                       # two random views of every image; `rkdo settings views`\n"
        "  crop_scale: [0.2, 1.0]     # area of the crop, as a share of the image's\n"
    )
    about = {
        "rkdo": "rkdo            # Recursive KL Divergence Optimization; others: icon, infonce, ...",
        "infonce": "infonce         # the common baseline: everything else as in rkdo.yaml",
    }[objective]
    return f"""\
# Written by `rkdo init` for {found.samples:,} images in the split {found.split!r} and {found.machine}.
# Every setting with its default and meaning: `rkdo settings`. Any of them can be changed on the command line:
#   rkdo train {objective}.yaml train.epochs=20 run.dir=runs/longer
field:
  objective: {about}
  temperature: 0.5
data:
  source: {yaml.safe_dump(found.source).strip().removesuffix("...").strip()}
  split: {found.split}
  image_size: {size}
{corrupt}  workers: {max(1, min(4, found.cores // ranks - 1))}                 # loader processes of each rank
{views}encoder:
  backbone: resnet18         # any of torchvision's, timm/NAME, or your package.module:factory
  stem: {"cifar                # for small images" if small else "imagenet"}
  # weights: DEFAULT         # begin with the library's pretrained weights, or a file, or hf://OWNER/NAME
train:
  global_batch: {batch}          # samples in a step, whatever the machine
  micro_batch: {micro}            # embedded at a time: {batch // micro} parts, so up to {batch // micro} processes
  epochs: 10
  learning_rate: 0.001
  schedule: cosine
evaluate:                    # {judged}
  at_end: true
run:
  dir: runs/{objective}
  seed: 42
"""


def _script(found: Found) -> str:
    ranks = _ranks(found)
    prepare = (
        "[ -e data/digits/index.json ] || rkdo prepare digits --out data/digits\n"
        if found.source == "data/digits"
        else ""
    )
    several, precision = "--multi_gpu " if ranks > 1 else "", "bf16" if found.bf16 else "no"
    return f"""\
#!/usr/bin/env bash
# Written by `rkdo init`: train on {found.machine}, with {ranks} {"process" if ranks == 1 else "processes"}.
#   ./train.sh [CONFIG] [key=value ...]     RANKS=N for another number
#   PRECISION of the encoder: no (float32), or bf16, the choice for GPUs that have it (Ampere and newer)
# A stopped run continues where it was, also on another number of processes.
set -euo pipefail
cd "$(dirname "$0")"
config=rkdo.yaml
if [ "$#" -gt 0 ] && [ -f "$1" ]; then
  config=$1
  shift
fi
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-1}}
{prepare}exec accelerate launch {several}--num_machines 1 --num_processes "${{RANKS:-{ranks}}}" --main_process_port 0 \\
  --mixed_precision "${{PRECISION:-{precision}}}" --dynamo_backend no -m rkdo_dist train "$config" run.resume=auto "$@"
"""


def _slurm(found: Found) -> str:
    devices = max(1, found.devices)
    return f"""\
#!/usr/bin/env bash
#SBATCH --job-name=rkdo
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node={devices}
#SBATCH --cpus-per-task={found.cores}
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%j.out
# Written by `rkdo init`: sbatch slurm.sh [CONFIG] [key=value ...]. At the time limit the run is saved; submit again.
# PRECISION=bf16 sbatch slurm.sh: the choice for GPUs that have it, which a login node cannot know (see train.sh).
set -euo pipefail
RANKS=${{RANKS:-{devices}}} srun ./train.sh "$@"
"""
