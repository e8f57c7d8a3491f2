"""Several nodes: the same bits as on one, a node that dies or falls silent, and an exact restart."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rkdo_dist.ranks import peers
from rkdo_dist.rundir import RunDirectory
from tests.conftest import FORTY
from tests.jobs import command, fingerprint, metrics, rank_command, run_of, steps
from tests.launching import LAUNCH, Script, environment, free_port, two_nodes, wait_until
from tests.ranks import run_ranks

TIMEOUT = 10  # run.timeout


def test_gloo_listens_on_the_way_to_the_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = next(n for n, entries in psutil.net_if_addrs().items() if any(e.address == "127.0.0.1" for e in entries))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is put back as it was, whatever happens to it here
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    peers.choose_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ  # one node: gloo finds its way
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    peers.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == loopback
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    peers.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"  # the user knows better


@pytest.mark.parametrize(
    "wrong",
    ["RANK=x", "RANK=", "RANK=1", "WORLD_SIZE=-1", "WORLD_SIZE=0", "LOCAL_RANK=9", "MASTER_PORT=99999", "MASTER_ADDR="],
)
def test_what_a_launcher_never_sets_is_named(wrong: str, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, value = wrong.partition("=")
    monkeypatch.setenv(name, value)
    code, text = command(small)
    assert (code, text.count("\n")) == (2, 1), text
    assert name in text
    assert not run_of(small).exists()


def test_a_lost_peer_is_named_by_rank_and_place() -> None:
    job = peers.Peers(TIMEOUT)
    a, b = peers.Location("a", "10.0.0.1"), peers.Location("b", "10.0.0.2")
    job._places = [a, a, b, b]
    closed = "[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:41234"
    assert "one of the ranks 2 to 3 on b (10.0.0.2) closed the connection" in str(job.explain(RuntimeError(closed)))
    silent = "[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for recv operation to complete"
    assert f"one of the ranks 1 to 3 did not answer for run.timeout={TIMEOUT} s" in str(
        job.explain(RuntimeError(silent))
    )
    assert "run.resume=auto" in str(job.explain(RuntimeError(silent)))
    assert job.explain(RuntimeError("a matrix has the wrong shape")) is None
    assert "GLOO_SOCKET_IFNAME" in str(peers.Peers(TIMEOUT).explain(RuntimeError(silent)))  # at start-up


def _apart(rank: int, world: int, arguments: list[str]) -> tuple[int, str]:
    """Training in which every rank has a run directory of its own, as on nodes without a shared file system."""
    return rank_command(rank, world, [*arguments[:-1], f"{arguments[-1]}-of-rank-{rank}"])


def test_nodes_that_do_not_share_the_run_directory_are_told_so(small: list[str]) -> None:
    for code, text in run_ranks(_apart, 2, small):
        assert code == 2
        assert "rank 1: run.dir=" in " ".join(text.split())
        assert "must share the run directory" in " ".join(text.split())


@contextlib.contextmanager
def on_nodes(where: list[list[str]], address: str, arguments: list[str], logs: Path) -> Iterator[list[Script]]:
    """launch/multinode.sh with one rank on each of two nodes."""
    variables = environment(PORT=str(free_port()))
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Script(
                    [*prefix, LAUNCH / "multinode.sh", 2, node, address, 1, *arguments[1:]],
                    logs / f"node{node}.log",
                    variables,
                )
            )
            for node, prefix in enumerate(where)
        ]


@pytest.mark.slow
def test_two_nodes_are_one_run_though_the_cable_is_cut(small: list[str], straight: Path, tmp_path: Path) -> None:
    """Where this machine has no network namespaces the second node is killed instead: its end is seen at once."""
    run = run_of(small)
    arguments = [*small, *FORTY, "train.checkpoint_every=5", "run.resume=auto", f"run.timeout={TIMEOUT}"]
    with two_nodes() as (where, address, plug):
        print("two nodes:", "network namespaces and a cable" if plug else "two launchers on the loopback")
        with on_nodes(where, address, arguments, tmp_path) as (first, second):
            wait_until(lambda: steps(run) >= 6, first, second)
            began = time.monotonic()
            if plug is not None:
                plug(False)
                assert second.wait() != 0
                assert "rkdo [rank 1]: error: rank 0" in second.text
                assert f"did not answer for run.timeout={TIMEOUT} s" in second.text
            else:
                second.kill()
            assert first.wait() != 0
            assert time.monotonic() - began < 6 * TIMEOUT  # not for ever (a busy machine is slow to clean up)
            assert "rkdo: error: rank 1" in first.text
            said = "closed the connection" if plug is None else f"did not answer for run.timeout={TIMEOUT} s"
            assert said in first.text
            assert "run.resume=auto" in first.text
        if plug is not None:
            plug(True)
        assert RunDirectory(run).status()["status"] == "failed"
        assert 6 <= steps(run) < 40
        with on_nodes(where, address, arguments, tmp_path) as scripts:
            assert [script.wait() for script in scripts] == [0, 0], [script.text for script in scripts]
            assert f"done: {run}" in scripts[0].text
            # Rank zero alone speaks. A launcher may say that the first one, which holds the store, has left before it.
            said = [line for line in scripts[1].text.splitlines() if "torch/distributed/elastic/" not in line]
            assert said == []
    assert fingerprint(run, 40) == fingerprint(straight, 40)
    assert metrics(run) == metrics(straight)
