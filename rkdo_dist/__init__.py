"""rkdo_dist: Recursive KL Divergence Optimization at scale."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rkdo_dist.export.pretrained import PretrainedEncoder, load_encoder
    from rkdo_dist.interface import Run, train
    from rkdo_dist.losses import FieldInputError, FieldLoss, IConLoss, InfoNCELoss, RKDOLoss, SupervisedLoss
    from rkdo_dist.training.callbacks import Callback

__version__ = "0.1.0"
# The public interface: what is not in this list is private and may change with any version (docs/python.md).
__all__ = [
    "Callback",
    "FieldInputError",
    "FieldLoss",
    "IConLoss",
    "InfoNCELoss",
    "PretrainedEncoder",
    "RKDOLoss",
    "Run",
    "SupervisedLoss",
    "__version__",
    "load_encoder",
    "train",
]
_HOMES = {  # of names other than losses
    "Callback": "training.callbacks",
    "PretrainedEncoder": "export.pretrained",
    "Run": "interface",
    "load_encoder": "export.pretrained",
    "train": "interface",
}


def __getattr__(name: str) -> object:
    # The losses need torch; the command line must answer --help without waiting for it.
    if name in __all__:
        return getattr(importlib.import_module(f"rkdo_dist.{_HOMES.get(name, 'losses')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
