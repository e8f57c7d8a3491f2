"""Honour `accelerate launch --num_processes N` on machines without an accelerator.

There Accelerate's launcher starts ONE process (it leaves several CPU ranks to MPI) and says nothing, so a user who
asked for two ranks would silently get one. The lone process finds the number in its parent's command line and starts
the ranks through torchrun.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

_LAUNCHERS = ("accelerate-launch", "accelerate.commands.launch", "accelerate/commands/launch.py")
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def missing_ranks() -> list[str] | None:
    """The torchrun arguments that start the ranks the launcher promised; None if no rank is missing.

    Raises:
        ValueError: if several ranks were promised but their number cannot be determined.
    """
    lone = "ACCELERATE_MIXED_PRECISION" in os.environ and "LOCAL_RANK" not in os.environ
    if not lone or "MASTER_PORT" not in os.environ or any(name in os.environ for name in _MPI):
        return None
    options = _launch_options()
    if options is None:
        raise ValueError(
            "`accelerate launch` was asked for several processes but started one, as it does without an accelerator: "
            "add --multi_gpu (it works on CPUs too)"
        )
    nodes = options.num_machines or 1
    per_node = max(1, (options.num_processes or 1) // nodes)
    if nodes == 1:
        return ["--standalone", f"--nproc-per-node={per_node}"]
    return [
        f"--nnodes={nodes}",
        f"--node-rank={options.machine_rank or 0}",
        f"--nproc-per-node={per_node}",
        f"--master-addr={os.environ['MASTER_ADDR']}",
        f"--master-port={os.environ['MASTER_PORT']}",
    ]


def _launch_options() -> argparse.Namespace | None:
    import psutil
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    starts = [number for number, word in enumerate(words) if word == "launch" or word.endswith(_LAUNCHERS)]
    if not starts:
        return None
    options, _ = launch_command_parser().parse_known_args(words[starts[0] + 1 :])
    try:
        defaults = load_config_from_file(options.config_file)
    except (OSError, ValueError):
        defaults = None
    for name in ("num_processes", "num_machines", "machine_rank"):
        if getattr(options, name, None) is None:
            setattr(options, name, getattr(defaults, name, None))
    return options


def with_all_ranks(arguments: Sequence[str]) -> None:
    """Replace this process by torchrun with the promised ranks, if some are missing; otherwise return.

    Args:
        arguments: of `python -m rkdo_dist`.
    """
    extra = missing_ranks()
    if extra is None:
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", *extra, "-m", "rkdo_dist", *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)
