"""Faults at a chosen step of a call, on a real rank that runs the real transports."""

import gc
import types
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from numba import njit
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import flashcomm
from flashcomm import codecs, simulate
from flashcomm.collectives.group import Group
from flashcomm.transports import backend, base, connections
from flashcomm.transports.shared import loops


class Steps:
    """The steps of this rank's calls, counted from 1: whatever it does with a peer, and what it does before that.

    Of shared memory these are the encoding of a piece, the waiting for the others and the adding: the loops run as
    Python, what they call is compiled.

    Args:
        compiled: leave the loops compiled, so that a call in shared memory is one step.
    """

    def __init__(self, compiled: bool = False):
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
        interpreted = ("sum_stripes", loops._sum), ("two_step", loops._two_step), ("gather", loops._gather)
        interpreted += (("broadcast", loops._broadcast),)
        for name, function in () if compiled else interpreted:
            setattr(loops, name, self._interpreted(function))

    def _before(self, function: Callable) -> Callable:
        def hooked(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                self.act()
            return function(*args, **kwargs)

        return hooked

    def _interpreted(self, function: types.FunctionType) -> Callable:
        # Called from Python, a wait that keeps the interpreter's lock would hold up this rank's other lanes.
        meet = njit(nogil=True, error_model="numpy")(loops._meet.py_func)
        hooked = {"_meet": self._before(meet), "run_rows": self._before(loops.run_rows)}
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
        for lane in (*(meeting.lane for meeting in group._meetings.values()), *group._channels.values()):
            if hasattr(lane.messages, "link"):
                lane.messages.link.timeout_s = seconds
            for memory in lane.memories:
                for place in memory._region.places:
                    place[loops.TIMEOUT_NS] = int(seconds * 1e9)


ALGORITHMS = ("one_step", "two_step", "hierarchical", "reduce_scatter", "all_gather", "all_to_all", "plain")
"""Collectives that `call` runs."""
HOPS = ("broadcast", "ring")
"""Others: from rank 0 to all, and from each rank to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Values of a call and how they travel."""

    codec: str = "bf16"
    dtype: torch.dtype = torch.float32
    rows: int = 8
    cols: int = 128

    def of(self, rank: int, multiple_of: int = 1) -> torch.Tensor:
        """A rank's values, in a number of rows that divides: small whole numbers, whose sum no order changes."""
        rows = self.rows // multiple_of * multiple_of
        values = torch.arange(rows * self.cols, dtype=torch.float32).remainder(7) + rank
        return values.view(rows, self.cols).to(self.dtype)


def call(algorithm: str, group: dist.ProcessGroup, async_op: bool = False, message: Message = Message()):
    """Run one collective of all ranks of `group`."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if algorithm == "plain":
        return flashcomm.all_reduce(message.of(rank), "none", group, async_op=async_op)
    if algorithm in ("one_step", "two_step", "hierarchical"):
        ranks = _mesh(world_size) if algorithm == "hierarchical" else group
        return flashcomm.all_reduce(message.of(rank), message.codec, ranks, algorithm=algorithm, async_op=async_op)
    if algorithm == "broadcast":
        return flashcomm.broadcast(message.of(rank), 0, group, async_op, codec=message.codec)
    if algorithm == "ring":
        sent = flashcomm.isend(message.of(rank), (rank + 1) % world_size, group, codec=message.codec)
        got = flashcomm.irecv(torch.empty_like(message.of(0)), (rank - 1) % world_size, group, codec=message.codec)
        return got if async_op else (sent.wait(), got.wait())[1]
    verb, x = getattr(flashcomm, algorithm), message.of(rank, world_size)
    return verb(x, message.codec, group, algorithm="one_step", async_op=async_op)


def expected(algorithm: str, rank: int, world_size: int, message: Message = Message()) -> torch.Tensor:
    """The result of `call` on `rank`."""
    xs = [message.of(peer) for peer in range(world_size)]
    if algorithm == "plain":
        return torch.stack(xs).sum(0)
    if algorithm in ("one_step", "two_step", "hierarchical"):
        return simulate.all_reduce(xs, message.codec, algorithm, hosts=2 if algorithm == "hierarchical" else 0)
    if algorithm in HOPS:
        codec, sender = codecs.parse(message.codec), 0 if algorithm == "broadcast" else (rank - 1) % world_size
        return codec.decode(codec.encode(xs[sender]), message.cols, message.dtype)
    xs = [message.of(peer, world_size) for peer in range(world_size)]
    mine = lambda x: x.chunk(world_size)[rank]  # noqa: E731
    if algorithm == "reduce_scatter":
        return mine(simulate.all_reduce(xs, message.codec, "one_step"))
    codec = codecs.parse(message.codec)
    decoded = [codec.decode(codec.encode(x), message.cols, message.dtype) for x in xs]
    return torch.cat(decoded if algorithm == "all_gather" else [mine(x) for x in decoded])


@cache
def _mesh(world_size: int) -> DeviceMesh:
    """All ranks, as if they were on two hosts."""
    return init_device_mesh("cpu", (2, world_size // 2))
