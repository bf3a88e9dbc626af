"""The ranks of a group meet, and open the lane on which its calls travel.

A lane is the transports and buffers of one group. Messages are paired by the order in which they were started, so a
lane runs one call after the other, in the caller's order on every rank, whether a call is asynchronous or not. On gloo,
asynchronous calls run on a thread of the lane, and a synchronous call waits for those before it. Where a backend or a
CUDA stream keeps calls in order, there is no thread.

To add a transport, write its file and open it here, in `_open`.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from flashcomm import machine, settings
from flashcomm.errors import RanksDisagree
from flashcomm.transports import gpus
from flashcomm.transports.backend import Backend, BackendLink, backend_of
from flashcomm.transports.base import Link, Memory, Messages, Ranks, Step
from flashcomm.transports.buffers import Buffers
from flashcomm.transports.bulk import Bulk
from flashcomm.transports.connections import Connections
from flashcomm.transports.direct import Direct
from flashcomm.transports.shared.memory import SharedMemory
from flashcomm.transports.symmetric import copies
from flashcomm.transports.symmetric.memory import SymmetricMemory

_log = logging.getLogger("flashcomm")


class Site(NamedTuple):
    """Where a rank runs; ranks tell each other theirs when they meet."""

    host: str
    """The same for ranks that can share memory, and for no others."""
    label: str
    """The host's name, the rate of its link where that is known, and the model of its GPU."""
    threads: int
    """Threads that torch may use."""
    why_not_shared: str
    """The reason why this process cannot share memory; "" if it can."""
    why_not_symmetric: str
    """The same for memory of GPUs."""
    why_not_copies: str
    """The same for copies between GPUs."""
    device: str = "cpu"
    """The kind of device that the tensors are on."""
    gpu: str = ""
    """The GPU of the tensors, by `gpus.name_of`."""
    reach: dict[str, str] | None = None
    """Links from that GPU, by `gpus.reach`."""


class Lane:
    """The transports of one group, and the order of its calls.

    Args:
        messages: carry what no memory serves.
        memories: in the order in which they are asked.
        threaded: run asynchronous calls on a thread.
    """

    def __init__(self, messages: Messages, memories: tuple[Memory, ...] = (), *, threaded: bool = False):
        self.messages, self.memories = messages, memories
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="flashcomm-async") if threaded else None
        """The thread that runs asynchronous calls; None where they run on the caller's."""
        self.turn = threading.RLock()
        """Held by the thread whose call it is."""
        self.last: threading.Event | None = None
        """The end of the call that was submitted last. Not its future, whose error would hold whoever waited for it."""
        self.late = ""
        """The error that every call raises once a rank has not come in time; "" before."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def submit(
        self, function: Callable[[torch.Tensor, torch.Tensor], object], x: torch.Tensor, out: torch.Tensor
    ) -> Future:
        """Call ``function(x, out)`` on the lane's thread, after all calls that were submitted."""
        assert self.thread is not None
        with self.turn:
            future, ended = self.thread.submit(function, x, out), threading.Event()
            future.add_done_callback(lambda _: ended.set())
            self.last = ended
            return future

    def finish(self):
        """Block until all calls that were submitted have ended, well or not."""
        if self.last is not None:
            self.last.wait()
            self.last = None

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The CUDA stream of asynchronous calls on `device`."""
        if device not in self._streams:
            # Under a matrix product, kernels of normal priority would wait until whole waves of it have ended.
            self._streams[device] = torch.cuda.Stream(device, priority=-1)
        return self._streams[device]

    def abandon(self, why: str):
        """Give up after an error in the middle of a call: what is under way would be taken for the next one's."""
        for transport in (self.messages, *self.memories):
            transport.abandon(why)

    def give_up(self, error: str, why: str):
        """End all transports after a timeout: calls behind, over others of them, would wait as long once more each."""
        self.late = self.late or error
        self.abandon(why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """The outcome of a meeting, the same on all ranks."""

    hosts: tuple[int, ...]
    """The host of each rank, counted from 0 in the order of ranks."""
    labels: tuple[str, ...]
    """The label of each rank's host."""
    lane: Lane
    carrier: str
    """The fastest transport that opened: ``shared memory``, ``symmetric memory``, ``connections``, ``copy engines``, or
    the backend."""
    why_not: dict[str, str]
    """The reason why a transport did not open, by its name."""
    link: str = ""
    """The slowest link between the GPUs of two ranks, of `gpus.LINKS`; "" if it is not known, or there are no GPUs."""

    @property
    def shared(self) -> bool:
        """Whether all ranks map the same CPU memory."""
        return self.carrier == SharedMemory.name

    @property
    def connected(self) -> bool:
        """Whether messages travel over connections of our own."""
        return Connections.name not in self.why_not

    @property
    def copied(self) -> bool:
        """Whether copy engines carry messages between GPUs."""
        return copies.NAME not in self.why_not


def meet(
    ranks: Ranks, group: dist.ProcessGroup, tag: int, device: torch.device, hosts: tuple[int, ...] | None = None
) -> Meeting:
    """Learn who shares a host, and open the transports that all ranks can; all ranks come here together.

    Args:
        ranks: of the group.
        group: carries what ranks tell each other, and messages where no faster transport opens.
        tag: of messages that gloo carries.
        device: of the tensors.
        hosts: the host of each rank, if the caller knows better than the operating system.

    Raises:
        ValueError, CollectiveError: a step failed on some rank; raised on all ranks.
        RanksDisagree: the ranks' tensors are on different kinds of devices; raised on all ranks.
    """
    sites = ranks.each(Step.SITE, partial(_site, device))
    # Before any transport opens: ranks of different devices would open different ones, and wait for each other.
    other = next((rank for rank, site in enumerate(sites) if site.device != sites[0].device), None)
    if other is not None:
        raise RanksDisagree(
            f"ranks disagree about this collective: the tensor of {ranks.name(0)} is on {sites[0].device}, that of "
            f"{ranks.name(other)} on {sites[other].device}"
        )
    places = hosts or tuple(site.host for site in sites)
    names = list(dict.fromkeys(places))
    why_not: dict[str, str] = {}
    lane = _open(ranks, group, tag, device, sites, len(names), why_not)
    carriers = [memory.name for memory in lane.memories]
    carriers += [name for name in (copies.NAME, Connections.name) if not why_not[name]]
    return Meeting(
        hosts=tuple(names.index(place) for place in places),
        labels=tuple(site.label for site in sites),
        lane=lane,
        carrier=carriers[0] if carriers else backend_of(group, device),
        why_not={name: why for name, why in why_not.items() if why},
        link=""
        if device.type != "cuda"
        else gpus.slowest(places, [site.gpu for site in sites], [site.reach or {} for site in sites]),
    )


def _open(
    ranks: Ranks,
    group: dist.ProcessGroup,
    tag: int,
    device: torch.device,
    sites: list[Site],
    num_hosts: int,
    why_not: dict[str, str],
) -> Lane:
    """Open every transport that all ranks can, and note the reason for each that does not open."""
    memories = _share(ranks, device, sites, num_hosts, why_not)
    if why := _why_not(device.type == "cuda", 1, [site.why_not_symmetric for site in sites]):
        why_not[SymmetricMemory.name] = why
    else:
        symmetric, why_not[SymmetricMemory.name] = SymmetricMemory.open(ranks, group, device)
        memories += [symmetric] if symmetric else []
    backend = Backend(group)
    if why := _why_not(device.type == "cuda", num_hosts, [site.why_not_copies for site in sites]):
        why_not[copies.NAME] = why
    else:
        opened, why_not[copies.NAME] = copies.Copies.open(ranks, group, device)
        backend = opened or backend
    if device.type == "cuda" or backend_of(group, device) != "gloo" or ranks.world_size == 1:
        why_not[Connections.name] = "they carry CPU tensors between ranks of gloo"
        # No thread for CUDA tensors over gloo: its collectives are paired by their order, also with the caller's own.
        return Lane(Bulk(backend, ranks, Buffers()), tuple(memories))
    link = _connect(ranks, bool(memories), why_not) or BackendLink(group, tag)
    return Lane(Direct(link, ranks, Buffers()), tuple(memories), threaded=True)


def open_pair(ranks: Ranks, link: Link, device: torch.device) -> tuple[Direct, tuple[Memory, ...], int]:
    """Open the transports between two ranks, which come here together and without the rest of their group.

    Args:
        ranks: the two.
        link: carries messages where nothing faster opens.
        device: of the tensors.

    Returns:
        Messages, memories and the number of hosts.
    """
    sites = ranks.each(Step.SITE, partial(_site, device))
    num_hosts = len({site.host for site in sites})
    memories = _share(ranks, device, sites, num_hosts, {})
    if device.type == "cpu":
        link = _connect(ranks, bool(memories), {}) or link
    return Direct(link, ranks, Buffers()), tuple(memories), num_hosts


def _share(
    ranks: Ranks, device: torch.device, sites: list[Site], num_hosts: int, why_not: dict[str, str]
) -> list[Memory]:
    if why := _why_not(device.type == "cpu", num_hosts, [site.why_not_shared for site in sites]):
        why_not[SharedMemory.name] = why
        return []
    shared, why_not[SharedMemory.name] = SharedMemory.open(ranks, threads=min(site.threads for site in sites))
    return [shared] if shared else []


def _connect(ranks: Ranks, shared: bool, why_not: dict[str, str]) -> Connections | None:
    connections, why = Connections.open(ranks)
    why_not[Connections.name] = why
    if not connections and not shared and ranks.rank == 0:
        _log.warning("flashcomm sends gloo's messages, which are slower than connections: %s", why)
    return connections


def _why_not(serves: bool, num_hosts: int, refusals: list[str]) -> str:
    """The reason why ranks cannot use memory of a kind; "" if they can."""
    if not serves:
        return "it is for tensors on other devices"
    if len(refusals) == 1:
        return "one rank"
    if num_hosts > 1:
        return f"{num_hosts} hosts"
    return next((f"rank {rank}: {why}" for rank, why in enumerate(refusals) if why), "")


def _site(device: torch.device) -> Site:
    settings.check()
    gpu, reach = gpus.name_of(device), gpus.reach(device)
    label = socket.gethostname() + (f"@{rate}" if (rate := settings.text("FLASHCOMM_LAB_RATE")) else "")
    label += f" with {kind}" if (kind := gpus.kind_of(device)) else ""
    fused, copied = (
        "" if settings.switched_on(name) else f"{name}=1 is not set" for name in ("FLASHCOMM_FUSED", "FLASHCOMM_COPIES")
    )
    try:
        host = " ".join([machine.boot_id(), *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid"))])
    except OSError:
        why = "no /proc: shared memory needs Linux"
        return Site(socket.gethostname(), label, 1, why, fused, copied, device.type, gpu, reach)
    on = settings.switched_on("FLASHCOMM_SHARED_MEMORY")
    why = machine.why_not_compiled() if on else "FLASHCOMM_SHARED_MEMORY=0"
    return Site(host, label, torch.get_num_threads(), why, fused, copied, device.type, gpu, reach)


def why_not_shared() -> str:
    """The reason why this process cannot share memory with the ranks of its host; "" if it can where they can.

    Raises:
        SettingError: a ``FLASHCOMM_`` switch has a value that is neither on nor off.
    """
    return _site(torch.device("cpu")).why_not_shared
