"""`NTXentLoss` of lightly in bounded memory: the same call and value.

    from examples.lightly import NTXentLoss
    loss = NTXentLoss(temperature=0.5)         # in place of lightly.loss.NTXentLoss(0.5, gather_distributed=True)
    value = loss(out0, out1)

There is no memory bank: its columns would be `extra_columns` of the cross pairing, see `rkdo_dist.losses.FieldLoss`.
"""

from __future__ import annotations

from torch import Tensor, nn

from rkdo_dist import InfoNCELoss


class NTXentLoss(nn.Module):
    """SimCLR's loss of two views (b, d) of any length."""

    def __init__(self, temperature: float = 0.5, exchange: str = "gather") -> None:
        super().__init__()
        self.loss = InfoNCELoss(temperature, pairing="joint", exchange=exchange, normalise=True)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean over both views."""
        return self.loss(out0, out1)
