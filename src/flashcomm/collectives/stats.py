"""What flashcomm did: counted here, read with `flashcomm.stats()`, logged once per reason."""

import logging
import threading
from collections import Counter

_log = logging.getLogger("flashcomm")
_lock = threading.Lock()
_plain: Counter[str] = Counter()
_prefills: Counter[str] = Counter()
_logged: set[str] = set()


class Tally:
    """How often one ``op/algorithm/codec`` ran for one reason; `tally` gives the only one of its kind."""

    __slots__ = ("call", "calls", "op", "plain_bytes", "reason", "slow", "uncompressed", "wire_bytes")

    def __init__(self, op: str, call: str, reason: str, uncompressed: bool, slow: str | None):
        self.op, self.call, self.reason, self.uncompressed, self.slow = op, call, reason, uncompressed, slow
        self.calls = self.wire_bytes = self.plain_bytes = 0

    def add(self, wire_bytes: int, plain_bytes: int):
        """Count one call, the bytes that this rank sent, and those that plain would have sent."""
        with _lock:
            self.calls += 1
            self.wire_bytes += wire_bytes
            self.plain_bytes += plain_bytes
            first = self.calls == 1
        if first:
            if self.uncompressed:
                _log_once(self.reason, f"{self.op} ran uncompressed")
            elif self.slow:
                _log_once(self.slow, f"{self.op} encoded and decoded without a kernel")


_tallies: dict[tuple, Tally] = {}


def tally(op: str, call: str, reason: str, *, uncompressed: bool, slow: str | None) -> Tally:
    """Where such calls are counted.

    Args:
        op: the verb.
        call: ``op/algorithm/codec``, as what is sent.
        reason: why it is that.
        uncompressed: whether the values travel as they are.
        slow: why the codec has no kernel on its device, if it has none.
    """
    key = (op, call, reason, uncompressed, slow)
    with _lock:
        return _tallies.setdefault(key, Tally(*key))


def record_plain(op: str, reason: str):
    """Count a call that ran uncompressed outside of our own collectives, and log the reason the first time."""
    with _lock:
        _plain[reason] += 1
    _log_once(reason, f"{op} ran uncompressed")


def record_prefill(how: str):
    """Count a prefill that `flashcomm.overlap` ran in parts, or in one piece for a reason."""
    with _lock:
        _prefills[how] += 1
    if how.startswith("in one piece"):
        _log_once(how, "a prefill was not overlapped")


def _log_once(reason: str, what: str):
    with _lock:
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
        ``prefills``: number of prompts that `flashcomm.overlap` ran, in how many parts, or why in one piece;
        ``wire_bytes``: bytes this rank sent to other ranks; ``plain_bytes``: what plain collectives would have sent.
    """
    calls: Counter[str] = Counter()
    reasons: dict[str, dict[str, int]] = {}
    slow: Counter[str] = Counter()
    with _lock:
        plain, prefills, tallies = _plain.copy(), _prefills.copy(), [t for t in _tallies.values() if t.calls]
        for t in tallies:
            calls[t.call] += t.calls
            of_call = reasons.setdefault(t.call, {})
            of_call[t.reason] = of_call.get(t.reason, 0) + t.calls
            if t.uncompressed:
                plain[t.reason] += t.calls
            elif t.slow:
                slow[t.slow] += t.calls
        return {
            "calls": dict(calls),
            "reasons": reasons,
            "plain": dict(plain),
            "slow_kernels": dict(slow),
            "prefills": dict(prefills),
            "wire_bytes": sum(t.wire_bytes for t in tallies),
            "plain_bytes": sum(t.plain_bytes for t in tallies),
        }


def reset_stats():
    """Set every count of `stats()` to zero; reasons that were logged stay logged."""
    with _lock:
        _plain.clear()
        _prefills.clear()
        for t in _tallies.values():
            t.calls = t.wire_bytes = t.plain_bytes = 0
