"""Agree before ranks start: every rank's word through a store, and one policy on all of them.

`exchange` works before there is a process group that could carry it, `same_policy` needs one.

A launcher's store outlives the groups of its processes. When a program destroys its group and makes another, the keys
of the first are still there, so a rank that comes early must not take an old word for a new one:

    rank r    says its text with a nonce that is new each time
    rank 0    publishes what it has read, under a new name; again whenever a rank says something else
    rank r    confirms the name once its own nonce is in what rank 0 has read
    rank 0    publishes the name that all have confirmed
    rank r    says that it has seen this, and is done; rank 0 is done when all are

So a rank that begins another exchange has no other rank before this one, and whatever an exchange that failed has left
behind does no harm.

Source: our own.
"""

import json
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from flashcomm.errors import RanksDisagree, TimedOut

_SHORTEST_S, _LONGEST_S = 0.001, 0.05
MEET_S = 60.0
"""Seconds that ranks wait for each other's policy; they have just made a process group together."""


def same_policy(group: dist.ProcessGroup, mine: str, who: str, what: str, timeout_s: float = MEET_S):
    """Check that all ranks have the same policy; all of them call it together.

    Args:
        group: the ranks, over gloo.
        mine: the keys of this rank's policy that count.
        who: what a rank is called in errors, such as ``stage``.
        what: what the policy is for.
        timeout_s: seconds to wait for the others.

    Raises:
        TimedOut: a rank did not come; most likely it has no policy.
        RanksDisagree: ranks have different policies.
    """
    try:
        # A monitored barrier's limit is for rank 0 alone; others wait for the group's, which may be half an hour.
        here = dist.barrier(group, async_op=True)
        assert here is not None
        here.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise TimedOut(
            f"{who} {group.rank()} has the policy {mine} for {what}, and another {who} did not come within "
            f"{timeout_s:g} s: give all nodes the same policy ({error})"
        ) from error
    everyone: list[str] = [""] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    if len(set(everyone)) > 1:
        said = "; ".join(f"{who} {rank} has {theirs}" for rank, theirs in enumerate(everyone))
        raise RanksDisagree(f"{who}s have different policies for {what}: {said}. Give all nodes the same")


def exchange(store: Any, rank: int, ranks: int, text: str, timeout_s: float) -> tuple[list[str], str]:
    """Tell every rank this one's text; all ranks call it together.

    Args:
        store: a store of `torch.distributed`.
        rank: this rank.
        ranks: number of ranks.
        text: this rank's word.
        timeout_s: seconds after which a rank that has not come is an error.

    Returns:
        Every rank's text, in rank order, and a name that no other exchange has; the same on all ranks.

    Raises:
        TimedOut: a rank did not come.
    """
    waiting = _Waiting(rank, timeout_s)
    mine = json.dumps([uuid.uuid4().hex, text])
    store.set(f"said by {rank}", mine)
    name, read = _collect(store, ranks, waiting) if rank == 0 else _follow(store, rank, mine, waiting)
    return [json.loads(word)[1] for word in read], name


def _collect(store: Any, ranks: int, waiting: "_Waiting") -> tuple[str, list]:
    name, read, others = "", [], range(1, ranks)
    while True:
        said = [_get(store, f"said by {rank}") for rank in range(ranks)]
        if said != read:
            name, read = uuid.uuid4().hex, said
            store.set("read by 0", json.dumps([name, read]))
        missing = [rank for rank in others if _get(store, f"confirmed by {rank}") != name]
        if not missing:
            break
        waiting.pause(f"rank {missing[0]}")
    store.set("confirmed by all", name)
    while missing := [rank for rank in others if _get(store, f"seen by {rank}") != name]:
        waiting.pause(f"rank {missing[0]}")
    return name, read


def _follow(store: Any, rank: int, mine: str, waiting: "_Waiting") -> tuple[str, list]:
    name, read = "", []
    while not name or _get(store, "confirmed by all") != name:
        found = json.loads(_get(store, "read by 0") or '["", []]')
        # In an earlier exchange there may have been fewer ranks.
        if found[0] != name and mine in found[1][rank : rank + 1]:
            name, read = found
            store.set(f"confirmed by {rank}", name)
        waiting.pause("rank 0, or one that it waits for,")
    store.set(f"seen by {rank}", name)
    return name, read


class _Waiting:
    """Pauses, each longer than the one before, until a deadline."""

    def __init__(self, rank: int, timeout_s: float):
        self._rank, self._timeout_s = rank, timeout_s
        self._end, self._pause_s = time.monotonic() + timeout_s, _SHORTEST_S

    def pause(self, missing: str):
        """Sleep; raise `TimedOut` after the deadline, because of `missing`."""
        if time.monotonic() > self._end:
            raise TimedOut(f"{missing} did not come within {self._timeout_s:g} s, as rank {self._rank} sees it")
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_S)


def _get(store: Any, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
