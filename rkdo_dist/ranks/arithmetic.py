"""What bits depend on beside code, settings and data: instruction sets, libraries, devices.

Matrix products and sums are ordered by the instruction set that they are written for, so another kind of CPU or GPU, or
another version of a library, gives other last digits.
"""

from __future__ import annotations

import os

import PIL
import torch
from PIL import features


def arithmetic(device: torch.device) -> dict[str, str]:
    """Facts of this process, by name: the same facts, the same bits."""
    facts = {
        "torch": torch.__version__,
        "CPU capability": torch.backends.cpu.get_cpu_capability(),  # heeds ATEN_CPU_CAPABILITY
        "MKL_CBWR": os.environ.get("MKL_CBWR", ""),
        "threads": str(torch.get_num_threads()),
        "decoders": f"Pillow {PIL.__version__}, JPEG {features.version('jpg')}",
    }
    if device.type == "cuda":
        facts |= {
            "GPU": torch.cuda.get_device_name(device),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "TF32": str(torch.backends.cuda.matmul.allow_tf32),
        }
    return facts
