"""How a message is served: arithmetic on facts that are equal on every rank, nothing else.

Because only the message's size, the codec and what the ranks told each other when they met enter, all ranks decide
alike without asking each other again, and the reason is a sentence that `flashcomm.stats()` can count.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from flashcomm.codecs import Codec, Levels, Pair, Plain, parse
from flashcomm.planner.costs import SIZES, Machine, Way, crossover

ALGORITHMS = ("auto", "one_step", "two_step", "hierarchical", "plain")

# Where nobody has measured the link: sizes at which another way is faster for 2 and 4 gloo ranks on 2 cores,
# 2026-11-20, results/all_reduce_cpu.md.
MIN_COMPRESSED_BYTES = 64 << 10
"""Below, encoding costs more than the bytes that it saves."""
MAX_ONE_STEP_BYTES = 256 << 10
"""Up to here more than two ranks are better served by one transfer of more bytes than by two of fewer."""
MAX_EXACT_ONE_STEP_BYTES = 64 << 10
"""The same for values as they are, between hosts or in shared memory, where a step costs some microseconds."""
# What encoding and decoding a byte of the message takes, and what a piece takes of its own, in seconds:
# 4 ranks on 2 cores behind 1 Gbit/s, 2026-11-21.
CODEC_S_PER_BYTE, PIECE_S = 0.6e-9, 0.3e-3
# On GPUs, not measured: two passes over the message at 1 TB/s; three kernels and two operations of NCCL.
GPU_CODEC_S_PER_BYTE, GPU_PIECE_S = 2e-12, 60e-6
MOST_PIECES = 12
# What a measured way must win by before compression is worth its error, and before an algorithm of ours replaces the
# backend's.
MARGIN = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What the ranks of a group know of each other."""

    ranks: int
    hosts: int = 1
    """Number of hosts if all have the same number of ranks, which follow each other alike on each, else 0."""
    shared: bool = False
    """Whether all ranks map the same memory."""
    connected: bool = False
    """Whether ranks have connections of our own, which are faster than the backend's messages."""
    machine: Machine | None = None
    """What `flashcomm tune` measured here, if it has."""
    device: str = "cpu"
    """Where the tensors are, which says how fast the codecs are."""

    @property
    def has_levels(self) -> bool:
        """Whether there are links inside of hosts and links between them."""
        return 1 < self.hosts < self.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a collective does and why."""

    algorithm: str
    """``one_step``, ``two_step``, ``hierarchical`` or ``plain``."""
    codec: Codec
    """What is sent: the codec asked for, or the values as they are where that is faster."""
    reason: str
    """Why, in a few words; the key under which `flashcomm.stats()` counts uncompressed calls."""
    pieces: int = 1
    """In how many pieces a message travels."""
    declined: bool = False
    """Whether a compressed call was asked for and `auto` sends the values as they are."""


def choose(
    message_bytes: int,
    group: "Group | int",
    codec: Codec,
    *,
    algorithm: str = "auto",
    batch_invariant: bool = False,
    exact: str = "bf16",
) -> Plan:
    """The plan for an all-reduce of `message_bytes` on each rank of `group`.

    Args:
        message_bytes: size of the uncompressed tensor on one rank.
        group: the ranks; a number stands for as many hosts of one rank that nobody has measured.
        codec: the wire format asked for.
        algorithm: one of `ALGORITHMS`; all but ``auto`` are taken as they are.
        batch_invariant: choose by group and codec alone, never by size, so that a token's result cannot depend on
            what else is in its batch.
        exact: the cast that holds the tensor's values, ``bf16`` or ``fp32``.

    Raises:
        ValueError: an unknown algorithm, or one that the codec or the group cannot serve.

    >>> from flashcomm.codecs import parse
    >>> choose(8 << 20, 4, parse("int8g128")).algorithm
    'two_step'
    """
    if isinstance(group, int):
        group = Group(ranks=group, hosts=group)
    _check(algorithm, codec, group)
    if group.ranks == 1:
        return Plan(algorithm="plain", codec=codec, reason="one rank")
    if algorithm == "plain" or isinstance(codec, Plain):
        return Plan(algorithm="plain", codec=codec, reason="asked for" if algorithm == "plain" else "codec none")
    if algorithm == "hierarchical":
        return _hierarchical(message_bytes, group, codec, exact, "asked for")
    if algorithm != "auto":
        count = _pieces(message_bytes, group, codec, algorithm)
        return Plan(algorithm=algorithm, codec=codec, reason="asked for", pieces=count)
    if isinstance(codec, Levels) and not group.has_levels:
        codec = codec.inside if group.hosts == 1 else codec.between
    if batch_invariant or group.machine is None:
        return _by_rule(message_bytes, group, codec, batch_invariant, exact)
    return _by_cost(message_bytes, group, group.machine, codec, exact)


def pieces(message_bytes: int, device: str = "cpu") -> int:
    """In how many pieces a message travels over a link that nobody has measured, so that codecs work while it does.

    All but one piece's share of the codecs' time hides behind the transfers, and each piece costs something of its
    own: c / k + k * p is least at the square root of c / p.

    >>> pieces(64 << 10), pieces(16 << 20), pieces(256 << 20, "cuda")
    (1, 6, 3)
    """
    on_cpu = device == "cpu"
    byte_s, piece_s = (CODEC_S_PER_BYTE, PIECE_S) if on_cpu else (GPU_CODEC_S_PER_BYTE, GPU_PIECE_S)
    return max(1, min(MOST_PIECES, round(math.sqrt(message_bytes * byte_s / piece_s))))


def _check(algorithm: str, codec: Codec, group: Group):
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}. Allowed: {', '.join(ALGORITHMS)}")
    if algorithm in ("one_step", "two_step", "hierarchical") and isinstance(codec, Plain):
        raise ValueError(
            f"codec 'none' is the plain collective, so algorithm {algorithm!r} has nothing to do. "
            "Use algorithm='plain', or codec='bf16' or 'fp32' for an uncompressed transfer with fp32 sums"
        )
    if algorithm == "one_step" and isinstance(codec, Pair):
        raise ValueError(
            f"one_step sends once, so it cannot use both formats of {codec}. Use two_step or a single codec"
        )
    if algorithm in ("one_step", "two_step") and isinstance(codec, Levels):
        raise ValueError(f"{algorithm} knows no levels, so it cannot use both formats of {codec}. Use hierarchical")
    if algorithm == "hierarchical" and group.ranks > 1 and not group.has_levels:
        uneven = "hosts with different numbers of ranks, or on which they follow each other differently"
        what = {0: uneven, 1: "one host"}.get(group.hosts, "one rank on each host")
        raise ValueError(
            f"hierarchical needs several hosts with the same number of ranks, more than one, and this group of "
            f"{group.ranks} has {what}. Use two_step, or say what is a host with a DeviceMesh of 2 dimensions"
        )


def _exact(group: Group, codec: Codec, exact: str, reason: str, message_bytes: int) -> Plan:
    """Uncompressed, without the backend where that is faster."""
    if not (group.shared or group.connected):
        return Plan(algorithm="plain", codec=codec, reason=reason, declined=True)
    algorithm = "one_step" if message_bytes <= MAX_EXACT_ONE_STEP_BYTES or group.ranks == 2 else "two_step"
    return Plan(algorithm=algorithm, codec=parse(exact), reason=reason, declined=True)


def _hierarchical(message_bytes: int, group: Group, codec: Codec, exact: str, reason: str) -> Plan:
    levels = codec if isinstance(codec, Levels) else Levels(parse(exact), codec)
    count = _pieces(message_bytes, group, codec, "hierarchical")
    return Plan(algorithm="hierarchical", codec=levels, reason=reason, pieces=count)


def _pieces(message_bytes: int, group: Group, codec: Codec, algorithm: str) -> int:
    """The best measured number of pieces for an algorithm; without measurements, by rule between hosts."""
    if machine := group.machine:
        bits = codec.bits_per_value(4096)
        seconds = {
            way: cost.seconds(message_bytes, bits)
            for way, cost in machine.compressed.items()
            if way.algorithm == algorithm and machine.holds(cost, way, message_bytes)
        }
        if seconds:
            return min(seconds, key=lambda way: seconds[way]).pieces
    return pieces(message_bytes, group.device) if group.hosts != 1 else 1


def _by_rule(message_bytes: int, group: Group, codec: Codec, batch_invariant: bool, exact: str) -> Plan:
    if not batch_invariant:
        if group.shared:
            return _exact(group, codec, exact, "compression does not pay in shared memory", message_bytes)
        if message_bytes < MIN_COMPRESSED_BYTES:
            return _exact(group, codec, exact, f"message under {MIN_COMPRESSED_BYTES >> 10} KiB", message_bytes)
    if group.has_levels:
        return _hierarchical(message_bytes, group, codec, exact, "fewest bytes between hosts")
    if not isinstance(codec, Pair):
        # With two ranks both algorithms send the same bytes, and one_step rounds once instead of twice.
        if group.ranks == 2:
            return _as(Way(algorithm="one_step"), message_bytes, group, codec, "two ranks")
        if message_bytes <= MAX_ONE_STEP_BYTES and not batch_invariant:
            reason = f"message up to {MAX_ONE_STEP_BYTES >> 10} KiB"
            return _as(Way(algorithm="one_step"), message_bytes, group, codec, reason)
    return _as(Way(algorithm="two_step"), message_bytes, group, codec, "fewest bytes")


def _as(way: Way, message_bytes: int, group: Group, codec: Codec, reason: str) -> Plan:
    count = _pieces(message_bytes, group, codec, way.algorithm)
    return Plan(algorithm=way.algorithm, codec=codec, reason=reason, pieces=count)


def _by_cost(message_bytes: int, group: Group, machine: Machine, codec: Codec, exact: str) -> Plan:
    start = pays_from(machine, codec)
    way, _ = _best(machine, codec, message_bytes)
    if way and start is not None and message_bytes >= start:
        reason = f"measured to win from {_human(start)} on"
        if way.algorithm == "hierarchical":
            return _hierarchical(message_bytes, group, codec, exact, reason)
        return Plan(algorithm=way.algorithm, codec=codec, reason=reason, pieces=way.pieces)
    reason = "compression does not pay on this link" if start is None else f"message under {_human(start)}"
    way, _ = _exact_way(machine, message_bytes)
    if way is None:
        return Plan(algorithm="plain", codec=codec, reason=reason, declined=True)
    sent = Levels(parse(exact), parse(exact)) if way.algorithm == "hierarchical" else parse(exact)
    return Plan(algorithm=way.algorithm, codec=sent, reason=reason, pieces=way.pieces, declined=True)


def _best(machine: Machine, codec: Codec, message_bytes: int) -> tuple[Way | None, float]:
    """The fastest way to compress; None where all that the format allows were given up."""
    bits = codec.bits_per_value(4096)
    seconds = {
        way: cost.seconds(message_bytes, bits)
        for way, cost in machine.compressed.items()
        if machine.holds(cost, way, message_bytes)
        and not (way.algorithm == "one_step" and isinstance(codec, Pair))
        and not (way.algorithm != "hierarchical" and isinstance(codec, Levels))
    }
    best = min(seconds, key=lambda way: seconds[way], default=None)
    return best, seconds[best] if best else math.inf


def _exact_way(machine: Machine, message_bytes: int) -> tuple[Way | None, float]:
    """The fastest way to send values as they are; None for the backend's own."""
    plain = machine.plain.seconds(message_bytes)
    ours = [
        (way, cost.seconds(message_bytes))
        for way, cost in machine.uncompressed.items()
        if machine.holds(cost, way, message_bytes)
    ]
    way, seconds = min(ours, key=lambda pair: pair[1], default=(None, math.inf))
    return (way, seconds) if seconds < MARGIN * plain else (None, plain)


@lru_cache(maxsize=1024)
def pays_from(machine: Machine, codec: Codec) -> int | None:
    """The message size from which on compression wins at every larger one; None if there is none.

    Args:
        machine: of the group, from `flashcomm tune` or a table.
        codec: the wire format.
    """
    return crossover([_best(machine, codec, size)[1] < MARGIN * _exact_way(machine, size)[1] for size in SIZES])


def _human(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
