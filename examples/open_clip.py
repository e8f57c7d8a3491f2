"""The loss of open_clip in bounded memory: the same call and value as `open_clip.ClipLoss`.

    import examples.open_clip as bounded
    loss = bounded.ClipLoss()  # in place of open_clip.ClipLoss(local_loss=True, gather_with_grad=True, ...)
    total = loss(image_features, text_features, logit_scale)

Ranks and world size are those of torch's process group, so none need be given; columns travel as `exchange` says.
"""

from __future__ import annotations

from torch import Tensor, nn

from rkdo_dist import InfoNCELoss


class ClipLoss(nn.Module):
    """CLIP's symmetric InfoNCE; arguments of `forward` as open_clip's, those of the constructor as `InfoNCELoss`."""

    def __init__(self, exchange: str = "gather", **options: object) -> None:
        super().__init__()
        self.loss = InfoNCELoss(symmetric=True, exchange=exchange, **options)  # type: ignore[arg-type]

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """The loss of unit-norm features (b, d) with similarities times `logit_scale` (already exponentiated)."""
        loss = self.loss(image_features, text_features, temperature=1 / logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss
