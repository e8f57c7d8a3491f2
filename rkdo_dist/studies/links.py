"""Links between devices, as data with their sources: what `rkdo scale --interconnect` projects with.

Bandwidths are published peaks in one direction, per device; latencies are the constants by which NCCL's own cost model
chooses between algorithms (NVIDIA/nccl, src/graph/tuning.cc: base and per-step latencies of the ring algorithm, for the
protocols LL, which is quick and wastes half the bandwidth on flags, and Simple).
"""

from __future__ import annotations

import dataclasses

PER_NODE = 8  # devices of a node, each with a network port of its own, as in NVIDIA's DGX systems
BASE = {"LL": 6.6e-6, "Simple": 8.4e-6}  # seconds per collective, whatever its size
SHARE = {"LL": 0.5, "Simple": 1.0}  # of the bandwidth that carries data


@dataclasses.dataclass(frozen=True)
class Link:
    """One kind of connection.

    Attributes:
        name: for people.
        bandwidth: bytes per second and direction, per device.
        latency: seconds per step of a ring, by protocol.
        source: where the bandwidth is published.
    """

    name: str
    bandwidth: float
    latency: dict[str, float]
    source: str


_NVLINK = {"LL": 0.6e-6, "Simple": 3.4e-6}
_PCI = {"LL": 1.0e-6, "Simple": 5.7e-6}
_NET = {"LL": 2.7e-6, "Simple": 14.0e-6}

INSIDE = {
    "nvlink": Link("NVLink 4 (H100)", 450e9, _NVLINK, "NVIDIA H100 data sheet: 900 GB/s in both directions together"),
    "nvlink3": Link("NVLink 3 (A100)", 300e9, _NVLINK, "NVIDIA A100 data sheet: 600 GB/s in both directions together"),
    "pcie5": Link("PCIe 5.0 x16", 63e9, _PCI, "PCI-SIG: 32 GT/s x 16 lanes, 128b/130b"),
    "pcie4": Link("PCIe 4.0 x16", 31.5e9, _PCI, "PCI-SIG: 16 GT/s x 16 lanes, 128b/130b"),
}
BETWEEN = {
    "ib400": Link("InfiniBand NDR 400 Gb/s", 50e9, _NET, "NVIDIA ConnectX-7: one 400 Gb/s port per device (DGX H100)"),
    "ib200": Link("InfiniBand HDR 200 Gb/s", 25e9, _NET, "NVIDIA ConnectX-6: one 200 Gb/s port per device (DGX A100)"),
    "eth100": Link("Ethernet 100 Gb/s", 12.5e9, _NET, "IEEE 802.3: line rate; NCCL's latency for any network"),
    "eth25": Link("Ethernet 25 Gb/s", 3.125e9, _NET, "IEEE 802.3: line rate; NCCL's latency for any network"),
}


@dataclasses.dataclass(frozen=True)
class Interconnect:
    """Devices in nodes: a link inside a node, another between nodes."""

    inside: Link
    between: Link
    per_node: int = PER_NODE

    def seconds(self, operation: str, payload: int, calls: int, world: int) -> float:
        """Time of `calls` collectives with `payload` bytes together (as `exchange.ledger` counts them).

        Per call the better of two protocols: base + steps x latency + bytes / bandwidth.

        - Rings (all_gather, reduce_scatter, all_reduce, broadcast): W - 1 steps (all_reduce twice), of which one in
          every node crosses to the next; rings run over all devices' ports side by side, so the bytes see the slower
          of a device's inner link and the ports of its node together.
        - all_to_all: a message to each peer, one after another; those to other nodes share the device's own port.
        - send (a ring of blocks): the slowest neighbours set the pace, and they talk through one port.
        """
        if world == 1 or calls == 0 or operation == "objects":
            return 0.0
        return calls * min(self._one(operation, payload / calls, world, protocol) for protocol in BASE)

    def _one(self, operation: str, payload: float, world: int, protocol: str) -> float:
        near, far = self.inside.latency[protocol], self.between.latency[protocol]
        share = SHARE[protocol]
        fast, slow = self.inside.bandwidth * share, self.between.bandwidth * share
        local = min(world, self.per_node)
        nodes = -(-world // self.per_node)
        if operation == "send":
            latency, time = (near, payload / fast) if nodes == 1 else (far, payload / slow)
        elif operation == "all_to_all":
            latency = (local - 1) * near + (world - local) * far
            time = payload / world * ((local - 1) / fast + (world - local) / slow)
        else:
            turns = 2 if operation == "all_reduce" else 1
            latency = turns * ((world - nodes) * near + (nodes - 1) * far)
            sent = turns * payload * (world - 1) * (1 if operation == "all_gather" else 1 / world)
            time = sent / (fast if nodes == 1 else min(fast, local * slow))
        return BASE[protocol] + latency + time


def interconnect(name: str) -> Interconnect:
    """The interconnect called "inside+between", such as "nvlink+ib400".

    Raises:
        ValueError: for a name that is not known.
    """
    inside, plus, between = name.partition("+")
    if not plus or inside not in INSIDE or between not in BETWEEN:
        raise ValueError(
            f"unknown interconnect {name!r}: write INSIDE+BETWEEN with inside one of {', '.join(INSIDE)} and between "
            f"one of {', '.join(BETWEEN)}, e.g. nvlink+ib400"
        )
    return Interconnect(INSIDE[inside], BETWEEN[between])
