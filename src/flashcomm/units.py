"""Bytes and rates as text for people, and back."""

import re

KIB, MIB = 1 << 10, 1 << 20


def bytes_text(count: int) -> str:
    """A size with four digits, in the largest unit that it fills.

    >>> bytes_text(65536), bytes_text(3 << 19), bytes_text(1000), bytes_text(0)
    ('64 KiB', '1.5 MiB', '1000 B', '0 B')
    """
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"


def kib_text(count: int) -> str:
    """A size in KiB, the unit of a policy's ``min_bytes``.

    >>> kib_text(65536), kib_text(1 << 20), kib_text(512)
    ('64 KiB', '1024 KiB', '0.5 KiB')
    """
    return f"{count / KIB:g} KiB"


def parse_bytes(text: str) -> int:
    """Parse a size such as ``64k`` or ``16m`` into bytes.

    Raises:
        ValueError: not a number of bytes, KiB or MiB above 0.

    >>> parse_bytes("64k"), parse_bytes("16MiB"), parse_bytes("1000")
    (65536, 16777216, 1000)
    """
    number, unit = text.strip().lower().rstrip("ib"), 1
    if number and number[-1] in "km":
        number, unit = number[:-1], {"k": KIB, "m": MIB}[number[-1]]
    if not number.isdigit() or int(number) == 0:
        raise ValueError(f"size {text!r}: give bytes, or a number with k or m, such as 64k,16m")
    return int(number) * unit


def bits_per_second(rate: str) -> float:
    """Parse a rate such as ``10gbit`` into bits per second.

    Raises:
        ValueError: not a number with kbit, mbit or gbit.

    >>> bits_per_second("2.5gbit")
    2500000000.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate.strip().lower())
    if not found or float(found[1]) == 0:
        raise ValueError(f"rate {rate!r}: give a number and kbit, mbit or gbit (per second), such as 100gbit")
    return float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]]
