"""The ranks of a group meet, and open a lane each for synchronous and asynchronous calls.

A lane is one caller's transports and buffers. Messages are paired by the order in which they were started, so lanes
share nothing: asynchronous calls on gloo run on one thread of their own, in the caller's order on every rank, whatever
else the group does meanwhile. Where asynchronous calls need no thread, because a backend or a CUDA stream orders them,
both lanes are one.

To add a transport, write its file and open it here, in `_lane`.
"""

import importlib.util
import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from flashcomm import settings
from flashcomm.transports.backend import Backend, BackendLink, cpu_backend
from flashcomm.transports.base import Link, Memory, Messages, Ranks
from flashcomm.transports.buffers import Buffers
from flashcomm.transports.bulk import Bulk
from flashcomm.transports.connections import Connections
from flashcomm.transports.direct import Direct
from flashcomm.transports.shared.memory import SharedMemory
from flashcomm.transports.symmetric.memory import SymmetricMemory

_log = logging.getLogger("flashcomm")


class Site(NamedTuple):
    """Where a rank runs; ranks tell each other theirs when they meet."""

    host: str
    """The same for ranks that can share memory, and for no others."""
    label: str
    """The host's name, and the rate of its link where that is known."""
    threads: int
    """Threads that torch may use."""
    why_not_shared: str
    """The reason why this process cannot share memory; "" if it can."""


@dataclass(frozen=True, slots=True)
class Lane:
    """One caller's transports: memories in the order in which they are asked, then messages."""

    messages: Messages
    memories: tuple[Memory, ...] = ()
    thread: ThreadPoolExecutor | None = None
    """The thread that runs asynchronous calls; None where they run on the caller's."""

    def abandon(self, why: str):
        """Give up after an error in the middle of a call: what is under way would be taken for the next one's."""
        for transport in (self.messages, *self.memories):
            transport.abandon(why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """The outcome of a meeting, the same on all ranks."""

    hosts: tuple[int, ...]
    """The host of each rank, counted from 0 in the order of ranks."""
    labels: tuple[str, ...]
    """The label of each rank's host."""
    lanes: tuple[Lane, Lane]
    """For synchronous calls and for asynchronous ones."""
    carrier: str
    """The fastest transport that opened: ``shared memory``, ``symmetric memory``, ``connections``, or the backend."""
    why_not: dict[str, str]
    """The reason why a transport did not open, by its name."""

    @property
    def shared(self) -> bool:
        """Whether all ranks map the same CPU memory."""
        return self.carrier == SharedMemory.name

    @property
    def connected(self) -> bool:
        """Whether messages travel over connections of our own."""
        return Connections.name not in self.why_not


def meet(
    ranks: Ranks, group: dist.ProcessGroup, tag: int, device: torch.device, hosts: tuple[int, ...] | None = None
) -> Meeting:
    """Learn who shares a host, and open the transports that all ranks can; all ranks come here together.

    Args:
        ranks: of the group.
        group: carries what ranks tell each other, and messages where no faster transport opens.
        tag: of messages that gloo carries; asynchronous calls use the next one.
        device: of the tensors.
        hosts: the host of each rank, if the caller knows better than the operating system.

    Raises:
        ValueError, CollectiveError: a step failed on some rank; raised on all ranks.
    """
    sites = ranks.each(_site)
    places = hosts or tuple(site.host for site in sites)
    names = list(dict.fromkeys(places))
    opened = _Opened(ranks, group, device, tuple(sites), len(names))
    if device.type == "cuda" or cpu_backend(group) != "gloo":
        # Backends and streams keep asynchronous calls in order.
        lane = opened.lane(tag)
        lanes = lane, lane
    else:
        lanes = opened.pair(tag)
    memory = lanes[0].memories[0].name if lanes[0].memories else ""
    why_not = opened.why_not
    return Meeting(
        hosts=tuple(names.index(place) for place in places),
        labels=tuple(site.label for site in sites),
        lanes=lanes,
        carrier=memory or (cpu_backend(group) if Connections.name in why_not else Connections.name),
        why_not=why_not,
    )


class _Opened:
    """The transports that open, lane by lane."""

    def __init__(
        self, ranks: Ranks, group: dist.ProcessGroup, device: torch.device, sites: tuple[Site, ...], num_hosts: int
    ):
        self._ranks, self._group, self._device, self._sites = ranks, group, device, sites
        self.why_not: dict[str, str] = {}
        refused = [(rank, site.why_not_shared) for rank, site in enumerate(sites) if site.why_not_shared]
        if device.type != "cpu":
            self.why_not[SharedMemory.name] = f"tensors are on {device.type}"
        elif num_hosts > 1:
            self.why_not[SharedMemory.name] = f"{num_hosts} hosts"
        elif refused:
            self.why_not[SharedMemory.name] = f"rank {refused[0][0]}: {refused[0][1]}"

    def lane(self, tag: int) -> Lane:
        """The one lane of a backend that keeps calls in order."""
        self.why_not[Connections.name] = "they carry messages of CPU tensors where gloo is the backend"
        memories: tuple[Memory, ...] = self._share(1)
        if self._device.type == "cuda":
            symmetric, why = SymmetricMemory.open(self._ranks, self._group, self._device)
            if symmetric:
                memories = (symmetric,)
            else:
                self.why_not[SymmetricMemory.name] = why
        return Lane(Bulk(Backend(self._group), self._ranks, Buffers()), memories)

    def pair(self, tag: int) -> tuple[Lane, Lane]:
        """The two lanes of a gloo group."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="flashcomm-async")
        memories = self._share(2, idle=lambda: thread.submit(int).result())
        # Now, because the first asynchronous call must not wait for ranks that are late.
        links = self._link(tag), self._link(tag + 1)
        if Connections.name in self.why_not and not memories and self._ranks.rank == 0:
            why = self.why_not[Connections.name]
            _log.warning("flashcomm sends gloo's messages, which are slower than connections: %s", why)
        lanes = [
            Lane(Direct(link, self._ranks, Buffers()), memories[number : number + 1], thread if number else None)
            for number, link in enumerate(links)
        ]
        return lanes[0], lanes[1]

    def _share(self, count: int, idle: Callable[[], object] = int) -> tuple[SharedMemory, ...]:
        """As many shared memories, or none."""
        if SharedMemory.name in self.why_not:
            return ()
        threads = min(site.threads for site in self._sites)
        memories = []
        for number in range(count):
            memory, why = SharedMemory.open(self._ranks, threads=threads, idle=idle if number else int)
            if memory is None:
                self.why_not[SharedMemory.name] = why
                return ()
            memories.append(memory)
        return tuple(memories)

    def _link(self, tag: int) -> Link:
        if Connections.name not in self.why_not:
            connections, why = Connections.open(self._ranks)
            if connections:
                return connections
            self.why_not[Connections.name] = why
        return BackendLink(self._group, tag)


def _site() -> Site:
    settings.check()
    label = socket.gethostname() + (f"@{rate}" if (rate := settings.text("FLASHCOMM_LAB_RATE")) else "")
    try:
        namespaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid")]
        host = " ".join([Path("/proc/sys/kernel/random/boot_id").read_text().strip(), *namespaces])
    except OSError:
        return Site(socket.gethostname(), label, 1, "no /proc: shared memory needs Linux")
    why = ""
    if not settings.switched_on("FLASHCOMM_SHARED_MEMORY"):
        why = "FLASHCOMM_SHARED_MEMORY=0"
    elif importlib.util.find_spec("numba") is None:
        why = "numba is not installed (pip install numba)"
    return Site(host, label, torch.get_num_threads(), why)


def why_not_shared() -> str:
    """The reason why this process cannot share memory with the ranks of its host; "" if it can where they can."""
    return _site().why_not_shared
