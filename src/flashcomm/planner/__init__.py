"""Which algorithm serves a message: arithmetic on facts that are equal on every rank, nothing else.

Because only the message's shape, its dtype, the codec and the world size enter, all ranks decide alike without asking
each other, and the reason is a sentence that `flashcomm.stats()` can count.
"""

import math
from dataclasses import dataclass

from flashcomm.codecs import Codec, Pair, Plain

ALGORITHMS = ("auto", "one_step", "two_step", "plain")

# Message sizes at which another way is faster: 2 and 4 gloo ranks on 2 cores, 2026-11-20, results/all_reduce_cpu.md.
MIN_COMPRESSED_BYTES = 64 << 10
"""Below, encoding costs more than the bytes that it saves."""
MAX_ONE_STEP_BYTES = 256 << 10
"""Up to here more than two ranks are better served by one transfer of more bytes than by two of fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a collective does and why."""

    algorithm: str
    """``one_step``, ``two_step`` or ``plain``."""
    reason: str
    """Why, in a few words; the key under which `flashcomm.stats()` counts plain calls."""
    declined: bool = False
    """Whether a compressed call was asked for and `auto` chose plain for a reason that the caller may not know."""


def choose(
    message_bytes: int, ranks: int, codec: Codec, *, algorithm: str = "auto", batch_invariant: bool = False
) -> Plan:
    """The plan for an all-reduce of `message_bytes` on each of `ranks` ranks.

    Args:
        message_bytes: size of the uncompressed tensor on one rank.
        ranks: world size of the group.
        codec: the wire format asked for.
        algorithm: one of `ALGORITHMS`; all but ``auto`` are taken as they are.
        batch_invariant: choose by world size and codec alone, never by size, so that a token's result cannot depend
            on what else is in its batch.

    Raises:
        ValueError: an unknown algorithm, or one that the codec cannot serve.

    >>> from flashcomm.codecs import parse
    >>> choose(8 << 20, 4, parse("int8g128")).algorithm
    'two_step'
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}. Allowed: {', '.join(ALGORITHMS)}")
    if algorithm in ("one_step", "two_step") and isinstance(codec, Plain):
        raise ValueError(
            f"codec 'none' is the plain collective, so algorithm {algorithm!r} has nothing to do. "
            "Use algorithm='plain', or codec='bf16' or 'fp32' for an uncompressed transfer with fp32 sums"
        )
    if algorithm == "one_step" and isinstance(codec, Pair):
        raise ValueError(
            f"one_step sends once, so it cannot use both formats of {codec}. Use two_step or a single codec"
        )
    if ranks == 1:
        return Plan(algorithm="plain", reason="one rank")
    if algorithm != "auto":
        return Plan(algorithm=algorithm, reason="asked for")
    if isinstance(codec, Plain):
        return Plan(algorithm="plain", reason="codec none")
    if message_bytes < MIN_COMPRESSED_BYTES and not batch_invariant:
        reason = f"message under {MIN_COMPRESSED_BYTES >> 10} KiB"
        return Plan(algorithm="plain", reason=reason, declined=True)
    if not isinstance(codec, Pair):
        # With two ranks both algorithms send the same bytes, and one_step rounds once instead of twice.
        if ranks == 2:
            return Plan(algorithm="one_step", reason="two ranks")
        if message_bytes <= MAX_ONE_STEP_BYTES and not batch_invariant:
            return Plan(algorithm="one_step", reason=f"message up to {MAX_ONE_STEP_BYTES >> 10} KiB")
    return Plan(algorithm="two_step", reason="fewest bytes")


# Seconds that a byte of the message costs the cores that encode and decode it, and that a piece costs of its own.
CODEC_S_PER_BYTE = 0.6e-9
PIECE_S = 1e-3
MOST_PIECES = 8


def pieces(message_bytes: int) -> int:
    """In how many pieces a message travels, so that codecs work while the link does.

    All but one piece's share of the codecs' time hides behind the transfers, or the other way round, and each piece
    costs something of its own: c / k + k * p is least at the square root of c / p.

    >>> pieces(64 << 10), pieces(16 << 20)
    (1, 3)
    """
    return max(1, min(MOST_PIECES, round(math.sqrt(message_bytes * CODEC_S_PER_BYTE / PIECE_S))))
