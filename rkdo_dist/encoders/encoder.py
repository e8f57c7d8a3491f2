"""The encoder: backbone, projection head, embeddings (of unit length)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkdo_dist.encoders.backbones import Backbone, make_backbone, nearest, probe
from rkdo_dist.encoders.weights import load_into, read_weights
from rkdo_dist.web import waiting

HEADS = ("released", "paper")
WHOLE = "backbone"  # as a value of `freeze`


class Encoder(nn.Module):
    """Backbone, projection head, normalisation to unit length if asked for: images to embeddings.

    The head is the released notebook's (Linear f-f, ReLU, Linear f-d) or that of the paper's section 4.1
    (Linear f-f, BatchNorm1d, ReLU, Linear f-d), with f the backbone's width. Random weights are drawn from torch's
    global generator by each library's own rules, also those that `weights` replaces. Nothing is downloaded or imported
    that the arguments do not name.

    Args:
        backbone: what maps images (n, 3, H, W) to features (n, f):
            "resnet18" or "torchvision/resnet18", any of torchvision's image classification models;
            "timm/vit_small_patch16_224", any of timm's (the extra `timm`);
            "cifar_resnet8", 20, 32, ..., the small ResNets for 32x32 images (see `CifarResNet`);
            "package.module:factory", a function or class that is imported and called without arguments;
            or a `torch.nn.Module`, which becomes part of the encoder. Of the last two, f is the attribute `feature_dim`
            or `num_features`, or is found by one forward pass.
        head: "released" or "paper".
        embedding_dim: d, the embeddings' width (64 in the paper).
        stem: "imagenet" for torchvision's first layers; "cifar" for a 3x3 convolution of stride 1 without
            max-pooling, as is usual for 32x32 images. torchvision's ResNets only; the small ones always have it.
        head_width: width of the head's hidden layers; None: f.
        head_depth: number of the head's linear layers (2 in both named heads; 1: no hidden layer).
        weights: what the backbone begins with: "none" (random), "DEFAULT" (the pretrained weights that torchvision or
            timm recommends; downloaded unless cached), a `.safetensors` or torch file, a directory with
            `model.safetensors`, or `hf://OWNER/NAME[@REVISION][/FILE]`. Classifier weights are ignored; everything
            else must fit. Pretrained weights expect images normalised as in their training: see `views.mean`.
        freeze: how much of the backbone is not trained, from its first layer on: a number of its children (2), or the
            name of the last frozen part ("layer2", "blocks.5"), or "backbone" for all of it; "none" or 0 for nothing.
            Frozen parts stay in evaluation mode, batch norm and dropout included.
        unit_norm: whether embeddings are divided by their length, as the cosine affinity asks; without, they are what
            the head gives.

    Attributes:
        feature_dim: f, the width of the backbone's features.
        embedding_dim: d.

    Raises:
        ValueError: for an unknown backbone (with the nearest names), one that is not a classification model, an
            unknown head or stem, a stem that the backbone does not have, a size < 1, weights that cannot be read or do
            not fit (naming the keys), or a part to freeze that there is not.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        head: str = "released",
        embedding_dim: int = 64,
        stem: str = "imagenet",
        *,
        head_width: int | None = None,
        head_depth: int = 2,
        weights: str = "none",
        freeze: int | str = 0,
        unit_norm: bool = True,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"unknown projection head {head!r}; use one of {', '.join(HEADS)}")
        for name, size in (("embedding_dim", embedding_dim), ("head_width", head_width), ("head_depth", head_depth)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        found = make_backbone(backbone, stem)
        self.backbone, self.feature_dim, self._name = found.network, found.width, found.name
        self.embedding_dim, self.unit_norm = embedding_dim, unit_norm
        hidden = self.feature_dim if head_width is None else head_width
        self.head = _head(head, self.feature_dim, hidden, head_depth, embedding_dim)
        if weights != "none":
            _begin_with(found, weights)
        self._frozen = list(_frozen(self.backbone, str(freeze)))
        for module in self._frozen:
            module.eval()

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Backbone features and embeddings of a batch of images.

        Args:
            images: (n, 3, H, W), floating point, normalised.

        Returns:
            Features (n, f) and embeddings (n, d), with rows of Euclidean norm 1 if `unit_norm`, both float32 (float64
            if the module is), also under autocast: only the backbone and the head run in lower precision.
        """
        features = self.backbone(images)
        projected = self.head(features)
        with torch.autocast(images.device.type, enabled=False):
            embeddings = _at_least_float32(projected)
            return _at_least_float32(features), F.normalize(embeddings, dim=1) if self.unit_norm else embeddings

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings of `features`: (n, 3, H, W) to (n, d), float32."""
        return self.features(images)[1]

    def train(self, mode: bool = True) -> Encoder:
        """Training or evaluation mode, except that frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def digest(self) -> str:
        """SHA-256 (hex) over all weights and buffers."""
        found = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def check_image_size(self, size: int) -> None:
        """Check that the backbone takes images of size x size and gives features (n, f), by one forward pass.

        Raises:
            ValueError: saying what it answered.
        """
        try:
            features = probe(self.backbone, size)
        except Exception as error:  # a backbone may raise anything
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"backbone={self._name} cannot take images of {size} x {size} ({reason}): set data.image_size "
                "to a size that it is made for, e.g. 224"
            ) from error
        if not isinstance(features, Tensor) or features.shape != (1, self.feature_dim):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"backbone={self._name} must map images (n, 3, H, W) to features (n, {self.feature_dim}), "
                f"but one image of {size} x {size} gives {shape}"
            )


def _head(kind: str, features: int, hidden: int, depth: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        norm = [nn.BatchNorm1d(hidden)] if kind == "paper" else []
        layers += [nn.Linear(features, hidden), *norm, nn.ReLU(inplace=True)]
        features = hidden
    return nn.Sequential(*layers, nn.Linear(features, out))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _begin_with(backbone: Backbone, weights: str) -> None:
    if weights != "DEFAULT":
        state = read_weights(weights)
    elif backbone.pretrained is None:
        raise ValueError(f"weights=DEFAULT: {backbone.name} has no pretrained weights; name a file or hf://...")
    else:
        try:
            with waiting(f"the weights of {backbone.name}"):
                state = backbone.pretrained()
        except Exception as error:  # no such weights, no network, no space, ...
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"weights=DEFAULT: cannot get the weights of {backbone.name}: {reason}") from error
    load_into(backbone.network, state, backbone.name, weights, backbone.classifier)


def _frozen(backbone: nn.Module, upto: str) -> Iterator[nn.Module]:
    """Make everything up to and including a part untrainable; yields the modules that must stay in evaluation mode."""
    if upto in ("none", "0"):
        return
    if upto == WHOLE:
        backbone.requires_grad_(False)
        yield backbone
        return
    if upto.isdecimal():
        parts = [name for name, child in backbone.named_children() if any(True for _ in child.parameters())]
        if int(upto) > len(parts):
            raise ValueError(f"freeze={upto}: the backbone has {len(parts)} parts: {', '.join(parts)}")
        upto = parts[int(upto) - 1]
    names = [name for name, _ in backbone.named_modules() if name]
    if upto not in names:
        children = ", ".join(name for name, _ in backbone.named_children())
        hint = nearest(upto, names, f"it has {children}")
        raise ValueError(f"freeze={upto}: the backbone has no such part; {hint}")
    parent = backbone
    for step in upto.split("."):
        for parameter in parent.parameters(recurse=False):  # class tokens, position embeddings
            parameter.requires_grad_(False)
        for name, child in parent.named_children():
            if name == step:
                parent = child
                break
            yield child.requires_grad_(False)
    yield parent.requires_grad_(False)
