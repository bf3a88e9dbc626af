"""What flashcomm did: counted here, read with `flashcomm.stats()`, logged once per reason."""

import logging
import threading
from collections import Counter

_log = logging.getLogger("flashcomm")
_lock = threading.Lock()
_calls: Counter[str] = Counter()
_reasons: dict[str, Counter[str]] = {}
_plain: Counter[str] = Counter()
_slow: Counter[str] = Counter()
_bytes: Counter[str] = Counter()
_logged: set[str] = set()


def record(call: str, reason: str, *, wire_bytes: int, plain_bytes: int):
    """Count one ``op/algorithm/codec``, why it was that, the bytes this rank sent, and those plain would have sent."""
    with _lock:
        _calls[call] += 1
        _reasons.setdefault(call, Counter())[reason] += 1
        _bytes["wire_bytes"] += wire_bytes
        _bytes["plain_bytes"] += plain_bytes


def record_plain(op: str, reason: str):
    """Count a call that ran uncompressed, and log the reason the first time."""
    _count(_plain, reason, f"{op} ran uncompressed")


def record_slow(op: str, reason: str):
    """Count a call whose codec has no kernel on its device, and log the reason the first time."""
    _count(_slow, reason, f"{op} encoded and decoded without a kernel")


def _count(counter: "Counter[str]", reason: str, what: str):
    with _lock:
        counter[reason] += 1
        first = reason not in _logged
        _logged.add(reason)
    if first:
        _log.info("%s: %s (counted in flashcomm.stats(), logged once)", what, reason)


def stats() -> dict:
    """What this process has done since the start or `reset_stats()`.

    Returns:
        ``calls``: number of collectives by ``op/algorithm/codec``, as what was sent; ``reasons``: of each, why the
        algorithm was that one, with numbers; ``plain``: number that ran uncompressed, by reason;
        ``slow_kernels``: number whose codec ran on the torch specification, by reason;
        ``wire_bytes``: bytes this rank sent to other ranks; ``plain_bytes``: what plain collectives would have sent.
    """
    with _lock:
        return {
            "calls": dict(_calls),
            "reasons": {call: dict(reasons) for call, reasons in _reasons.items()},
            "plain": dict(_plain),
            "slow_kernels": dict(_slow),
            "wire_bytes": _bytes["wire_bytes"],
            "plain_bytes": _bytes["plain_bytes"],
        }


def reset_stats():
    """Set every count of `stats()` to zero; reasons that were logged stay logged."""
    with _lock:
        for counter in (_calls, _plain, _slow, _bytes):
            counter.clear()
        _reasons.clear()
