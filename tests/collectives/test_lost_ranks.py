"""A rank is killed or stopped at a step of a call: the others raise within the timeout, and so do later calls."""

import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist

import faults
import ranks
from flashcomm.errors import CollectiveError, PeerLost, TimedOut
from thorough import thorough

TIMEOUT_S = 1.0
SLACK_S = 20.0
"""For a machine that is busy: the alternative is to wait for ever."""
LOST = 1
EVERY = bool(os.environ.get("FLASHCOMM_FAULTS"))
CALLS = [
    (algorithm, by, number) if (i + j) % 3 == 0 or EVERY else thorough(algorithm, by, number)
    for i, algorithm in enumerate((*faults.ALGORITHMS, "ring", *(["broadcast"] * EVERY)))
    for j, by in enumerate(ranks.WAYS)
    for k, number in enumerate((signal.SIGKILL, signal.SIGSTOP))
    if EVERY or (i + j + k) % 2
]
"""Every call with one of the signals, over one of the ways; with FLASHCOMM_FAULTS=1, all over all with both."""
_steps: faults.Steps | None = None


def prepare(algorithm: str) -> int:
    """Run the call twice, and return the number of its steps."""
    global _steps
    _steps = faults.Steps()
    faults.call(algorithm, dist.group.WORLD)
    _steps.arm(None, lambda: None)
    faults.call(algorithm, dist.group.WORLD)
    return _steps.count


def lose(algorithm: str, at: int, number: int) -> tuple[str, float, str]:
    """(outcome, seconds, outcome of the next call) on this rank, one of which meets the signal `number`."""
    assert _steps
    dist.barrier()
    faults.shorten(TIMEOUT_S)
    if dist.get_rank() == LOST:
        _steps.arm(at, lambda: os.kill(os.getpid(), number))
    start = time.monotonic()
    first = outcome(algorithm)
    return first, time.monotonic() - start, outcome(algorithm)


def outcome(algorithm: str) -> str:
    """The name of the error of a call; "right" or "wrong" if there is none."""
    try:
        result = faults.call(algorithm, dist.group.WORLD)
    except CollectiveError as error:
        return type(error).__name__
    right = faults.expected(algorithm, dist.get_rank(), dist.get_world_size())
    return "right" if torch.equal(result, right) else "wrong"


@pytest.mark.parametrize(("algorithm", "by", "number"), CALLS, ids=lambda x: getattr(x, "name", x))
def test_a_rank_that_is_lost_at_any_step_holds_nobody_up(algorithm, by, number):
    """A step that is drawn by the names of the call; with FLASHCOMM_FAULTS=1 in the environment, every step."""
    at = count = 0
    while at < count or not count:
        world_size = 4 if algorithm == "hierarchical" else 2
        world = ranks.Ranks(world_size, env=ranks.WAYS[by])
        try:
            count = world.run(prepare, algorithm)[LOST]
            assert count > 0
            at = at + 1 if EVERY else random.Random(f"{algorithm} {by} {number}").randint(1, count)
            world.start(lose, algorithm, at, number)
            others = [world.outcome(rank) for rank in range(world_size) if rank != LOST]
        finally:
            world.processes[LOST].kill()
            world.close()
        for good, result in others:
            assert good, result
            first, seconds, second = result
            assert first in ("right", PeerLost.__name__, TimedOut.__name__), at
            assert second in (PeerLost.__name__, TimedOut.__name__, CollectiveError.__name__), at
            assert seconds < TIMEOUT_S + SLACK_S, at
        print(f"{algorithm} over {by}, {number.name} before step {at} of {count}: {others}")
        if not EVERY:
            break
