"""Waiting for what happens: tests wait for events, and never for time to pass."""

import os
import select
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_PAUSE_S = 0.01


def wait_for(condition: Callable[[], object], seconds: float = 20.0):
    """Look until ``condition()`` is true, for what nobody announces; return what it was, or fail after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not so within {seconds:g} s: {condition}"
        time.sleep(_PAUSE_S)
    return found


def wait_until_ended(pids: Iterable[int], seconds: float = 20.0):
    """Wait until processes have ended, which need not be children of this one; fail if one runs after `seconds`."""
    end = time.monotonic() + seconds
    for pid in pids:
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([process], [], [], max(0.0, end - time.monotonic()))
        finally:
            os.close(process)
        assert ended, f"process {pid} still runs after {seconds:g} s"


def asleep(pid: int) -> bool:
    """True if the main thread of a process waits in the kernel."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "S"


def times_asleep(pid: int) -> int:
    """Times that the main thread of a process has gone to sleep so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("voluntary_ctxt_switches")))


def dawdle(turns: int):
    """Let others have the core `turns` times, so that ranks get out of step whatever a turn lasts."""
    for _ in range(turns):
        os.sched_yield()
