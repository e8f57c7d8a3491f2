"""rkdo_dist: Recursive KL Divergence Optimization at scale."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rkdo_dist.export.pretrained import PretrainedEncoder, load_encoder
    from rkdo_dist.losses import FieldInputError, IConLoss, InfoNCELoss, RKDOLoss, SupervisedLoss

__version__ = "0.1.0"
__all__ = [
    "FieldInputError",
    "IConLoss",
    "InfoNCELoss",
    "PretrainedEncoder",
    "RKDOLoss",
    "SupervisedLoss",
    "__version__",
    "load_encoder",
]
_HOMES = {"PretrainedEncoder": "export.pretrained", "load_encoder": "export.pretrained"}  # of names other than losses


def __getattr__(name: str) -> object:
    # The losses need torch; the command line must answer --help without waiting for it.
    if name in __all__:
        return getattr(importlib.import_module(f"rkdo_dist.{_HOMES.get(name, 'losses')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
