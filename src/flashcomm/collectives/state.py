"""What flashcomm keeps per process group: how ranks reach each other, agreed contracts, buffers, the asynchronous lane.

Hazard: gloo aborts the process when ranks send messages of different sizes, and the other side may not even notice.
So before the first transfer of every new combination of operation, codec, dtype and shape the ranks compare what they
are about to do, and all of them raise if they differ.
"""

import contextvars
import importlib.util
import itertools
import logging
import math
import os
import socket
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import device_mesh

from flashcomm.collectives import symmetric, tuning
from flashcomm.collectives.connections import Connections, Transfer
from flashcomm.collectives.shared import HALF_BYTES, SharedMemory
from flashcomm.planner import Facts

_CONTRACT_BYTES = 512
_log = logging.getLogger("flashcomm")
# Prefill lengths vary without end; dropping all at the same count keeps the ranks in step.
_MAX_CONTRACTS = 4096
_MAX_CALLS = 4096
# Keeps our messages apart from a caller's own point-to-point messages, whose tag is 0 unless they choose one. The next
# tag is that of the messages of asynchronous calls.
_TAG = 0xFC


class GroupState:
    """State of one process group on this rank."""

    def __init__(self, group: dist.ProcessGroup, tag: int = _TAG, hosts: "list[int] | None" = None):
        # Weak, because this object is the value under the group's own weak key.
        self._group = weakref.ref(group)
        self.keep: dist.ProcessGroup | None = None
        """The group itself, where nobody else has it."""
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self._global_ranks = dist.get_process_group_ranks(group)
        self._tag = tag
        self.tags = itertools.count(tag + 2, 2)
        """Tags for the meshes over the same group, whose lanes are threads of their own."""
        self._gloo = _cpu_backend(group) == "gloo"
        self._contracts: set[str] = set()
        self.calls: dict[tuple, Any] = {}
        """Calls that were decided and checked, by what they were given."""
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._met = False
        self._given = hosts
        self.hosts: list[int] = hosts or [0] * self.ranks
        """Which host each rank is on, counted from 0 in the order of ranks; given, or known after `meet`."""
        self.facts = Facts(ranks=self.ranks, hosts=_num_hosts(self.hosts))
        self.name = ""
        """What measured costs of this group are kept under."""
        self._levels: tuple[GroupState, GroupState] | None = None
        self.shared: SharedMemory | None = None
        """Memory that all ranks map, if all are on one host."""
        self.why_not_shared = "the ranks have not met yet"
        self._lane_shared: SharedMemory | None = None
        self.connections: Connections | None = None
        """Our own, if all ranks reach each other; for what does not go through shared memory."""
        self.why_not_connected = "the ranks have not met yet"
        self._lane_connections: Connections | None = None
        self._lane: tuple[GroupState, ThreadPoolExecutor] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._symmetric: dict[torch.device, Any] = {}
        self.why_not_symmetric = "no call on CUDA yet"

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError("the process group of this call has been destroyed")
        return group

    @property
    def timeout_s(self) -> float:
        """Seconds after which a collective that some rank has not joined is an error."""
        options = getattr(self.group._get_backend(torch.device("cpu")), "options", None)
        timeout = getattr(options, "_timeout", None)
        return timeout.total_seconds() if timeout else 1800.0

    def tell(self, fact: Any) -> list:
        """Every rank's `fact`, in rank order."""
        facts: list = [None] * self.ranks
        dist.all_gather_object(facts, fact, group=self.group)
        return facts

    def facts_for(self, device: torch.device) -> Facts:
        """What a plan for tensors on `device` depends on."""
        return self.facts if device.type == "cpu" else replace(self.facts, device=device.type)

    def meet(self, device: torch.device):
        """On the first call: learn who shares a host, and map memory together if all do."""
        if self._met or self.ranks == 1 or device.type != "cpu":
            return
        self._met = True
        facts = self.tell(_facts())
        places = self._given or [fact.host for fact in facts]
        names = list(dict.fromkeys(places))
        self.hosts = [names.index(place) for place in places]
        refused = [(rank, fact.why_not_shared) for rank, fact in enumerate(facts) if fact.why_not_shared]
        if len(names) > 1:
            self.why_not_shared = f"{len(names)} hosts"
        elif refused:
            self.why_not_shared = f"rank {refused[0][0]}: {refused[0][1]}"
        else:
            self.why_not_shared = self._open(HALF_BYTES, min(fact.threads for fact in facts))
        self._connect()
        by = "shared memory" if self.shared else "connections" if self.connections else ""
        labels = [(host, fact.label) for host, fact in zip(self.hosts, facts, strict=True)]
        self.name = tuning.name_of(_cpu_backend(self.group), labels, by)
        costs = self.tell(tuning.load(self.name) if self.rank == 0 else None)[0]
        self.facts = Facts(
            ranks=self.ranks,
            hosts=_num_hosts(self.hosts),
            shared=bool(self.shared),
            connected=bool(self.connections),
            costs=costs,
        )

    def _open(self, half_bytes: int, threads: int) -> str:
        """Map memory for synchronous calls, and more for asynchronous ones: their thread could not do it in step.

        Returns:
            "", or why there is no more than there was.
        """
        memory, why = SharedMemory.open(self, half_bytes, threads)
        lane_memory, why = SharedMemory.open(self, half_bytes, threads) if memory else (None, why)
        if lane_memory:
            if self._lane:
                # What other ranks began in the memory that was, this rank must finish there too.
                self._lane[1].submit(int).result()
                self._lane[0].shared = lane_memory
            self.shared, self._lane_shared = memory, lane_memory
        return why

    def _connect(self):
        if self.direct(torch.device("cpu")):
            self.connections, why = Connections.open(self)
            if self.connections:
                # Now, because the first asynchronous call must not wait for ranks that are late.
                self._lane_connections, why = Connections.open(self)
            if why and not self.shared and self.rank == 0:
                _log.warning("flashcomm sends gloo's messages, which are slower than connections: %s", why)
            self.why_not_connected = why

    def abandon(self, why: str):
        """After a call that failed in the middle: what is still under way would be taken for the next one's."""
        for state in (self, *(self._levels or ())):
            if state.connections:
                state.connections.close(why)

    def levels(self) -> "tuple[GroupState, GroupState]":
        """The ranks of this host, and those with this one's place on every host: a mesh's groups, or two made once."""
        if self._levels is None:
            place = [self.hosts[:rank].count(host) for rank, host in enumerate(self.hosts)]
            states = []
            _even_out(self.group)
            for labels in (self.hosts, place):
                members = [self._global_ranks[r] for r in range(self.ranks) if labels[r] == labels[self.rank]]
                group = dist.new_group(members, backend=dist.get_backend(self.group), use_local_synchronization=True)
                assert isinstance(group, dist.ProcessGroup)
                state = GroupState(group, self._tag)
                state.keep = group
                state.meet(torch.device("cpu"))
                states.append(state)
            self._levels = (states[0], states[1])
        return self._levels

    def reserve(self, half_bytes: int):
        """Have shared memory for pieces of so many bytes; all ranks come here with the same call.

        Raises:
            RuntimeError: the memory cannot grow.
        """
        if self.shared and half_bytes > self.shared.half_bytes:
            why = self._open(1 << (half_bytes - 1).bit_length(), self.shared.threads)
            if why:
                raise RuntimeError(f"a row of {half_bytes} bytes needs more shared memory: {why}")

    def remember(self, key: tuple, call: Any):
        """Keep a call that was decided."""
        if len(self.calls) >= _MAX_CALLS:
            self.calls.clear()
        self.calls[key] = call

    def agree(self, contract: str, device: torch.device):
        """Compare `contract` with every rank's, the first time that this rank meets it.

        Raises:
            RuntimeError: some rank is about to do something else; raised on all ranks, naming two sides.
        """
        if contract in self._contracts or self.ranks == 1:
            return
        mine = torch.zeros(_CONTRACT_BYTES, dtype=torch.uint8)
        encoded = torch.frombuffer(bytearray(contract.encode()[:_CONTRACT_BYTES]), dtype=torch.uint8)
        mine[: len(encoded)] = encoded
        everyone = torch.empty(self.ranks, _CONTRACT_BYTES, dtype=torch.uint8, device=device)
        gather(everyone, mine.to(device), self.group)
        texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in everyone.cpu().numpy()]
        if len(set(texts)) > 1:
            other = next(rank for rank, theirs in enumerate(texts) if theirs != texts[0])
            raise RuntimeError(
                f"ranks disagree about this collective: rank 0 calls {texts[0]}; rank {other} calls {texts[other]}. "
                "Every rank of the group must use the same operation, codec, algorithm, dtype and shape"
            )
        if len(self._contracts) >= _MAX_CONTRACTS:
            self._contracts.clear()
        self._contracts.add(contract)

    def buffer(self, name: str, device: torch.device, *shape: int) -> torch.Tensor:
        """An uninitialised uint8 buffer, reused by the next call of the same name; it only ever grows."""
        size = math.prod(shape)
        # Calls on different streams overlap, so they must not share.
        stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
        held = self._buffers.get((name, device, stream))
        if held is None or held.numel() < size:
            # A buffer born in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                held = self._buffers[name, device, stream] = torch.empty(size, dtype=torch.uint8, device=device)
        return held[:size].view(shape)

    def direct(self, device: torch.device) -> bool:
        """Whether to send each rank its part by itself, so that encoding and decoding overlap with the transfers.

        On gloo that is also the faster gather: its own is a ring of R - 1 rounds, one after the other. Other backends
        have one good operation for the whole.
        """
        return self._gloo and device.type == "cpu"

    def peers(self) -> list[int]:
        """The other ranks, the next one first, so that not everybody starts with rank 0."""
        return [(self.rank + i) % self.ranks for i in range(1, self.ranks)]

    def send(self, part: torch.Tensor, peer: int) -> dist.Work | Transfer:
        """Start sending a contiguous `part`, which must stay as it is until ``wait()``."""
        if self.connections:
            return self.connections.send(part, peer)
        work = dist.isend(part, self._global_ranks[peer], group=self.group, tag=self._tag)
        assert work is not None
        return work

    def receive(self, part: torch.Tensor, peer: int) -> dist.Work | Transfer:
        """Start receiving into a contiguous `part`, after those that this rank receives from that peer already."""
        if self.connections:
            return self.connections.receive(part, peer)
        work = dist.irecv(part, self._global_ranks[peer], group=self.group, tag=self._tag)
        assert work is not None
        return work

    def lane(self) -> tuple["GroupState", ThreadPoolExecutor]:
        """For asynchronous calls on gloo: buffers and connections of their own, and the one thread that runs them.

        Messages are paired by the order in which they were started. With connections, or a tag of gloo's, that only
        this thread uses, that order is the caller's on every rank, whatever else the group does meanwhile.
        """
        if self._lane is None:
            lane = GroupState(self.group, self._tag + 1)
            lane.shared, lane.hosts, lane.facts = self._lane_shared, self.hosts, self.facts
            lane.connections = self._lane_connections
            if self.facts.has_levels:
                # Groups of its own, also where a mesh has some: the lane grows memory when others may be using those.
                lane.levels()
            self._lane = lane, ThreadPoolExecutor(1, thread_name_prefix="flashcomm-async")
        return self._lane

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The CUDA stream for asynchronous calls on `device`."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def symmetric(self, device: torch.device) -> Any:
        """The `kernels.fused.Peers` of this group on `device`, made on the first call; None where there are none."""
        if device not in self._symmetric:
            self._symmetric[device], self.why_not_symmetric = symmetric.open_memory(self, device)
        return self._symmetric[device]


class _Facts(NamedTuple):
    """What a rank tells the others when they meet."""

    host: str
    """The same for ranks that can share memory, and for no others."""
    label: str
    """What people call the host, and what is known of its link."""
    threads: int
    why_not_shared: str


def _facts() -> _Facts:
    label = socket.gethostname() + (f"@{rate}" if (rate := os.environ.get("FLASHCOMM_LAB_RATE")) else "")
    try:
        namespaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid")]
        host = " ".join([Path("/proc/sys/kernel/random/boot_id").read_text().strip(), *namespaces])
    except OSError:
        return _Facts(socket.gethostname(), label, 1, "no /proc: shared memory needs Linux")
    why = ""
    if os.environ.get("FLASHCOMM_SHARED_MEMORY", "1") == "0":
        why = "FLASHCOMM_SHARED_MEMORY=0"
    elif importlib.util.find_spec("numba") is None:
        why = "numba is not installed (pip install numba)"
    return _Facts(host, label, torch.get_num_threads(), why)


def why_not_shared() -> str:
    """Why this process cannot share memory with the other ranks of its host; "" if it can where they can."""
    return _facts().why_not_shared


def _cpu_backend(group: dist.ProcessGroup) -> str:
    """The backend that serves CPU tensors; `dist.get_backend` does not know it for a group that has several."""
    try:
        return group._get_backend(torch.device("cpu")).name().lower()
    except RuntimeError:
        return "none"


def _even_out(*groups: dist.ProcessGroup):
    """Let all ranks be in as many groups as each other, before they make one without the rest of the world.

    torch names such a group by its ranks and by how many groups a rank is in, so a rank in more of them would wait for
    another name. Over a mesh's row and then its column the largest number comes round to all of its ranks.
    """
    names = dist.distributed_c10d._world.pg_names
    most = len(names)
    for group in groups:
        counts: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(counts, most, group=group)
        most = max(counts)
    while len(names) < most:
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


def _num_hosts(hosts: list[int]) -> int:
    """Number of hosts that can be a level, of the host of each rank; 0 if they cannot."""
    members = [[rank for rank, theirs in enumerate(hosts) if theirs == host] for host in dict.fromkeys(hosts)]
    return len(members) if len({len(ranks) for ranks in members}) == 1 and _ascends(members) else 0


def _ascends(rows: list[list[int]]) -> bool:
    """Whether ranks ascend along rows and columns.

    torch numbers the ranks of a group in ascending order, so only then is a row's i-th rank in the i-th column's group,
    and the i-th rank of a column in the i-th row's.
    """
    return all(list(line) == sorted(line) for line in (*rows, *zip(*rows, strict=True)))


_states: "weakref.WeakKeyDictionary[dist.ProcessGroup, GroupState]" = weakref.WeakKeyDictionary()
_meshes: "weakref.WeakKeyDictionary[dist.ProcessGroup, weakref.WeakKeyDictionary[dist.ProcessGroup, GroupState]]"
_meshes = weakref.WeakKeyDictionary()
"""States of meshes with levels, by their groups between and inside: a mesh may be made anew for every call."""


def state_of(group: "dist.ProcessGroup | device_mesh.DeviceMesh | None") -> GroupState:
    """The state of `group`, of the default group for None.

    Raises:
        ValueError: torch.distributed is not initialised, this process is not in `group`, or a mesh that is no group.
    """
    world = dist.group.WORLD
    if world is None:
        raise ValueError(
            "torch.distributed has no process group yet: call torch.distributed.init_process_group() first, "
            "for example in a script started by torchrun"
        )
    group = world if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        if isinstance(group, device_mesh.DeviceMesh):
            return _state_of_mesh(group)
        raise ValueError(f"group must be a process group that this rank belongs to, or a DeviceMesh, not {group!r}")
    state = _states.get(group)
    if state is None:
        state = _states[group] = GroupState(group)
    return state


def _state_of_mesh(mesh: "device_mesh.DeviceMesh") -> GroupState:
    if mesh.ndim not in (1, 2):
        raise ValueError(
            f"a mesh of {mesh.ndim} dimensions, {list(mesh.shape)}, is no group: give one of 2, hosts and the ranks of "
            "each, or of 1. Of a larger mesh take a part by the names of its dimensions, such as mesh['host', 'rank']"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"group must be a mesh that this rank belongs to: rank {dist.get_rank()} is not in {mesh.mesh.tolist()}"
        )
    if mesh.ndim == 1 or 1 in mesh.shape:
        # One row or one column is all ranks, without levels.
        return state_of(mesh.get_group(0 if mesh.ndim == 1 or mesh.shape[1] == 1 else 1))
    between, inside = mesh.get_group(0), mesh.get_group(1)
    states = _meshes.setdefault(between, weakref.WeakKeyDictionary())
    if inside not in states:
        states[inside] = _with_levels(mesh.mesh.tolist(), between, inside)
    return states[inside]


def _with_levels(rows: list[list[int]], between: dist.ProcessGroup, inside: dist.ProcessGroup) -> GroupState:
    """The state of all ranks in `rows`, one row for each host; the two groups are those that this rank is in."""
    if not _ascends(rows):
        tidy = sorted(map(sorted, rows))
        advice = f"{tidy} has the same hosts" if _ascends(tidy) else "Start the ranks of a host one after the other"
        raise ValueError(
            f"the ranks of a mesh must ascend along both dimensions, as torch numbers those of its groups: not {rows}. "
            + advice
        )
    mine = next(row for row in rows if dist.get_rank() in row)
    if dist.get_process_group_ranks(inside) != mine:
        raise ValueError(
            f"the group of dimension 1 must have the ranks {mine} as the mesh {rows} says, not "
            f"{dist.get_process_group_ranks(inside)}: let DeviceMesh or init_device_mesh make its groups"
        )
    members, backend = sorted(itertools.chain(*rows)), dist.get_backend(inside)
    group, whole = dist.group.WORLD, len(members) == dist.get_world_size()
    if not whole or dist.get_backend(group) != backend:
        _even_out(inside, between)
        group = dist.new_group(members, backend=backend, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    host_of = {rank: host for host, ranks in enumerate(rows) for rank in ranks}
    state = GroupState(group, next(state_of(group).tags), [host_of[rank] for rank in members])
    # The default group ends when its owner ends it.
    state.keep = group if group is not dist.group.WORLD else None
    state._levels = state_of(inside), state_of(between)
    return state


_plain: "contextvars.ContextVar[bool]" = contextvars.ContextVar("plain", default=False)


@contextmanager
def plain_sums():
    """Around an all-reduce of torch that is to stay what it is, also where `torch_backend` is the backend."""
    before = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(before)


def is_plain() -> bool:
    """Whether this thread is in `plain_sums`."""
    return _plain.get()


# torch 2.13 renames the collectives of one tensor; the older names warn there, the newer do not exist before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(received: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup, *, async_op: bool = False) -> Any:
    """received[ranks, ...] = every rank's `sent`; with `async_op`, once the returned work is done."""
    return _all_gather(received.view(-1), sent.reshape(-1), group=group, async_op=async_op)


def scatter_sum(received: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup):
    """Received = the sum over ranks of their sent[this rank]."""
    _reduce_scatter(received, sent, group=group)


def exchange(received: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """received[i] = rank i's sent[this rank], once the returned work is done; both [ranks, ...]."""
    return dist.all_to_all_single(received.view(-1), sent.view(-1), group=group, async_op=True)
