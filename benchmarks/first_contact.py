"""The parts of launch/first-contact.sh that are Python; each prints what it has found.

python benchmarks/first_contact.py environment | kernels
python benchmarks/first_contact.py synchronisations | trace SHARDS OUT
torchrun --nproc-per-node=2 benchmarks/first_contact.py killed | memory | slow SHARDS OUT
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import rkdo_dist
from rkdo_dist import cli
from rkdo_dist.field import fused
from rkdo_dist.field.objectives import Objective
from rkdo_dist.training.step import Step

PATIENCE = 10  # run.timeout, which `slow` outlasts
_STEP = 4  # the step that is looked at, or in which a fault happens
SETTINGS = {
    "field.objective": "rkdo",
    "encoder.backbone": "cifar_resnet8",
    "train.global_batch": 64,
    "train.micro_batch": 8,
    "train.epochs": 1,
    "train.batches_per_epoch": 6,
    "train.checkpoint_every": 2,
    "data.workers": 0,
    "evaluate.at_end": False,
    "run.timeout": PATIENCE,
}


def environment() -> None:
    """Versions, and every GPU."""
    print(f"rkdo_dist {rkdo_dist.__version__}, torch {torch.__version__}, python {platform.python_version()}")
    print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {torch.cuda.device_count()} GPUs")
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        print(f"GPU {number}: {found.name}, {found.multi_processor_count} SMs, {found.total_memory / 2**30:.0f} GiB")


def kernels() -> None:
    """The fused kernel against the eager one, for every depth that it takes."""
    device, failed = torch.device("cuda"), False
    for depth in range(1, fused.MOST_LEVELS + 1):
        for dtype in (torch.float32, torch.float64):
            for pairing in ("cross", "joint"):
                why = fused.self_check(Objective.rkdo(depth, pairing=pairing), dtype, device)
                failed |= why is not None
                print(f"depth {depth}, {dtype}, {pairing}: {why or 'agrees to 1e-5'}")
    sys.exit(int(failed))


class Synchronisations:
    """Counts the host's waits for the device in one step, by file and line."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def on_step(self, record: dict[str, Any]) -> None:
        """Begin after the step before, end after the step."""
        if record["step"] == _STEP - 1:
            self._shown, warnings.showwarning = warnings.showwarning, self._count  # type: ignore[assignment]
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif record["step"] == _STEP:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self._shown

    def _count(self, message: Any, category: Any, file: str, line: int, *rest: Any) -> None:
        if "synchroniz" in str(message):
            self.found[f"{file}:{line}"] += 1


class Trace:
    """A profile of one step: a table, and a file for https://ui.perfetto.dev."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def on_step(self, record: dict[str, Any]) -> None:
        """Begin after the step before, end after the step."""
        if record["step"] == _STEP - 1:
            self._profile = torch.profiler.profile(record_shapes=True)
            self._profile.start()
        elif record["step"] == _STEP:
            self._profile.stop()
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            print(self._profile.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40))
            self._profile.export_chrome_trace(str(self._out / "trace.json"))


def looked_at(what: str, settings: dict[str, Any], out: Path) -> None:
    """Train with a callback that looks at one step."""
    callback = Synchronisations() if what == "synchronisations" else Trace(out)
    rkdo_dist.train(settings, callbacks=[callback])
    if isinstance(callback, Synchronisations):
        print(f"{callback.found.total()} synchronisations in a step of {settings['train.global_batch'] // 8} lanes")
        for place, count in callback.found.most_common():
            print(f"  {count} x {place}")


def met(fault: str, settings: dict[str, Any]) -> None:
    """Train on several ranks, of which rank 1 meets a fault."""
    embed = Step.embed

    def faulty(self: Step, lanes: Any, at: Any, keys: Any = None) -> Any:
        if self.runtime.rank == 1 and at.step == _STEP - 1:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            torch.empty(2**50, dtype=torch.uint8, device=self.runtime.device)  # more than any device has
        return embed(self, lanes, at, keys)

    Step.embed = faulty  # type: ignore[method-assign]
    config = Path(settings["run.dir"]).with_suffix(".yaml")
    if os.environ["RANK"] == "0":
        config.write_text("{}\n")
    while not config.exists():
        time.sleep(0.1)
    cli.main(["train", str(config), *(f"{key}={value}" for key, value in settings.items())])


def _slow(features: Any, labels: Any) -> float:
    time.sleep(2.5 * PATIENCE)
    return 0.0


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("shards", nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    options = parser.parse_args()
    if options.part in ("environment", "kernels"):
        return {"environment": environment, "kernels": kernels}[options.part]()
    settings = SETTINGS | {"data.source": options.shards, "run.dir": str(options.out / options.part)}
    if options.part in ("synchronisations", "trace"):
        return looked_at(options.part, settings, options.out)
    if options.part == "slow":
        rkdo_dist.train(settings | {"evaluate.at_end": True}, metrics={"slow": _slow})
        return None
    return met(options.part, settings)


if __name__ == "__main__":
    main()
