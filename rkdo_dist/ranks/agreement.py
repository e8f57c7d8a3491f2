"""Comparison of the ranks before training: code, settings and data must be the same, or the difference is named.

Every rank calls these functions; each gathers, so no rank waits for one that has left, and all raise the same error.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from rkdo_dist import __version__
from rkdo_dist import config as configuration
from rkdo_dist.config import Config
from rkdo_dist.exchange import group
from rkdo_dist.field import fused
from rkdo_dist.field.objectives import Objective
from rkdo_dist.ranks.messages import warn_once

PACKAGE = Path(__file__).resolve().parent.parent
# Settings that may differ between nodes: paths, and what a rank does by itself.
_OF_A_NODE = ("data.source", "data.shards", "data.allow_remote", "data.workers", "run.dir", "run.timeout")


def agree(facts: dict[str, Any]) -> None:
    """Raise an error if ranks differ in what decides the result (collective).

    Args:
        facts: by name; small, the same names on every rank.

    Raises:
        RankError: naming the first fact that differs, and the ranks that differ from rank zero.
    """
    everyone: list[Any] = group.gather_objects(facts)
    for name in everyone[0]:
        values = [theirs.get(name) for theirs in everyone]
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd:
            raise group.RankError(
                f"ranks disagree on {name}: rank 0 has {values[0]}, rank {odd[0]} has {values[odd[0]]}{_others(odd)}; "
                "start all ranks with the same code, configuration and shards, on machines of one kind"
            )


def differing(facts: dict[str, str]) -> str:
    """What ranks have different values of, in words; empty if nothing (collective). For facts that they may differ in.

    Args:
        facts: as for `agree`.
    """
    everyone: list[Any] = group.gather_objects(facts)
    values = {name: list(dict.fromkeys(theirs.get(name) for theirs in everyone)) for name in everyone[0]}
    return ", ".join(f"{name}: {' and '.join(map(str, those))}" for name, those in values.items() if len(those) > 1)


def agreed_kernel(objective: Objective, device: torch.device) -> str:
    """The kernel of the field, in words: the fused one if its self-check finds nothing on any rank (collective).

    If it fails on one, all use the eager kernel from now on, and rank zero says so once.

    Args:
        objective: of the run.
    """
    there = fused.fusible(objective, device)
    if group.world_size() == 1 and not there:
        return "eager"
    verdicts: list[Any] = group.gather_objects((there, fused.self_check(objective, torch.float32, device)))
    wrong = [f"rank {rank}: {why}" for rank, (_, why) in enumerate(verdicts) if why is not None]
    use = all(able for able, _ in verdicts) and not wrong
    if any(able for able, _ in verdicts):
        fused.settle(use)
    if wrong:
        warn_once(f"the fused kernel fails its self-check, so all ranks use the eager one ({wrong[0]})")
    return "fused (self-check passed)" if use else f"eager ({wrong[0]})" if wrong else "eager"


def same_request(config: Config) -> None:
    """Raise an error if ranks have different settings or run different code (collective; comes first of all).

    Raises:
        RankError: naming the setting or source file, and the ranks that differ from rank zero.
    """
    agree({"rkdo_dist's version": __version__, "torch's version": torch.__version__})
    mine = code_files()
    everyone = group.gather_objects(code_digest(mine))
    if any(theirs != everyone[0] for theirs in everyone):
        # All ranks see this alike, so all take part in looking for the file.
        names = sorted({name for files in group.gather_objects(sorted(mine)) for name in files})  # type: ignore[attr-defined]
        agree({f"the code ({name})": mine.get(name, "no such file")[:16] for name in names})
    # A setting that does not change results still decides who meets whom in which collective.
    agree({key: value for key, value in configuration.flatten(config).items() if key not in _OF_A_NODE})


def code_files() -> dict[str, str]:
    """SHA-256 (hex) of every source file of the package, by path: an edited checkout differs, whatever its version."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {f.relative_to(PACKAGE).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def code_digest(files: dict[str, str] | None = None) -> str:
    """One digest (hex) of all source files."""
    listed = code_files() if files is None else files
    return hashlib.sha256("\n".join(f"{name} {listed[name]}" for name in sorted(listed)).encode()).hexdigest()


def _others(odd: list[int]) -> str:
    if len(odd) == 1:
        return ""
    listed = ", ".join(map(str, odd[1:5])) + (", ..." if len(odd) > 5 else "")
    return f" (ranks {listed} differ from rank 0 too)"
