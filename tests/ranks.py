"""Real process groups for tests: ranks are forked from one server that has torch loaded already.

A Python process with torch costs seconds to start; a fork of a prepared server costs hundredths. Every call gets new
processes and a new gloo group, so a test can kill its ranks without touching the next one.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

# With what tests import: a fork that imports pytest by itself needs 0.42 s to become a rank, not 0.07 s.
PRELOAD = ["torch", "torch.distributed", "torch.nn.parallel", "rkdo_dist.training.main"]
PRELOAD += ["pytest", "hypothesis", "tests.jobs"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


class RankFailed(AssertionError):
    """A rank raised; the text holds every failing rank's traceback."""


def _entry(
    rank: int,
    world: int,
    store: str,
    backend: str,
    timeout: float,
    results: Any,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    import torch
    import torch.distributed as dist

    from tests import like_nccl

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.update(LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # Accelerate asks
    torch.set_num_threads(1)
    like_nccl.register()
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        results.put((rank, True, function(rank, world, *args)))
    except BaseException:  # the parent raises it with its traceback
        results.put((rank, False, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        if dist.is_initialized():
            dist.destroy_process_group()


class Ranks:
    """Ranks that are running: `kill` some, `join` all. Use as a context, so that none is left behind."""

    def __init__(
        self, function: Callable[..., Any], world: int, args: tuple, timeout: float, backend: str = "gloo"
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._results = _context.Queue()
        self._timeout = timeout
        store = os.path.join(self._folder.name, "store")
        self.processes = [
            _context.Process(target=_entry, args=(r, world, store, backend, timeout, self._results, function, args))
            for r in range(world)
        ]

    def __enter__(self) -> Ranks:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def running(self) -> bool:
        """Whether any rank is still there."""
        return any(process.is_alive() for process in self.processes)

    def kill(self, ranks: Sequence[int]) -> None:
        """kill -9."""
        for rank in ranks:
            self.processes[rank].kill()

    def answers(self) -> dict[int, tuple[bool, Any]]:
        """By rank: whether its function returned, and what, or the reason."""
        return _collect(self._results, self.processes, len(self.processes), self._timeout)


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 120.0,
    check: bool = True,
    backend: str = "gloo",
) -> list[Any]:
    """Call `function(rank, world, *args)` on `world` ranks; return its results in rank order.

    Args:
        function: a module-level function of a test module (it is pickled by name).
        args: picklable; results must be picklable too (numpy arrays, floats; tensors are turned into file handles).
        timeout: seconds for the group's collectives and, if it is more than 60, for the whole call.
        check: raise `RankFailed` if any rank raised; otherwise a failed rank's result is its traceback as `str`.
        backend: "gloo", or `like_nccl.SILENT`.
    """
    with Ranks(function, world, args, timeout, backend) as ranks:
        answers = ranks.answers()
    failures = _failures(answers)
    if failures and check:
        raise RankFailed("\n".join(failures))
    return [answers[r][1] for r in range(world)]


def _failures(answers: dict[int, tuple[bool, Any]]) -> list[str]:
    return [f"--- rank {r}\n{text}" for r, (ok, text) in sorted(answers.items()) if not ok]


def _collect(results: Any, ranks: list[Any], world: int, timeout: float) -> dict[int, tuple[bool, Any]]:
    answers: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + max(timeout, 60) + 30
    while len(answers) < world:
        try:
            rank, ok, value = results.get(timeout=0.5)
            answers[rank] = (ok, value)
        except queue.Empty:
            for rank, process in enumerate(ranks):
                if rank not in answers and process.exitcode not in (None, 0):
                    answers[rank] = (False, f"the process ended with exit code {process.exitcode}")
            if time.monotonic() > deadline:
                silent = f"no answer from ranks {sorted(set(range(world)) - set(answers))} in time"
                raise RankFailed("\n".join([silent, *_failures(answers)])) from None
    return answers


def exact_all_reduce(flat: Any) -> Any:
    """Sum over ranks of a 1-d tensor by `ExactAllReduce`, used once."""
    from rkdo_dist.exchange.group import ExactAllReduce

    once = ExactAllReduce(flat.numel(), flat)
    once.vector.copy_(flat)
    return once.reduce()
