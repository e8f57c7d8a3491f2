"""Backbones by name: torchvision's, timm's, small ResNets for 32x32 images, and the user's own.

Random weights are drawn from torch's global generator by each library's own rules; nothing is downloaded here.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

STEMS = ("imagenet", "cifar")
_CIFAR_RESNET = re.compile(r"cifar_resnet(\d+)(?:x(\d+))?")
_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
# A class count that no layer width equals, so that it marks the classifier wherever a backbone keeps it.
_MARK = 1009
# Auxiliary classifiers of the two Inceptions, for training with labels, which self-supervision does not have.
_AUXILIARY = ("aux1", "aux2", "AuxLogits")


@dataclass(frozen=True)
class Backbone:
    """A network without its classifier, and facts about it.

    Attributes:
        network: images (n, 3, H, W) to features (n, f).
        width: f.
        name: its name in messages.
        classifier: names of the modules that were removed with the classifier; their weights are ignored.
        pretrained: fetches the default weights of its library; None if there are none.
    """

    network: nn.Module
    width: int
    name: str
    classifier: tuple[str, ...] = ()
    pretrained: Callable[[], dict[str, Tensor]] | None = None


def is_code(name: str) -> bool:
    """Whether a backbone is named by an import path (`package.module:factory`), which executes code."""
    return _CODE.fullmatch(name) is not None


def make_backbone(chosen: str | nn.Module, stem: str = "imagenet") -> Backbone:
    """The backbone that a name, an import path or a module stands for (names: see `Encoder`).

    Raises:
        ValueError: for an unknown name (with the nearest ones), a factory that cannot be imported or called or makes
            something else, an unknown stem, or one that the backbone does not have.
    """
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; use one of {', '.join(STEMS)}")
    if isinstance(chosen, nn.Module):
        _only_imagenet(stem, type(chosen).__name__)
        return Backbone(chosen, _width(chosen, type(chosen).__name__), type(chosen).__name__)
    if is_code(chosen):
        _only_imagenet(stem, chosen)
        network = _made_by(chosen)
        return Backbone(network, _width(network, chosen), chosen)
    library, slash, name = chosen.rpartition("/")
    if slash and library not in ("torchvision", "timm"):
        raise ValueError(
            f"unknown backbone {chosen!r}; use NAME or torchvision/NAME, timm/NAME, or package.module:factory"
        )
    if library == "timm":
        _only_imagenet(stem, chosen)
        return _of_timm(name)
    small = _CIFAR_RESNET.fullmatch(chosen)
    if small:
        tiny = CifarResNet(int(small[1]), int(small[2] or 1))
        return Backbone(tiny, tiny.width, chosen)
    return _of_torchvision(name, stem)


def classification_backbones() -> list[str]:
    """Names of torchvision's image classification models, sorted."""
    return models.list_models(module=models)


def backbone_state(name: str) -> dict[str, Tensor]:
    """Names and shapes of the weights that a library's model has besides its classifier (the values are random)."""
    with torch.random.fork_rng([]):
        return dict(make_backbone(name).network.state_dict())


def nearest(name: str, names: Sequence[str], otherwise: str) -> str:
    """A hint at the nearest of `names`, or `otherwise` if none is near."""
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def _of_torchvision(name: str, stem: str) -> Backbone:
    names = classification_backbones()
    if name not in names:
        if name in models.list_models():
            raise ValueError(
                f"backbone {name!r} is not an image classification model (it detects, segments, is quantised "
                "or takes video); use one such as resnet18, resnet50, convnext_tiny or vit_b_16"
            )
        raise ValueError(
            f"unknown backbone {name!r}; {nearest(name, names, 'see the classification models of torchvision')}"
        )
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, weights=None, num_classes=_MARK, **options)
    if stem == "cifar":
        _use_cifar_stem(model, name)
    width, classifier = _remove_classifier(model, name)

    def pretrained() -> dict[str, Tensor]:
        # Loaded from torch's own address, and as tensors alone.
        return models.get_model_weights(name)["DEFAULT"].get_state_dict(progress=False, weights_only=True)

    return Backbone(model, width, name, (classifier, *_AUXILIARY), pretrained)


def _of_timm(name: str) -> Backbone:
    try:
        import timm
    except ImportError:
        raise ValueError(f"backbone=timm/{name} needs timm: pip install 'rkdo_dist[timm]'") from None
    if not timm.is_model(name.partition(".")[0]):  # also everything that timm would fetch or read a path for
        raise ValueError(
            f"unknown backbone 'timm/{name}'; {nearest(name, timm.list_models(), 'see timm.list_models()')}"
        )
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:  # a tag of weights that this model does not have
        raise ValueError(f"backbone 'timm/{name}': {error}; see timm.list_pretrained()") from None
    classifier = model.pretrained_cfg.get("classifier") or "head"

    def pretrained() -> dict[str, Tensor]:
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())

    width = getattr(model, "head_hidden_size", None) or model.num_features
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return Backbone(model, int(width), f"timm/{name}", classifiers, pretrained)


def _made_by(path: str) -> nn.Module:
    """The module that the factory at an import path returns; the working directory is searched too."""
    module_name, _, attribute = path.partition(":")
    if module_name == "python":
        raise ValueError(
            f"backbone={path} was a module that Python code gave: give it again, to rkdo_dist.train(encoder=...) or "
            "rkdo_dist.load_encoder(..., backbone=...)"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        factory: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"backbone={path}: cannot import {module_name} ({error})") from error
    for part in attribute.split("."):
        if not hasattr(factory, part):
            public = [name for name in dir(factory) if not name.startswith("_")]
            hint = nearest(part, public, f"it has {', '.join(public[:5]) or 'nothing public'}")
            raise ValueError(f"backbone={path}: {module_name} has no {part!r}; {hint}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise ValueError(f"backbone={path} is a {type(factory).__name__}, not a function or class")
    try:
        made = factory()
    except Exception as error:
        raise ValueError(f"backbone={path}: calling it failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"backbone={path} gives a {type(made).__name__}, not a torch.nn.Module")
    return made


def _width(network: nn.Module, name: str) -> int:
    """f of a user's network: its attribute `feature_dim` or `num_features`, or from one small forward pass."""
    for attribute in ("feature_dim", "num_features"):
        if isinstance(value := getattr(network, attribute, None), int):
            return value
    failure, own = "", getattr(network, "image_size", None)  # as torchvision's vision transformer has
    for side in ([own] if isinstance(own, int) else []) + [224, 64, 32]:
        try:
            features = probe(network, side)
        except Exception as error:
            failure = failure or f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        if isinstance(features, Tensor) and features.ndim == 2:
            return features.shape[1]
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"backbone {name} must map images (n, 3, H, W) to features (n, f), but gives {shape}")
    raise ValueError(f"cannot find the width of {name}'s features: give it an attribute feature_dim ({failure})")


@torch.no_grad()
def probe(network: nn.Module, side: int) -> Any:
    """The output of `network` for one black image of side x side, in evaluation mode; its state is restored."""
    parameter = next(network.parameters(), torch.empty(0))
    modes = {module: module.training for module in network.modules()}
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    network.eval()
    torch.use_deterministic_algorithms(False)  # the shape is what is asked for
    try:
        with torch.random.fork_rng([parameter.device] if parameter.is_cuda else []):
            return network(torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device))
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        for module, training in modes.items():
            module.training = training


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


def _remove_classifier(model: nn.Module, name: str) -> tuple[int, str]:
    """Put an identity where the classifier is; return the width that goes into it, and its name.

    The classifier is the last Linear or Conv2d that puts out `_MARK` values. What follows it (SqueezeNet
    pools after its classifying convolution) stays.
    """
    for path, module in reversed(list(model.named_modules())):
        if isinstance(module, nn.Linear) and module.out_features == _MARK:
            width = module.in_features
        elif isinstance(module, nn.Conv2d) and module.out_channels == _MARK:
            width = module.in_channels
        else:
            continue
        setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], nn.Identity())
        return width, path
    raise ValueError(f"backbone {name!r} has no classifier that can be removed; use another")


def _use_cifar_stem(model: nn.Module, name: str) -> None:
    """Replace a ResNet's 7x7 stride-2 convolution and max-pooling by a 3x3 convolution of stride 1."""
    if not isinstance(model, models.ResNet):
        raise _without_stem("cifar", name)
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    # The rule by which torchvision's ResNet draws its convolutions.
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def _only_imagenet(stem: str, name: str) -> None:
    if stem != "imagenet":
        raise _without_stem(stem, name)


def _without_stem(stem: str, name: str) -> ValueError:
    return ValueError(
        f'stem "{stem}" exists for ResNets only (those of torchvision), not for {name!r}; use stem "imagenet"'
    )
