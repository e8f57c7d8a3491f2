"""What bits depend on beside code, settings and data: instruction sets, libraries, devices, and chosen algorithms.

Matrix products and sums are ordered by the instruction set that they are written for, so another kind of CPU or GPU, or
another version of a library, gives other last digits. A GPU's libraries also choose among algorithms, some of which add
in another order every time, and may round float32 to ten bits before they multiply (TF32).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

import PIL
import torch
from PIL import features

Precision = Literal["highest", "high"]


def choose(device: torch.device, exact: bool, precision: Precision | None) -> None:
    """Choose the algorithms of a device; a CPU's arithmetic leaves no choice.

    Args:
        exact: whether the same bits are promised, so that only deterministic algorithms are used.
        precision: of float32 in products and convolutions on a GPU: "highest", "high" (TF32), or the one that goes with
            `exact`.

    Raises:
        RuntimeError: later, from any operator that has no deterministic algorithm.
    """
    if device.type != "cuda":
        return
    tf32 = (precision or ("highest" if exact else "high")) == "high"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if exact:
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # it costs a pass


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Afterwards torch's number of threads and its choice of algorithms are as they were."""
    threads, cudnn, matmul = torch.get_num_threads(), torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


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
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "GPU": properties.name,
            "SMs": str(properties.multi_processor_count),  # cuBLAS divides its work by it
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "TF32 in products": str(torch.backends.cuda.matmul.allow_tf32),
            "TF32 in convolutions": str(torch.backends.cudnn.allow_tf32),
            "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
            "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""),
        }
    return facts
