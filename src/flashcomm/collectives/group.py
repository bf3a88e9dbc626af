"""A process group on this rank: the outcome of its meetings, its levels, agreed contracts, remembered calls.

Hazard: gloo aborts the process when ranks send messages of different sizes, and the other side may not even notice.
So before the first transfer of every new combination of operation, codec, dtype and shape the ranks compare what they
are about to do, and all of them raise if they differ.
"""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from flashcomm import measured, planner
from flashcomm.collectives import topology
from flashcomm.errors import CollectiveError, RanksDisagree, kind_of
from flashcomm.transports import lanes
from flashcomm.transports.backend import Backend, backend_of, timeout_s
from flashcomm.transports.base import Failure, Ranks, Step
from flashcomm.transports.channels import Channel

_CONTRACT_BYTES = 512
# In the place of a contract that a rank cannot keep, before the reason. No contract begins like this.
_FAILED = "\x01"
# Prefill lengths vary without end; dropping all at the same count keeps the ranks in step.
_MAX_CONTRACTS = 4096
_MAX_CALLS = 4096
# Keeps our messages apart from a caller's own point-to-point messages, whose tag is 0 unless they choose one.
_TAG = 0xFC
_CPU = torch.device("cpu")


class Group:
    """A process group on this rank.

    Args:
        group: held weakly, because this object is the value under the group's own weak key.
        tag: of messages that gloo carries.
        hosts: the host of each rank, if the caller knows better than the operating system.
        levels: the groups inside of this rank's host and between hosts, if the caller has some.
        keep: hold `group` strongly, because the caller does not.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        tag: int = _TAG,
        *,
        hosts: tuple[int, ...] | None = None,
        levels: "tuple[Group, Group] | None" = None,
        keep: bool = False,
    ):
        self.backend = Backend(group)
        self._keep = group if keep else None
        self._tag, self._hosts, self._levels = tag, hosts, levels
        self.tags = itertools.count(tag + 1)
        """Tags for other lanes over the same process group, whose threads are their own."""
        self.ranks = Ranks(
            rank=group.rank(),
            world_size=group.size(),
            timeout_s=timeout_s(group),
            tell=partial(_tell, self.backend),
        )
        self.calls: dict[tuple, Any] = {}
        """Decided calls, by their arguments."""
        self._channels: dict[tuple, Channel] = {}
        self._contracts: set[str] = set()
        self._meetings: dict[torch.device, lanes.Meeting] = {}
        self._unmet = planner.Facts(
            ranks=self.ranks.world_size, hosts=topology.num_hosts(hosts or [0] * self.ranks.world_size)
        )
        self._facts: dict[str, planner.Facts] = {}
        self._names: dict[str, str] = {}

    def meet(self, device: torch.device) -> lanes.Meeting:
        """On the first call for a device: learn who shares a host, and open the transports.

        Raises:
            ValueError, CollectiveError: a step failed on some rank; raised on all, and tried again by the next call.
        """
        meeting = self._meetings.get(device)
        if meeting is None:
            group = self.backend.group
            meeting = lanes.meet(self.ranks, group, self._tag, device, self._hosts)
            self._learn(meeting, backend_of(group, device), device)
            self._meetings[device] = meeting
        return meeting

    def _learn(self, meeting: lanes.Meeting, backend: str, device: torch.device):
        carrier = "" if meeting.carrier == backend else meeting.carrier
        name = measured.name_of(backend, list(zip(meeting.hosts, meeting.labels, strict=True)), carrier, meeting.link)
        # Only rank 0 reads the file, so that all ranks plan with the same figures.
        costs = self.ranks.each(Step.COSTS, lambda: measured.load(name) if self.ranks.rank == 0 else None)[0]
        self._names[device.type] = name
        self._facts[device.type] = planner.Facts(
            ranks=self.ranks.world_size,
            hosts=topology.num_hosts(meeting.hosts),
            shared=meeting.shared,
            connected=meeting.connected,
            costs=costs,
            device=device.type,
            link=meeting.link,
            copied=meeting.copied,
        )

    @property
    def facts(self) -> planner.Facts:
        """The facts that a plan for tensors on the CPU depends on."""
        return self.facts_for(_CPU)

    @facts.setter
    def facts(self, facts: planner.Facts):
        self._facts["cpu"] = facts

    @property
    def name(self) -> str:
        """Key of this group's measured costs on the CPU; "" before the ranks have met."""
        return self.name_for(_CPU)

    def facts_for(self, device: torch.device) -> planner.Facts:
        """The facts that a plan for tensors on `device` depends on."""
        return self._facts.get(device.type) or replace(self._unmet, device=device.type)

    def name_for(self, device: torch.device) -> str:
        """Key of this group's measured costs for tensors on `device`; "" before the ranks have met."""
        return self._names.get(device.type, "")

    def levels(self, device: torch.device) -> "tuple[Group, Group]":
        """The ranks of this host, and those with this one's place on every host: a mesh's groups, or two made once."""
        if self._levels is None:
            hosts = self._hosts or self.meet(device).hosts
            inside, between = topology.new_levels(self.backend.group, hosts)
            self._levels = Group(inside, self._tag, keep=True), Group(between, self._tag, keep=True)
        return self._levels

    def channel(self, sender: int, receiver: int, tag: int, device: torch.device) -> Channel:
        """The channel from one rank to another, of which this rank is one; made when first asked for."""
        key = sender, receiver, tag, device
        if key not in self._channels:
            self._channels[key] = Channel(self.backend.group, *key, timeout_s=self.ranks.timeout_s)
        return self._channels[key]

    def remember(self, key: tuple, call: Any):
        """Keep a decided call; ranks have agreed on its contract."""
        if len(self.calls) >= _MAX_CALLS:
            self.calls.clear()
        self.calls[key] = call

    def agree(
        self,
        contract: str,
        device: torch.device,
        load: Callable[[], object] = lambda: None,
        known_as: str | None = None,
    ):
        """Compare `contract` with every rank's, the first time that this rank meets it.

        Args:
            contract: of the call.
            device: of its tensors.
            load: loads what this rank needs to keep the contract.
            known_as: shared by contracts of which only the first is compared; the contract itself if not given.

        Raises:
            CollectiveError: `load` failed on some rank; raised on all ranks.
            RanksDisagree: some rank is about to do something else; raised on all ranks, naming two sides.
            PeerLost, TimedOut: some rank does not come.
        """
        known_as = known_as or contract
        if known_as in self._contracts or self.ranks.world_size == 1:
            load()
            return
        loaded, cause = self.ranks.alone(Step.KERNELS, load)
        if isinstance(loaded, Failure):
            contract = _FAILED + loaded.why
        mine = torch.zeros(_CONTRACT_BYTES, dtype=torch.uint8, device="cpu")
        encoded = torch.frombuffer(bytearray(contract.encode()[:_CONTRACT_BYTES]), dtype=torch.uint8)
        mine[: len(encoded)] = encoded
        everyone = torch.empty(self.ranks.world_size, _CONTRACT_BYTES, dtype=torch.uint8, device=device)
        try:
            self.backend.all_gather(mine.to(device), everyone)
        except RuntimeError as error:
            raise kind_of(error)(
                f"rank {self.ranks.rank} could not compare {contract!r} with others: {error}"
            ) from error
        texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in everyone.cpu().numpy()]
        for rank, text in enumerate(texts):
            if text.startswith(_FAILED):
                raise Failure(Step.KERNELS, CollectiveError, text.removeprefix(_FAILED)).error(
                    f"rank {rank}"
                ) from cause
        if len(set(texts)) > 1:
            other = next(rank for rank, theirs in enumerate(texts) if theirs != texts[0])
            raise RanksDisagree(
                f"ranks disagree about this collective: rank 0 calls {texts[0]}; rank {other} calls {texts[other]}. "
                "Every rank of the group must use the same operation, codec, algorithm, dtype and shape"
            )
        if len(self._contracts) >= _MAX_CONTRACTS:
            self._contracts.clear()
            # A remembered call must have an agreed contract: ranks that remember different spellings of one codec
            # would otherwise differ in whether they compare it again.
            self.calls.clear()
        self._contracts.add(known_as)


def _tell(backend: Backend, fact: Any) -> list:
    """Every rank's fact."""
    facts: list = [None] * dist.get_world_size(backend.group)
    try:
        dist.all_gather_object(facts, fact, group=backend.group)
    except RuntimeError as error:
        raise kind_of(error)(f"ranks could not meet: {error}") from error
    return facts


_groups: "dict[int, tuple[weakref.ref[dist.ProcessGroup], Group]]" = {}
"""Groups by the identity of their process group, held weakly. A WeakKeyDictionary takes three times as long, which
matters in every call."""
_meshes: "weakref.WeakKeyDictionary[dist.ProcessGroup, weakref.WeakKeyDictionary[dist.ProcessGroup, Group]]"
_meshes = weakref.WeakKeyDictionary()
"""Groups of meshes with levels, by their groups between and inside: a mesh may be made anew for every call."""


def group_of(group: Any) -> Group:
    """The `Group` of a process group, of the default group for None, or of a DeviceMesh.

    Raises:
        ValueError: torch.distributed is not initialised, this rank is not in `group`, or the mesh is not a group.
    """
    means = dist.group.WORLD if group is None else group
    known = _groups.get(id(means))
    if known is not None and known[0]() is means:
        return known[1]
    means = topology.process_group(group)
    if isinstance(means, dist.ProcessGroup):
        known = _groups.get(id(means))
        return known[1] if known is not None and known[0]() is means else register(means, Group(means))
    between, inside = means.get_group(0), means.get_group(1)
    groups = _meshes.setdefault(between, weakref.WeakKeyDictionary())
    if inside not in groups:
        whole, hosts = topology.all_ranks(means.mesh.tolist(), between, inside)
        levels = Group(inside, next(group_of(inside).tags)), Group(between, next(group_of(between).tags))
        # The default group ends when its owner ends it.
        groups[inside] = Group(
            whole, next(group_of(whole).tags), hosts=hosts, levels=levels, keep=whole is not dist.group.WORLD
        )
    return groups[inside]


def register(process_group: dist.ProcessGroup, group: Group) -> Group:
    """Keep `group` as long as its process group lives, for `group_of` to find."""
    key = id(process_group)
    _groups[key] = weakref.ref(process_group, lambda _: _groups.pop(key, None)), group
    return group
