"""The process and its peers: the only file that knows Accelerate.

A launcher (`accelerate launch`, torchrun, or nothing at all) has set the environment; `start` turns it into a device, a
process group, a precision and a rank. `prepare` wraps the encoder for `run.reduction=fast` (DDP); in exact mode the
step sums gradients itself in a fixed order, so the encoder stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn

from rkdo_dist.exchange import group


class LaunchError(ValueError):
    """The launch and the configuration do not fit together; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Runtime:
    """This process's place in the job."""

    accelerator: Accelerator
    rank: int
    world: int
    device: torch.device
    precision: str
    scaler: torch.amp.GradScaler | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank zero, which alone writes files and talks to the terminal."""
        return self.rank == 0

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of the encoder's forward pass (Accelerate's `mixed_precision`)."""
        with self.accelerator.autocast():
            yield

    def wrap(self, encoder: nn.Module) -> nn.Module:
        """The encoder under the strategy's wrapper (DDP when there are several ranks)."""
        with warnings.catch_warnings():
            # Newer torch renames an option that Accelerate passes on.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            return self.accelerator.prepare_model(encoder)

    def without_sync(self, wrapped: nn.Module) -> contextlib.AbstractContextManager:
        """A context in which backward passes of `wrapped` only accumulate on this rank."""
        return self.accelerator.no_sync(wrapped)


def start(threads: int, timeout: int, reduction: str) -> Runtime:
    """Join the process group that the launcher described and choose the device.

    Args:
        threads: CPU threads per rank. On a CPU the order of additions inside an operator depends on it.
        timeout: seconds after which a collective gives up on a peer that does not answer.
        reduction: "exact" or "fast".

    Raises:
        LaunchError: for a strategy or precision that this version does not run.
    """
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=on_cpu,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    torch.set_num_threads(threads)  # after Accelerate, which sets its own guess
    if accelerator.distributed_type in (
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
        DistributedType.MEGATRON_LM,
    ):
        raise LaunchError(
            f"the Accelerate configuration asks for {accelerator.distributed_type.value}, which this version does not "
            "train with: launch with --multi_gpu (DDP) or one process"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise LaunchError(
            f"mixed_precision={accelerator.mixed_precision} is not supported by this version: use bf16 or no"
        )
    if reduction == "exact":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return Runtime(
        accelerator=accelerator,
        rank=group.rank(),
        world=group.world_size(),
        device=accelerator.device,
        precision=accelerator.mixed_precision,
    )


def finish() -> None:
    """Leave the process group (nothing without one)."""
    if group.is_distributed():
        torch.distributed.destroy_process_group()
