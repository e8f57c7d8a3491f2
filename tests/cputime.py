"""Processor time of every test, its subprocesses and ranks included: `python -m pytest -p tests.cputime`.

On a machine with other work wall-clock times say little; processor times stay. The summary has the total and the
slowest tests; with pytest-xdist every worker counts its own processes. Time of a process that outlives its parent
(an orphan) is not seen.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

SHOWN = 25
_times: dict[str, float] = {}
_rest: dict[str, float] = {}


def used() -> float:
    """Seconds of this process and of all its descendants, those that have ended and were waited for included."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user, system, and both of the children waited for
    return total


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    began = used()
    try:
        return (yield)
    finally:
        _times[item.nodeid] = used() - began


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["cputime"] = (_times, used())


class Controller:
    """Collects what the workers of pytest-xdist have counted."""

    def pytest_testnodedown(self, node: Any, error: object) -> None:
        times, whole = getattr(node, "workeroutput", {}).get("cputime", ({}, 0.0))
        _times.update(times)
        _rest[node.gateway.id] = whole


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(Controller())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ or not _times:
        return
    whole = sum(_rest.values()) or used()
    terminalreporter.section(f"processor time: {whole / 60:.1f} min, {sum(_times.values()) / 60:.1f} of it in tests")
    for name, seconds in sorted(_times.items(), key=lambda item: -item[1])[:SHOWN]:
        terminalreporter.write_line(f"{seconds:8.2f} s  {name}")
