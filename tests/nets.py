"""Networks of somebody's own, as a user would bring them by an import path."""

from __future__ import annotations

import os

from torch import Tensor, nn
from torchvision.models import VisionTransformer


def tiny_vit() -> nn.Module:
    """torchvision's vision transformer, small enough for tests: 16 tokens of images of 16 x 16."""
    vit = VisionTransformer(image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    vit.heads = nn.Identity()
    return vit


class Pooled(nn.Module):
    """A network without any attribute that says how wide its features are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) to (n, 12)."""
        return self.norm(self.conv(images)).relu().mean(dim=(2, 3))


def of_rank() -> nn.Module:
    """Begins with other weights on every rank, which no seed of the run can prevent."""
    network = Pooled()
    nn.init.constant_(network.conv.weight, 0.1 + int(os.environ.get("RANK", "0")))
    return network


class Unpooling(nn.Module):
    """A network with an operator that has no deterministic algorithm: torch.nn.MaxUnpool2d."""

    feature_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.unpool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) to (n, 4)."""
        return self.unpool(*self.pool(self.conv(images))).mean(dim=(2, 3))


def unpooled() -> nn.Module:
    """Gives maps instead of features."""
    return nn.Conv2d(3, 4, 3)


def broken() -> nn.Module:
    """Cannot be made."""
    raise RuntimeError("no such thing")


def number() -> int:
    """No network at all."""
    return 3
