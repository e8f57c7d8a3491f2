"""Encoders: torchvision classification backbones without their classifier, and projection heads."""

from __future__ import annotations

import difflib
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

HEADS = ("released", "paper")
STEMS = ("imagenet", "cifar")
_CIFAR_RESNET = re.compile(r"cifar_resnet(\d+)(?:x(\d+))?")
# A class count that no layer width equals, so that it marks the classifier wherever a backbone keeps it.
_MARK = 1009


class Encoder(nn.Module):
    """Backbone, projection head, normalisation to unit length: images to embeddings.

    The head is the released notebook's (Linear f-f, ReLU, Linear f-d) or that of the paper's section 4.1
    (Linear f-f, BatchNorm1d, ReLU, Linear f-d), with f the backbone's width. Weights are drawn from torch's
    global generator by torchvision's and torch's own rules; nothing is downloaded.

    Args:
        backbone: any of torchvision's image classification models by name, such as "resnet18"; or one of the small
            ResNets for 32x32 images, "cifar_resnet8", 20, 32, ... (see `CifarResNet`).
        head: "released" or "paper".
        embedding_dim: d, the embeddings' width (64 in the paper).
        stem: "imagenet" for torchvision's first layers; "cifar" for a 3x3 convolution of stride 1 without
            max-pooling, as is usual for 32x32 images. torchvision's ResNets only; the small ones always have it.

    Attributes:
        feature_dim: f, the width of the backbone's features.
        embedding_dim: d.

    Raises:
        ValueError: for an unknown backbone (with the nearest names), one that is not a classification model, an
            unknown head or stem, a stem that the backbone does not have, or `embedding_dim` < 1.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        head: str = "released",
        embedding_dim: int = 64,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"unknown projection head {head!r}; use one of {', '.join(HEADS)}")
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {embedding_dim}")
        self.backbone, self.feature_dim = _backbone(backbone, stem)
        self.embedding_dim = embedding_dim
        f = self.feature_dim
        norm = [nn.BatchNorm1d(f)] if head == "paper" else []
        self.head = nn.Sequential(nn.Linear(f, f), *norm, nn.ReLU(inplace=True), nn.Linear(f, embedding_dim))

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Backbone features and unit-length embeddings of a batch of images.

        Args:
            images: (n, 3, H, W), floating point, normalised.

        Returns:
            Features (n, f) and embeddings (n, d) with rows of Euclidean norm 1, both float32 (float64 if the
            module is), also under autocast: only the backbone and the head run in lower precision.
        """
        features = self.backbone(images)
        projected = self.head(features)
        with torch.autocast(images.device.type, enabled=False):
            return _at_least_float32(features), F.normalize(_at_least_float32(projected), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings of `features`: (n, 3, H, W) to (n, d), float32, rows of norm 1."""
        return self.features(images)[1]


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def classification_backbones() -> list[str]:
    """Names of torchvision's image classification models, sorted."""
    return models.list_models(module=models)


def _backbone(name: str, stem: str) -> tuple[nn.Module, int]:
    """The named model with an identity in place of its classifier, and the width of its features."""
    small = _CIFAR_RESNET.fullmatch(name)
    if small:
        network = CifarResNet(int(small[1]), int(small[2] or 1))
        return network, network.width
    names = classification_backbones()
    if name not in names:
        if name in models.list_models():
            raise ValueError(
                f"backbone {name!r} is not an image classification model (it detects, segments, is quantised "
                "or takes video); use one such as resnet18, resnet50, convnext_tiny or vit_b_16"
            )
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see torchvision's classification models"
        raise ValueError(f"unknown backbone {name!r}; {hint}")
    # The two Inceptions have auxiliary classifiers for training with labels, which self-supervision has not.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, weights=None, num_classes=_MARK, **options)
    if stem == "cifar":
        _use_cifar_stem(model, name)
    elif stem != "imagenet":
        raise ValueError(f"unknown stem {stem!r}; use one of {', '.join(STEMS)}")
    return model, _remove_classifier(model, name)


class CifarResNet(nn.Sequential):
    """The ResNets for 32x32 images of He et al. (2016), section 4.2: 3x3 stem, three stages of n basic blocks, mean.

    "cifar_resnet20" is depth 6 n + 2 = 20, with 16, 32 and 64 channels; "cifar_resnet8x4" has four times as many.
    torchvision's ResNets begin with an eighth of the resolution and have 40 times the weights. Shortcuts that change
    the shape are 1x1 convolutions (the paper's option B), weights are drawn as torchvision draws its ResNets'.

    Args:
        depth: 8, 14, 20, ...
        widen: what the numbers of channels are multiplied by.

    Attributes:
        width: of the features, 64 times `widen`.
    """

    def __init__(self, depth: int, widen: int = 1) -> None:
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest or widen < 1:
            raise ValueError(f"cifar_resnet{depth}: the depth must be 8, 14, 20, ... (6 n + 2), its factor at least 1")
        channels = 16 * widen
        stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(channels), nn.ReLU()]
        for stage in range(3):
            for block in range(blocks):
                layers.append(_basic_block(channels, 16 * widen * 2**stage, 2 if stage and not block else 1))
                channels = 16 * widen * 2**stage
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.width = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _basic_block(channels: int, out: int, stride: int) -> BasicBlock:
    same = stride == 1 and channels == out
    shortcut = None if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    return BasicBlock(channels, out, stride, shortcut)


def _remove_classifier(model: nn.Module, name: str) -> int:
    """Put an identity where the classifier is; return the width that goes into it.

    The classifier is the last Linear or Conv2d that puts out `_MARK` values. What follows it (SqueezeNet
    pools after its classifying convolution) stays.
    """
    for path, module in reversed(list(model.named_modules())):
        parent = model.get_submodule(path.rpartition(".")[0])
        if isinstance(module, nn.Linear) and module.out_features == _MARK:
            width = module.in_features
        elif isinstance(module, nn.Conv2d) and module.out_channels == _MARK:
            width = module.in_channels
        else:
            continue
        setattr(parent, path.rpartition(".")[2], nn.Identity())
        return width
    raise ValueError(f"backbone {name!r} has no classifier that can be taken off; use another")


def _use_cifar_stem(model: nn.Module, name: str) -> None:
    """Replace a ResNet's 7x7 stride-2 convolution and max-pooling by a 3x3 convolution of stride 1."""
    if not isinstance(model, models.ResNet):
        raise ValueError(f'stem "cifar" exists for ResNets only, not for {name!r}; use stem "imagenet"')
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    # The rule by which torchvision's ResNet draws its convolutions.
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
