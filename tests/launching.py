"""Launch scripts in tests: as users start them, on this machine, with one thread per process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"


def environment(*first_on_path: Path, **variables: str) -> dict[str, str]:
    """This process's environment, with this interpreter's commands on PATH, as an activated environment has them."""
    path = os.pathsep.join([*map(str, first_on_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def free_port() -> int:
    """A TCP port that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Script:
    """A running script whose output goes to a file. Use as a context, so that no process is left behind."""

    def __init__(self, words: Sequence[object], log: Path, variables: dict[str, str], cwd: Path = ROOT) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [str(word) for word in words], stdout=out, stderr=subprocess.STDOUT, env=variables, cwd=cwd
            )

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    @property
    def text(self) -> str:
        """What it has printed so far, blanks and line breaks as single blanks."""
        return " ".join(self.log.read_text().split())

    def kill(self) -> None:
        """kill -9 of the script and all that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(family[1:], timeout=30)
        self.process.wait(30)

    def wait(self, timeout: float = 240) -> int:
        """Its exit code."""
        return self.process.wait(timeout)


def wait_until(what: Callable[[], bool], *scripts: Script, timeout: float = 240) -> None:
    """Wait for something that running scripts bring about; fail with their output if one ends first."""
    deadline = time.monotonic() + timeout
    while not what():
        for script in scripts:
            assert script.process.poll() is None, script.log.read_text()
        assert time.monotonic() < deadline, "\n".join(script.log.read_text() for script in scripts)
        time.sleep(0.02)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[list[list[str]], str, Callable[[bool], None] | None]]:
    """Two "nodes" of this machine: network namespaces joined by a cable where the machine allows it.

    Yields:
        for each node the words before a command there; the address of node 0; a function that plugs the cable in or
        out, None where both nodes are the loopback.
    """
    names = [f"rkdo-{os.getpid()}-{node}" for node in (0, 1)]
    try:
        _lay_cable(names)
    except (OSError, subprocess.CalledProcessError):
        _remove(names)
        yield [[], []], "127.0.0.1", None
        return
    try:
        yield [["ip", "netns", "exec", name] for name in names], "10.77.0.1", lambda on: _plug(names[1], on)
    finally:
        _remove(names)


def _lay_cable(names: list[str]) -> None:
    ends = [f"rk{os.getpid() % 10**7}-{node}" for node in (0, 1)]
    for name in names:
        _ip("netns", "add", name)
    _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for node, (name, end) in enumerate(zip(names, ends, strict=True)):
        _ip("link", "set", end, "netns", name, "name", "cable")
        _ip("-n", name, "address", "add", f"10.77.0.{node + 1}/24", "dev", "cable")
        for link in ("lo", "cable"):
            _ip("-n", name, "link", "set", link, "up")
    subprocess.run(["ip", "netns", "exec", names[0], "true"], check=True, capture_output=True)


def _plug(name: str, on: bool) -> None:
    _ip("-n", name, "link", "set", "cable", "up" if on else "down")


def _remove(names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            _ip("netns", "delete", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
