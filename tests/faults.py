"""Faults at a chosen step of a call, on a real rank that runs the real transports."""

import gc
import types
from collections.abc import Callable
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import flashcomm
from flashcomm.collectives.group import Group
from flashcomm.transports import backend, base, connections
from flashcomm.transports.shared import loops


class Steps:
    """The steps of this rank's calls, counted from 1: whatever it does with a peer, and what it does before that.

    Of shared memory these are the encoding of a piece, the waiting for the others and the adding: the loops run as
    Python, what they call is compiled.
    """

    def __init__(self):
        self.count = 0
        self.at: int | None = None
        """The step before which `act` is called."""
        self.act: Callable[[], object] = lambda: None
        for owner, names in (
            (connections.Connections, ["send", "receive", "wait"]),
            (backend.BackendLink, ["send", "receive"]),
            (backend.Backend, ["all_gather", "all_reduce", "exchange"]),
        ):
            for name in names:
                setattr(owner, name, self._before(getattr(owner, name)))
        alone = base.Ranks.alone
        base.Ranks.alone = lambda ranks, step, act: alone(ranks, step, self._before(act))
        for name, function in (("sum_stripes", loops._sum), ("two_step", loops._two_step), ("gather", loops._gather)):
            setattr(loops, name, self._interpreted(function))

    def _before(self, function: Callable) -> Callable:
        def hooked(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                self.act()
            return function(*args, **kwargs)

        return hooked

    def _interpreted(self, function: types.FunctionType) -> Callable:
        hooked = {name: self._before(getattr(loops, name)) for name in ("_meet", "run_rows")}
        python = types.FunctionType(function.__code__, {**vars(loops), **hooked})
        python.compile = lambda signature: None
        return python

    def arm(self, at: int | None, act: Callable[[], object]):
        """Count anew, and call `act` before step `at`."""
        self.count, self.at, self.act = 0, at, act


def shorten(seconds: float):
    """Give all groups that have met another timeout: to meet, a busy machine needs more time than a test of one has."""
    for process_group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), process_group)
    for group in [found for found in gc.get_objects() if isinstance(found, Group)]:
        for meeting in group._meetings.values():
            if hasattr(meeting.lane.messages, "link"):
                meeting.lane.messages.link.timeout_s = seconds
            for memory in meeting.lane.memories:
                for place in memory._region.places:
                    place[loops.TIMEOUT_NS] = int(seconds * 1e9)


ALGORITHMS = ("one_step", "two_step", "hierarchical", "reduce_scatter", "all_gather", "all_to_all", "plain")
"""Everything that `call` runs."""


def value(rank: int) -> torch.Tensor:
    """A rank's values: whole numbers, so that a plain sum has the same bits in any order."""
    return torch.arange(8 * 128, dtype=torch.float32).view(8, 128).remainder(7) + rank


def call(algorithm: str, group: dist.ProcessGroup, async_op: bool = False):
    """Run one collective of all ranks of `group`."""
    x, world_size = value(dist.get_rank()), dist.get_world_size()
    if algorithm == "plain":
        return flashcomm.all_reduce(x, "none", group, async_op=async_op)
    if algorithm == "hierarchical":
        return flashcomm.all_reduce(x, "bf16", _mesh(world_size), algorithm=algorithm, async_op=async_op)
    if algorithm in ("one_step", "two_step"):
        return flashcomm.all_reduce(x, "bf16", group, algorithm=algorithm, async_op=async_op)
    verb = getattr(flashcomm, algorithm)
    if algorithm == "all_to_all":
        return verb(x[: 8 // world_size * world_size], "bf16", group, async_op=async_op)
    return verb(x[: 8 // world_size * world_size], "bf16", group, algorithm="one_step", async_op=async_op)


def expected(algorithm: str, rank: int, world_size: int) -> torch.Tensor:
    """The result of `call` on `rank`; these values are exact in bf16."""
    xs = [value(rank)[: 8 // world_size * world_size] for rank in range(world_size)]
    if algorithm == "all_gather":
        return torch.cat(xs)
    if algorithm == "all_to_all":
        rows = 8 // world_size
        return torch.cat([x[rank * rows : (rank + 1) * rows] for x in xs])
    total = torch.stack([value(rank) for rank in range(world_size)]).sum(0)
    if algorithm == "reduce_scatter":
        rows = 8 // world_size
        return total[rank * rows : (rank + 1) * rows]
    return total


@cache
def _mesh(world_size: int) -> DeviceMesh:
    """All ranks, as if they were on two hosts."""
    return init_device_mesh("cpu", (2, world_size // 2))
