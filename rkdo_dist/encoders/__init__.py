"""Encoders: a backbone (torchvision's, timm's or the user's own), a projection head, and initial weights."""

from rkdo_dist.encoders.backbones import CifarResNet, backbone_state, classification_backbones, is_code
from rkdo_dist.encoders.encoder import HEADS, Encoder
from rkdo_dist.encoders.weights import MODEL_FILE, hub_file, read_weights

__all__ = [
    "HEADS",
    "MODEL_FILE",
    "CifarResNet",
    "Encoder",
    "backbone_state",
    "classification_backbones",
    "hub_file",
    "is_code",
    "read_weights",
]
