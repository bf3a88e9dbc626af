"""Choose the algorithm and the codec of one message by arithmetic on facts that are equal on every rank.

Only the message's size, the codec and what the ranks told each other when they met enter, so all ranks decide alike
without asking each other again. The reason is a sentence that `flashcomm.stats()` can count.
"""

import math
from dataclasses import dataclass, replace

from flashcomm import policy
from flashcomm.codecs import Codec, Entropy, Levels, Pair, Plain, parse
from flashcomm.planner.costs import LinkCosts
from flashcomm.units import bytes_text

ALGORITHMS = (*policy.ALGORITHMS, "plain")

# Defaults for links that were not measured: sizes at which another algorithm becomes faster for 2 and 4 gloo ranks on
# 2 cores, 2026-11-20, results/all_reduce_cpu.md.
MIN_COMPRESSED_BYTES = 64 << 10
"""Smallest message that is compressed; for smaller ones, encoding costs more than the bytes that it saves."""
GPU_COMPRESSED_BYTES = {"NVLink": 8 << 20, "PCIe": 256 << 10, "PCIe through the host": 256 << 10, "network": 64 << 10}
"""The same on GPUs, by the slowest link between two of them; not measured. On NVLink, FlashInfer's quantized sums lose
to NCCL's below 2 to 8 MiB, and vllm#39783 takes them from 4 to 16 MiB on. A link that is not known counts as NVLink,
where compressing too early costs most."""
MAX_ONE_STEP_BYTES = 256 << 10
"""Largest message that more than two ranks send in one step: one transfer of more bytes beats two of fewer."""
MAX_EXACT_ONE_STEP_BYTES = 64 << 10
"""The same limit for uncompressed values, between hosts or in shared memory, where a step costs some microseconds."""
# Seconds to encode and decode a byte of the message, and the overhead of a piece:
# 4 ranks on 2 cores behind 1 Gbit/s, 2026-11-21.
CODEC_S_PER_BYTE, PIECE_S = 0.6e-9, 0.3e-3
# The same for values without fixed places in a row, `ecB` and `lossless`. 16 MiB of `lossless` in 12 pieces was 1.33
# and 1.37x plain, in 6 pieces 1.25 and 1.29x, by the command of results/all_reduce_lossless_lab4_1gbit.md, 2026-11-28.
VARYING_S_PER_BYTE = 2.4e-9
# On GPUs, not measured: two passes over the message at 1 TB/s; three kernels and two operations of NCCL.
GPU_CODEC_S_PER_BYTE, GPU_PIECE_S = 2e-12, 60e-6
MOST_PIECES = 12
_BF16, _LOSSLESS = parse("bf16"), parse("lossless")
_SAME_BITS = "lossless for the bits of bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts about a group that all of its ranks know."""

    ranks: int
    hosts: int = 1
    """Number of hosts if each has the same number of ranks in the same order, else 0."""
    shared: bool = False
    """Whether all ranks map the same memory."""
    connected: bool = False
    """Whether ranks have connections of our own, which are faster than the backend's messages."""
    costs: LinkCosts | None = None
    """Costs that `flashcomm tune` measured on this group; None if it was not run."""
    device: str = "cpu"
    """Type of the device that holds the tensors; it decides how fast the codecs are."""
    link: str = ""
    """On GPUs, the slowest link between two of them, of `GPU_COMPRESSED_BYTES`; "" if it is not known."""
    copied: bool = False
    """Whether copy engines carry messages between GPUs."""

    @property
    def compressed_bytes(self) -> int:
        """Smallest message that is compressed on a link that was not measured."""
        if self.device == "cpu":
            return MIN_COMPRESSED_BYTES
        return GPU_COMPRESSED_BYTES.get(self.link, GPU_COMPRESSED_BYTES["NVLink"])

    @property
    def has_levels(self) -> bool:
        """Whether there are links inside hosts and links between them."""
        return 1 < self.hosts < self.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The way to run one collective, and the reason for it."""

    algorithm: str
    """``one_step``, ``two_step``, ``hierarchical`` or ``plain``."""
    codec: Codec
    """Format that is sent: the codec asked for, or an uncompressed one, or one without loss, where that is faster."""
    reason: str
    """A few words on the choice; the key under which `flashcomm.stats()` counts uncompressed calls."""
    pieces: int = 1
    """Number of pieces in which the message travels."""
    declined: bool = False
    """Whether compression was asked for and `auto` sends the values uncompressed."""


def choose(
    message_bytes: int,
    facts: "Facts | int",
    codec: Codec,
    *,
    algorithm: str = "auto",
    batch_invariant: bool = False,
    exact: str = "bf16",
) -> Plan:
    """Plan an all-reduce of `message_bytes` on each rank.

    Args:
        message_bytes: size of the uncompressed tensor on one rank.
        facts: about the group; a number of ranks stands for that many hosts of one rank, not measured.
        codec: the wire format asked for.
        algorithm: one of `ALGORITHMS`; any but ``auto`` is obeyed.
        batch_invariant: choose by group and codec alone, never by size, so that a token's result cannot depend on
            what else is in its batch.
        exact: the cast that holds the tensor's values, ``bf16`` or ``fp32``.

    Raises:
        ValueError: an unknown algorithm, or one that the codec or the group cannot serve.

    >>> from flashcomm.codecs import parse
    >>> choose(8 << 20, 4, parse("int8g128")).algorithm
    'two_step'
    """
    if isinstance(facts, int):
        facts = Facts(ranks=facts, hosts=facts)
    _check(algorithm, codec, facts)
    if facts.ranks == 1:
        return Plan(algorithm="plain", codec=codec, reason="one rank")
    if algorithm == "plain" or isinstance(codec, Plain):
        return Plan(algorithm="plain", codec=codec, reason="asked for" if algorithm == "plain" else "codec none")
    if algorithm != "auto":
        return _compressed(algorithm, message_bytes, facts, codec, exact, "asked for")
    codec = on_level(codec, facts)
    if not facts.connected and codec == _LOSSLESS:
        plan = choose(message_bytes, facts, _BF16, batch_invariant=batch_invariant, exact=exact)
        return replace(plan, reason=f"{plan.reason}; bf16 for the bits of lossless, as rows would be sent whole")
    if batch_invariant or facts.costs is None:
        return _by_rule(message_bytes, facts, codec, batch_invariant, exact)
    return _by_cost(message_bytes, facts.costs, codec, exact)


def on_level(codec: Codec, facts: Facts) -> Codec:
    """The format that counts in a group: of levels, the one for its only level, if it has just one."""
    if isinstance(codec, Levels) and not facts.has_levels:
        return codec.inside if facts.hosts == 1 else codec.between
    return codec


def pieces(message_bytes: int, codec: Codec, device: str = "cpu") -> int:
    """Number of pieces for a message on a link that was not measured, so that codecs work during the transfers.

    All but one piece's share of the codecs' time hides behind the transfers, and each piece has an overhead:
    c / k + k * p is least at the square root of c / p.

    >>> int8, lossless = parse("int8g128"), parse("lossless")
    >>> pieces(64 << 10, int8), pieces(16 << 20, int8), pieces(16 << 20, lossless), pieces(256 << 20, int8, "cuda")
    (1, 6, 12, 3)
    """
    byte_s, piece_s = CODEC_S_PER_BYTE, PIECE_S
    if device != "cpu":
        byte_s, piece_s = GPU_CODEC_S_PER_BYTE, GPU_PIECE_S
    elif any(single.varies or isinstance(single, Entropy) for single in codec.formats):
        byte_s = VARYING_S_PER_BYTE
    return max(1, min(MOST_PIECES, round(math.sqrt(message_bytes * byte_s / piece_s))))


def _check(algorithm: str, codec: Codec, facts: Facts):
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
    if algorithm == "hierarchical" and facts.ranks > 1 and not facts.has_levels:
        uneven = "hosts with different numbers of ranks, or on which they follow each other differently"
        what = {0: uneven, 1: "one host"}.get(facts.hosts, "one rank on each host")
        raise ValueError(
            f"hierarchical needs several hosts with the same number of ranks, more than one, and this group of "
            f"{facts.ranks} has {what}. Use two_step, or say what is a host with a DeviceMesh of 2 dimensions"
        )


def _by_rule(message_bytes: int, facts: Facts, codec: Codec, batch_invariant: bool, exact: str) -> Plan:
    if not batch_invariant:
        if facts.shared:
            return _uncompressed(message_bytes, facts, codec, exact, "compression does not pay in shared memory")
        if message_bytes < facts.compressed_bytes:
            reason = f"message under {bytes_text(facts.compressed_bytes)}"
            if facts.device != "cpu":
                reason += f" over {facts.link or 'a link that is not known'}"
            return _uncompressed(message_bytes, facts, codec, exact, reason)
    algorithm, reason = "two_step", "fewest bytes"
    if facts.has_levels:
        algorithm, reason = "hierarchical", "fewest bytes between hosts"
    elif not isinstance(codec, Pair):
        # With two ranks both algorithms send the same bytes, and one_step rounds once instead of twice.
        if facts.ranks == 2:
            algorithm, reason = "one_step", "two ranks"
        elif message_bytes <= MAX_ONE_STEP_BYTES and not batch_invariant:
            algorithm, reason = "one_step", f"message up to {MAX_ONE_STEP_BYTES >> 10} KiB"
    return _compressed(algorithm, message_bytes, facts, codec, exact, reason)


def _by_cost(message_bytes: int, costs: LinkCosts, codec: Codec, exact: str) -> Plan:
    # Asked for or not, values of bf16 arrive as they are.
    same = bool(costs.lossless) and exact == "bf16" and codec == _BF16
    codec = _LOSSLESS if same else codec
    start = costs.pays_from(codec)
    if start is not None and message_bytes >= start and (best := costs.cheapest(codec, message_bytes).algorithm):
        sent = _with_levels(codec, exact) if best.name == "hierarchical" else codec
        reason = f"measured to win from {bytes_text(start)} on" + (f"; {_SAME_BITS}" if same else "")
        return Plan(algorithm=best.name, codec=sent, reason=reason, pieces=best.pieces)
    reason = "compression does not pay on this link" if start is None else f"message under {bytes_text(start)}"
    best, sent = costs.exact(message_bytes), exact
    if best.algorithm is None:
        # The backend adds in an order of its own, so nothing of ours may replace it unasked.
        return Plan(algorithm="plain", codec=_BF16 if same else codec, reason=reason, declined=True)
    if exact == "bf16" and (faster := costs.without_loss(best, message_bytes)) and faster.algorithm:
        best, sent, reason = faster, "lossless", f"{reason}; {_SAME_BITS}"
    way = best.algorithm
    assert way is not None
    codec = _with_levels(parse(sent), exact) if way.name == "hierarchical" else parse(sent)
    return Plan(algorithm=way.name, codec=codec, reason=reason, pieces=way.pieces, declined=True)


def _compressed(algorithm: str, message_bytes: int, facts: Facts, codec: Codec, exact: str, reason: str) -> Plan:
    """Plan one algorithm, with the best measured number of pieces; without measurements, by rule on slow links."""
    count = facts.costs.pieces(codec, algorithm, message_bytes) if facts.costs else None
    if count is None:
        # Where processors carry the bytes, as in memory or over NVLink, they would not be idle meanwhile.
        carried = facts.hosts != 1 or facts.copied or facts.link == "PCIe through the host"
        count = pieces(message_bytes, codec, facts.device) if carried else 1
    sent = _with_levels(codec, exact) if algorithm == "hierarchical" else codec
    return Plan(algorithm=algorithm, codec=sent, reason=reason, pieces=count)


def _uncompressed(message_bytes: int, facts: Facts, codec: Codec, exact: str, reason: str) -> Plan:
    """Plan an uncompressed message without measurements: by our own transports if there are some, else the backend."""
    if not (facts.shared or facts.connected):
        return Plan(algorithm="plain", codec=codec, reason=reason, declined=True)
    algorithm = "one_step" if message_bytes <= MAX_EXACT_ONE_STEP_BYTES or facts.ranks == 2 else "two_step"
    return Plan(algorithm=algorithm, codec=parse(exact), reason=reason, declined=True)


def _with_levels(codec: Codec, exact: str) -> Levels:
    """The formats of `hierarchical`: uncompressed inside hosts, if `codec` does not name one for them."""
    return codec if isinstance(codec, Levels) else Levels(parse(exact), codec)
