"""rkdo_dist: Recursive KL Divergence Optimization at scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rkdo_dist.losses import FieldInputError, IConLoss, InfoNCELoss, RKDOLoss, SupervisedLoss

__version__ = "0.1.0"
__all__ = ["FieldInputError", "IConLoss", "InfoNCELoss", "RKDOLoss", "SupervisedLoss", "__version__"]


def __getattr__(name: str) -> object:
    # The losses need torch; the command line must answer --help without waiting for it.
    if name in __all__:
        from rkdo_dist import losses

        return getattr(losses, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
