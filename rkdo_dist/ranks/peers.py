"""Peers: the other processes of a job, how to reach them, and the error when one is lost.

Gloo listens on the address that the host's own name resolves to. On many machines that is 127.0.1.1, and two nodes
then wait for each other in vain; so the interface on the route to the first node is chosen here, unless the user has
chosen one (GLOO_SOCKET_IFNAME). NCCL inspects the interfaces itself and rarely needs help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import re
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch.distributed as dist

from rkdo_dist.exchange import group
from rkdo_dist.faults import shortage
from rkdo_dist.ranks.watch import BEAT, Note, Watch

ALIKE = (group.RankError, ValueError, ArithmeticError)  # errors that every rank raises
_NOWHERE = ("198.51.100.1", 9)  # an address for documentation (RFC 5737): asks the routing table, sends nothing
_ADDRESS = re.compile(r"(?:peer|remote=)\D{0,3}(\d+\.\d+\.\d+\.\d+)")


class PeerLostError(ConnectionError):
    """Another process of the job has died or cannot be reached; the message says which, and what to do."""

    exit_code = 1  # nothing is wrong with the request


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a rank runs."""

    host: str
    address: str

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"


class Peers:
    """The ranks of this job and their hosts; empty until `meet`.

    Args:
        timeout: seconds after which a collective gives up (`run.timeout`), for the message.
    """

    def __init__(self, timeout: int) -> None:
        self._timeout = timeout
        self._places: list[Location] = []
        self._me = 0
        self._note: Note | None = None
        self._watch: Watch | None = None

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """While entered (before joining the group), a collective that fails because of a peer raises `PeerLostError`,
        and an error of this rank alone is told to the others.

        Raises:
            PeerLostError: in place of the backend's RuntimeError.
        """
        choose_interface()
        try:
            yield
        except BaseException as error:
            text = self.explain(error)
            if text is None and isinstance(error, Exception) and not isinstance(error, group.RankError):
                self._tell(error)
            if self._watch is not None:
                self._watch.leave() if isinstance(error, ALIKE) else self._watch.failing()
            if text is None:
                raise
            raise PeerLostError(text) from error
        if self._watch is not None:
            self._watch.leave()

    def meet(self, last_words: Callable[[str], None]) -> None:
        """Learn where every rank runs, and watch over them where collectives do not (collective; a few bytes, once).

        Args:
            last_words: called with the reason when a rank is lost and the main thread cannot leave by itself.
        """
        mine = Location(socket.gethostname(), own_address() or "127.0.0.1")
        everyone: list[Any] = group.gather_objects((mine, uuid.uuid4().hex))
        self._places, self._me = [place for place, _ in everyone], group.rank()
        if len(everyone) > 1:
            self._note = Note(everyone[0][1])
        if self._note is not None and group.control_is_apart():
            self._watch = Watch(self._note, self._lost, last_words)

    def _tell(self, error: Exception) -> None:
        """Leave a note on an error that may be this rank's alone; where all have it, nobody reads the note."""
        if self._note is not None:
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            reason = shortage(error) or " ".join(f"{kind}{error}".split())[:500]
            self._note.leave(f"rank {self._me}{self._where([self._me])} failed: {reason}")

    def explain(self, error: BaseException) -> str | None:
        """Explanation of a failed collective for the user; None if the error is of another kind."""
        text = str(error)
        if isinstance(error, group.RankError) or not (isinstance(error, dist.DistError) or "gloo/" in text):
            return None
        if not self._places:
            return self._never_met(text)
        # Where there is a watch, it names the rank that was lost first.
        patience = 2 * BEAT if self._watch is not None else 0.0
        said = "" if self._note is None else self._note.read(patience)
        return said or self._lost(error)

    def _lost(self, error: BaseException, rank: int | None = None) -> str:
        """What a failed collective means.

        Args:
            rank: that was lost; None if only the error tells.
        """
        text = str(error)
        if re.search(r"timed? ?out", text, flags=re.IGNORECASE):
            what = f"did not answer for run.timeout={self._timeout} s: it hangs, or its machine or the network is down"
        else:
            what = "closed the connection: it has ended, and its own last message says why"
        who = self._suspects(text) if rank is None else f"rank {rank}{self._where([rank])}"
        return f"{who} {what}. Start all nodes again with run.resume=auto"

    def _never_met(self, text: str) -> str:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return (
            f"the ranks of this job cannot reach each other (first node: {where}; "
            f"GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME', 'unset')}): {' '.join(text.split())[:300]}. "
            "Check that every node was started with the same number of machines, address and port, that no firewall "
            "closes ports between the nodes, and that GLOO_SOCKET_IFNAME (CPU) or NCCL_SOCKET_IFNAME (GPU) names the "
            "interface between them (`ip address` lists them)"
        )

    def _suspects(self, text: str) -> str:
        """The ranks that an error can concern: those at the address it names, otherwise all others."""
        named = _ADDRESS.search(text)
        others = [rank for rank in range(len(self._places)) if rank != self._me]
        there = [rank for rank in others if named is not None and self._places[rank].address == named.group(1)]
        ranks = there or others
        if len(ranks) == 1:
            return f"rank {ranks[0]}{self._where(ranks)}"
        return f"one of the ranks {ranks[0]} to {ranks[-1]}{self._where(ranks)}"

    def _where(self, ranks: Sequence[int]) -> str:
        """The host of these ranks, if it is one of several."""
        places = {str(self._places[rank]) for rank in ranks}
        return f" on {places.pop()}" if len(places) == 1 and len(set(self._places)) > 1 else ""


def choose_interface() -> None:
    """Name the interface for gloo (GLOO_SOCKET_IFNAME) if the job has several nodes and the user has named none."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world <= int(os.environ.get("LOCAL_WORLD_SIZE", world)) or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = own_address()
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def own_address() -> str | None:
    """The address of this machine on the route to the first node (MASTER_ADDR); None if there is no route."""
    master = os.environ.get("MASTER_ADDR", "localhost")
    address = _source_address(master, int(os.environ.get("MASTER_PORT") or 9))
    if address is not None and ipaddress.ip_address(address).is_loopback and not _means_loopback(master):
        # The first node's own name resolves to the loopback: take the default route instead.
        return _source_address(*_NOWHERE) or address
    return address


def _means_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _source_address(host: str, port: int) -> str | None:
    """The address that a packet from here to `host` would carry; none is sent."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, target in socket.getaddrinfo(host, port or 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return probe.getsockname()[0]
    return None
