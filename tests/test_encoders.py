"""Encoders: backbones lose their classifier, heads are as named, embeddings are unit float32."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torchvision import models

from rkdo_dist.encoders import CifarResNet, Encoder, classification_backbones

# The last of each family by name, but for RegNets, which cannot be built on the meta device, a small one.
FAMILIES = {re.match(r"[a-z]+(_v\d)?", n)[0]: n for n in classification_backbones()}
FAMILIES["regnet"] = "regnet_y_400mf"


@pytest.mark.parametrize("name", sorted(FAMILIES.values()))
def test_every_family_of_backbones_gives_features_of_the_promised_width(name: str) -> None:
    """On the meta device: shapes of the largest models without their memory or time."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        encoder = Encoder(name)
        size = 299 if name == "inception_v3" else 224
        features = encoder.backbone(torch.empty(2, 3, size, size))
        assert features.shape == (2, encoder.feature_dim)
        assert encoder.head(features).shape == (2, 64)
    assert all(getattr(m, "out_features", getattr(m, "out_channels", 0)) != 1009 for m in encoder.modules())


def test_resnet18_is_torchvisions_up_to_its_classifier() -> None:
    torch.manual_seed(0)
    reference = models.resnet18(weights=None)
    encoder = Encoder("resnet18")
    missing, unexpected = encoder.backbone.load_state_dict(reference.state_dict(), strict=False)
    assert not missing
    assert unexpected == ["fc.weight", "fc.bias"]
    reference.fc = nn.Identity()
    images = torch.randn(3, 3, 64, 64)
    assert torch.equal(encoder.eval().features(images)[0], reference.eval()(images))


def test_heads() -> None:
    kinds = {h: [type(m).__name__ for m in Encoder(head=h).head] for h in ("released", "paper")}
    assert kinds["released"] == ["Linear", "ReLU", "Linear"]
    assert kinds["paper"] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    head = Encoder(embedding_dim=7).head
    assert [tuple(p.shape) for p in head.parameters()] == [(512, 512), (512,), (7, 512), (7,)]


def test_cifar_stem_keeps_the_resolution() -> None:
    encoder = Encoder("resnet18", stem="cifar").eval()
    sizes = []
    encoder.backbone.layer1.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape)))
    encoder(torch.randn(1, 3, 32, 32))
    Encoder("resnet18").eval()(torch.randn(1, 3, 32, 32))
    assert sizes == [(1, 64, 32, 32)]
    scale = encoder.backbone.conv1.weight.std() * (64 * 9 / 2) ** 0.5  # fan-out initialisation
    assert 0.9 < scale < 1.1


def test_small_resnets_are_those_of_he_et_al() -> None:
    """Depth and weights of section 4.2: 0.27 million in ResNet-20, 0.85 in 56; 16, 32, 64 channels."""
    for depth, millions in ((20, 0.27), (56, 0.85)):
        network = CifarResNet(depth)
        weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len(weighted) + 1 == depth  # and the classifier
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    encoder = Encoder("cifar_resnet8x4")
    assert encoder.feature_dim == 256
    blocks = [m for m in encoder.backbone if isinstance(m, models.resnet.BasicBlock)]
    x, sizes = torch.randn(2, 3, 32, 32), []
    for layer in encoder.backbone:
        x = layer(x)
        if layer in blocks:
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 64)


@pytest.mark.parametrize("name", ["cifar_resnet9", "cifar_resnet2", "cifar_resnet8x0"])
def test_a_depth_that_no_small_resnet_has(name: str) -> None:
    with pytest.raises(ValueError, match=r"8, 14, 20"):
        Encoder(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_are_unit_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", head="paper").eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", dtype=dtype):
        features, embeddings = encoder.features(images)
        assert encoder.head(features).dtype == dtype  # autocast was on; only the end of the encoder leaves it
    assert features.dtype == embeddings.dtype == torch.float32
    # A norm taken in bfloat16 would be off by up to 2^-9.
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)


def test_float64_stays_float64() -> None:
    encoder = Encoder("resnet18").double().eval()
    features, embeddings = encoder.features(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert features.dtype == embeddings.dtype == torch.float64
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-14)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", head="paper", stem="cifar")
    (encoder(torch.randn(4, 3, 32, 32)) * torch.randn(4, 64)).sum().backward()
    # Batch norm takes the mean off, so the bias before it has a gradient of rounding size only.
    dead = [n for n, p in encoder.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not dead


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backbone": "resnet81"}, ["resnet81", "did you mean", "resnet18"]),
        ({"backbone": "ResNet18"}, ["did you mean", "resnet18"]),
        ({"backbone": "qqqqqqqqqq"}, ["qqqqqqqqqq", "classification"]),
        ({"backbone": "fasterrcnn_resnet50_fpn"}, ["fasterrcnn_resnet50_fpn", "not an image classification"]),
        ({"backbone": "fcn_resnet50"}, ["not an image classification"]),
        ({"backbone": "quantized_resnet18"}, ["not an image classification"]),
        ({"backbone": "vgg11", "stem": "cifar"}, ["ResNets only", "vgg11"]),
        ({"stem": "tiny"}, ["'tiny'", "imagenet, cifar"]),
        ({"head": "mlp"}, ["'mlp'", "released, paper"]),
        ({"embedding_dim": 0}, ["embedding_dim", "0"]),
    ],
)
def test_bad_arguments_are_named(arguments: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught, torch.device("meta"):
        Encoder(**arguments)
    for word in words:
        assert word in str(caught.value)
