"""Runtime of a process: ranks, device, precision. The only module that uses Accelerate.

A launcher (`accelerate launch`, torchrun, or nothing at all) has set the environment; `start` turns it into a device, a
process group, a strategy, a precision and a rank. The Accelerate configuration alone chooses strategy and precision:

- one process or DDP: `run.reduction` decides who sums gradients (`training.exact`, `training.averaged`);
- DeepSpeed ZeRO 1 to 3 (`training.zero`): DeepSpeed sums them, so "exact" becomes "fast".

Precision is autocast around the encoder under every strategy, with float32 weights: the same mathematics everywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.distributed import distributed_c10d

from rkdo_dist.exchange import group
from rkdo_dist.ranks import arithmetic
from rkdo_dist.ranks.arithmetic import Precision
from rkdo_dist.ranks.launch import LaunchError
from rkdo_dist.ranks.loss_scale import LossScale

Reduction = Literal["exact", "fast", "ring"]
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # options of malloc, from malloc.h
_LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """This process's place in the job.

    Attributes:
        strategy: "single", "ddp", "zero-1", "zero-2" or "zero-3".
        precision: of the encoder's forward pass: "no" (float32), "bf16" or "fp16".
        reduction: how sums and columns travel in effect: "exact", "fast" or "ring".
        loss_scale: for fp16, the same under every strategy; None otherwise.
    """

    accelerator: Accelerator
    rank: int
    world: int
    device: torch.device
    precision: str
    strategy: str
    reduction: Reduction
    loss_scale: LossScale | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank zero, which alone writes files and prints."""
        return self.rank == 0

    @property
    def launch(self) -> dict[str, str]:
        """Choices of the launch, for environment.json and checkpoints."""
        return {"strategy": self.strategy, "precision": self.precision, "reduction": self.reduction}

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 without DeepSpeed."""
        return int(self.strategy.removeprefix("zero-")) if self.strategy.startswith("zero-") else 0

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of the encoder's forward pass (Accelerate's `mixed_precision`)."""
        if self.precision == "no":
            yield
            return
        with torch.autocast(self.device.type, dtype=_LOW_PRECISION[self.precision]):
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

    def sharded(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> Any:
        """DeepSpeed's engine around `model`, which takes `optimizer` over and clips gradients (collective)."""
        self.accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = clip or 0.0
        return self.accelerator.prepare(model, optimizer)[0]


def start(threads: int, timeout: int, reduction: Reduction, precision: Precision | None = None) -> Runtime:
    """Join the process group that the launcher described and choose the device.

    Args:
        threads: CPU threads per rank. On a CPU the order of additions inside an operator depends on it.
        timeout: seconds after which a collective gives up on a peer that does not answer.
        reduction: `run.reduction`.
        precision: `run.matmul_precision`.

    Raises:
        LaunchError: for a strategy or precision that this version does not run.
    """
    _refuse_what_is_not_run()
    _before_a_device()
    _membership.enter(timeout)
    deepspeed = _flag("ACCELERATE_USE_DEEPSPEED")
    on_cpu = not torch.accelerator.is_available()
    if deepspeed:
        _prepare_for_deepspeed(on_cpu)
    backend = "gloo" if deepspeed and on_cpu else None
    try:
        accelerator = Accelerator(
            cpu=on_cpu and not deepspeed,  # with cpu=True Accelerate silently turns DeepSpeed off
            kwargs_handlers=[
                InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=timeout)),
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    except ValueError as error:
        if "fp16" in str(error):
            raise LaunchError(
                f"mixed_precision=fp16 needs a GPU ({error}): use --mixed_precision bf16 or no here"
            ) from error
        raise
    group.open_control(timeout)
    torch.set_num_threads(threads)  # after Accelerate, which sets its own guess
    if on_cpu:
        keep_freed_memory()
    strategy = _strategy(accelerator)
    mixed = accelerator.mixed_precision
    if mixed not in ("no", *_LOW_PRECISION):
        raise LaunchError(f"mixed_precision={mixed} is not supported: use fp16, bf16 or no")
    if strategy.startswith("zero-"):
        reduction = "fast" if reduction == "exact" else reduction
        _settle_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, on_cpu)
    arithmetic.choose(accelerator.device, reduction == "exact", precision)
    return Runtime(
        accelerator=accelerator,
        rank=group.rank(),
        world=group.world_size(),
        device=accelerator.device,
        precision=mixed,
        strategy=strategy,
        reduction=reduction,
        loss_scale=_loss_scale(accelerator) if mixed == "fp16" else None,
    )


def _before_a_device() -> None:
    """Set what libraries of a GPU read from the environment when they start, unless the user has.

    cuBLAS is deterministic with a workspace of fixed size; NCCL's flight recorder keeps the last collectives of every
    rank, and writes them to a file at a timeout; kernels of Triton and torch.compile go to a local disk, not
    from all ranks of all nodes at once to a shared one.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name in ("triton", "torchinductor"):
        cache = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
        with contextlib.suppress(OSError):
            cache.mkdir(mode=0o700, exist_ok=True)
            there = cache.lstat()
            if stat.S_ISDIR(there.st_mode) and there.st_uid == os.getuid() and not there.st_mode & 0o022:  # ours alone
                os.environ.setdefault(f"{name.upper()}_CACHE_DIR", str(cache))


def keep_freed_memory() -> None:
    """Let the C library keep memory that tensors have freed, for those of the next step.

    It would give it back to the system, and each of its pages would be cleared and mapped anew: a tenth of a step of
    ResNet-18. Without glibc nothing happens.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_TRIM_THRESHOLD, -1), (_MMAP_THRESHOLD, 1 << 30)):
            mallopt(option, value)


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _refuse_what_is_not_run() -> None:
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM")):
        if _flag(name):
            raise LaunchError(
                f"the Accelerate configuration asks for {what}, which this version does not train with: use DeepSpeed "
                "(--use_deepspeed --zero_stage 1, 2 or 3), DDP (--multi_gpu), or one process"
            )


def _prepare_for_deepspeed(on_cpu: bool) -> None:
    """Prepare the import of DeepSpeed.

    Raises:
        LaunchError: if it, or what Accelerate needs for it, is not installed.
    """
    missing = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise LaunchError(
            f"the Accelerate configuration asks for DeepSpeed, but {' and '.join(missing)} cannot be imported: "
            "pip install 'rkdo_dist[deepspeed]'"
        )
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _without_compiler()
    # DeepSpeed still calls collectives by names that newer torch calls old.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..*is deprecated", category=FutureWarning)
    # Started without a launcher's environment (python -m rkdo_dist with the variable set): one rank.
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)


def _without_compiler() -> None:
    """Keep DeepSpeed on CPUs from compiling an operator for inference (it takes a minute and needs a compiler)."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _strategy(accelerator: Accelerator) -> str:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        if stage not in (1, 2, 3):
            raise LaunchError(f"DeepSpeed without sharding (ZeRO stage {stage}): use --zero_stage 1, 2 or 3, or DDP")
        return f"zero-{stage}"
    return "ddp" if group.world_size() > 1 else "single"


def _loss_scale(accelerator: Accelerator) -> LossScale:
    """As Accelerate's GradScaler is set, or as they are by default (it is switched off without a GPU)."""
    scaler = getattr(accelerator, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return LossScale()
    return LossScale(
        scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()
    )


def _settle_deepspeed(config: dict[str, Any], on_cpu: bool) -> None:
    """Adapt a DeepSpeed configuration so that it computes the same as other strategies, or refuse it.

    Micro-batches are the step's own (each is its own backward pass, one `step` ends them), precision is autocast, and
    `train.clip_gradient` alone clips: Accelerate would clip at 1.0 where the configuration says "auto".

    Raises:
        LaunchError: naming the key.
    """
    zero = config["zero_optimization"]
    if config.get("gradient_clipping", "auto") not in ("auto", 0, 0.0):
        raise LaunchError(
            f"the DeepSpeed configuration clips gradients (gradient_clipping={config['gradient_clipping']}): remove it "
            "and set train.clip_gradient, which is the same in every strategy"
        )
    if config.get("gradient_accumulation_steps", "auto") not in ("auto", 1):
        raise LaunchError(
            f"gradient_accumulation_steps={config['gradient_accumulation_steps']}: micro-batches are set by "
            "train.micro_batch here; remove it or set it to 1"
        )
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") not in ("none", None):
            raise LaunchError(f"zero_optimization.{key} is not supported by this version: set its device to none")
    if "optimizer" in config or "scheduler" in config:
        raise LaunchError(
            "the DeepSpeed configuration sets an optimizer or scheduler: use train.optimizer, ... instead"
        )
    config.update(
        gradient_clipping=0.0,
        gradient_accumulation_steps=1,
        managed_gradient_accumulation=False,
        train_micro_batch_size_per_gpu=1,  # it only multiplies DeepSpeed's own count of samples
        train_batch_size="auto",
        bf16={"enabled": False},
        fp16={"enabled": False},
    )
    config.pop("torch_autocast", None)
    zero["compute_grad_norm"] = True  # by which a gradient that is not finite is found
    zero["overlap_comm"] = False  # a path that only GPUs take, and that has not been run with a backward for each lane


class _Membership:
    """This process's membership in the default group: what it was in before is left as it was.

    A script may train more than once. Accelerate keeps its state for the life of a process, and a store that ranks met
    through remembers the addresses of the group they have left, so another group meets under a prefix of its own.
    """

    def __init__(self) -> None:
        self._backends: list[str] = []  # of the groups left
        self._store: Any = None  # of the first one; if rank zero let it go, a rank that is ahead would lose it
        self._others_group = self._others_state = False

    def enter(self, timeout: int) -> None:
        """Note whether the group is somebody else's; join one again where this process has left one."""
        self._others_group, self._others_state = group.is_distributed(), bool(PartialState._shared_state)
        if self._others_group or not self._backends:
            return
        patience = timedelta(seconds=timeout)
        store, rank, world = next(torch.distributed.rendezvous("env://", timeout=patience))
        store = torch.distributed.PrefixStore(f"rkdo_dist {len(self._backends)}", store)
        torch.distributed.init_process_group(
            self._backends[-1], store=store, rank=rank, world_size=world, timeout=patience
        )

    def leave(self, intact: bool) -> None:
        """Leave the group, unless it was there before."""
        group.close_control(broken=not intact)
        if not intact and group.is_distributed() and torch.distributed.get_backend() != "gloo":
            return  # it waits for collectives that will never end; the process does not live much longer
        if group.is_distributed() and not self._others_group:
            self._backends.append(torch.distributed.get_backend())
            self._store = self._store or distributed_c10d._get_default_store()
            gc.collect()  # what the step's graphs hold of the group, while Python can still let it go
            torch.distributed.destroy_process_group()
        if not self._others_state:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


_membership = _Membership()


def finish(intact: bool) -> None:
    """Leave the process group (nothing without one, or if it was there before `start`).

    Args:
        intact: whether every rank leaves it so; a broken group of a device is left as it is.
    """
    _membership.leave(intact)
