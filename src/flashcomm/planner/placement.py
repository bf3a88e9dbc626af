"""The ranks of one stage and the links from stage to stage, for every way to cut ranks into stages.

Ranks are placed in order, so a stage lies in one host, or fills several. Its ranks send a share of a message each.

Source: our own; rates and latencies are those of `flashcomm.planner.hardware`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from flashcomm.codecs import Lossless, parse
from flashcomm.planner import hardware
from flashcomm.planner.choose import Facts
from flashcomm.planner.costs import extra_s
from flashcomm.planner.hardware import CPU_CODEC_BYTES_S, CPU_LOSSLESS_BYTES_S, Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Predicted seconds of one message from a stage to the next."""

    busy_s: float
    """Seconds in which each of its ranks encodes, and as long again in which the next stage's decode."""
    carried_s: float
    """Seconds of the transfer."""

    @property
    def seconds(self) -> float:
        """Seconds in all: an engine encodes all, sends all and decodes all."""
        return 2 * self.busy_s + self.carried_s


@dataclass(frozen=True, slots=True)
class Link:
    """The way from the ranks of one stage to those of the next."""

    bytes_s: float
    """Bytes per second between the two stages, over all of their ranks."""
    latency_s: float
    codec_bytes_s: float = CPU_CODEC_BYTES_S
    """Bytes per second that a rank reads and writes in codecs with fast kernels."""
    lossless_bytes_s: float = CPU_LOSSLESS_BYTES_S
    """The same of ``lossless``."""

    def message(self, message_bytes: float, codec: str, ranks: int) -> Message:
        """Predict one message.

        Args:
            message_bytes: uncompressed, in 16 bits per value.
            codec: of the message.
            ranks: that send a share each.

        >>> Link(1e8, 0.001).message(1e8, "none", 1).seconds
        1.001
        """
        parsed = parse(codec)
        payload = message_bytes * parsed.bits_per_value(4096) / 16
        rate = self.lossless_bytes_s if isinstance(parsed, Lossless) else self.codec_bytes_s
        # An all-reduce encodes and decodes about twice as much as a message.
        slow_s = extra_s(parsed, message_bytes / ranks) / 4
        busy_s = 0.0 if codec == "none" else (message_bytes + payload) / ranks / rate + slow_s
        return Message(busy_s=busy_s, carried_s=self.latency_s + payload / self.bytes_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Ranks that can be cut into stages."""

    ranks: int
    cluster: Callable[[int], Cluster | None]
    """The cluster of a stage of that many ranks; None if nothing is known about it."""
    link: Callable[[int, int], Link]
    """The link from a number of first ranks to the next ranks, as many as the second number says."""


def named(
    name: str, ranks: int, *, ranks_per_host: int | None = None, rate: str | None = None, link: str | None = None
) -> Placement:
    """Place ranks on accelerators of the table; arguments and errors as of `flashcomm.planner.hardware.cluster`."""
    inside = min(ranks_per_host or hardware.accelerator(name).ranks_per_host, ranks)
    whole = hardware.paths(name, ranks, ranks_per_host=inside, rate=rate, link=link)

    def cluster(tp: int) -> Cluster | None:
        if tp == 1:
            return _alone(hardware.cluster(name, 2, ranks_per_host=1, rate=rate, link=link))
        if max(tp, inside) % min(tp, inside):
            return None
        return hardware.cluster(name, tp, ranks_per_host=min(tp, inside), rate=rate, link=link)

    def between(before: int, tp: int) -> Link:
        if before % inside:
            bytes_s, latency_s = tp * whole.bytes_s, whole.call_s
        else:
            bytes_s, latency_s = -(-tp // inside) * whole.host_bytes_s, whole.network_s
            bytes_s = min(bytes_s, tp * whole.bytes_s)
        if not hardware.accelerator(name).is_cpu:
            # Memory limits both kinds of kernels.
            return Link(bytes_s, latency_s, whole.codec_bytes_s, whole.codec_bytes_s)
        return Link(bytes_s, latency_s)

    return Placement(ranks=ranks, cluster=cluster, link=between)


def measured(cluster: Cluster) -> Placement:
    """Place ranks as they were measured: one stage of all of them, or stages of one rank each.

    Their link is that of plain all-reduces, whose ring sends 2 (R - 1) / R of a message over it.
    """
    ranks, costs = cluster.group.ranks, cluster.group.costs
    assert costs is not None
    latency_s, largest = costs.plain.seconds(0), costs.plain.points[-1].message_bytes
    sent = 2 * (ranks - 1) / ranks * largest
    link = Link(sent / max(1e-9, costs.plain.seconds(largest) - latency_s), latency_s / 2)
    known = {ranks: cluster, 1: _alone(cluster)}
    return Placement(ranks=ranks, cluster=known.get, link=lambda before, tp: link)


def _alone(cluster: Cluster) -> Cluster:
    """A rank of a cluster without the others."""
    return replace(cluster, group=Facts(ranks=1, connected=cluster.group.connected))
