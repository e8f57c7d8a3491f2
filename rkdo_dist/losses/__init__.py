"""Floor 3: field and exchange together, as loss modules (torch only)."""

from rkdo_dist.losses.inputs import FieldInputError
from rkdo_dist.losses.modules import FieldLoss, IConLoss, InfoNCELoss, RKDOLoss, SupervisedLoss

__all__ = ["FieldInputError", "FieldLoss", "IConLoss", "InfoNCELoss", "RKDOLoss", "SupervisedLoss"]
