"""What flashcomm keeps per process group: the agreed contracts, the reused buffers, the lane for asynchronous calls.

Hazard: gloo aborts the process when ranks send messages of different sizes, and the other side may not even notice.
So before the first transfer of every new combination of operation, codec, dtype and shape the ranks compare what they
are about to do, and all of them raise if they differ.
"""

import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

_CONTRACT_BYTES = 512
# Prefill lengths vary without end; dropping all at the same count keeps the ranks in step.
_MAX_CONTRACTS = 4096
# Keeps our messages apart from a caller's own point-to-point messages, whose tag is 0 unless they choose one.
_TAG = 0xFC


class GroupState:
    """State of one process group on this rank."""

    def __init__(self, group: dist.ProcessGroup):
        # Weak, because this object is the value under the group's own weak key.
        self._group = weakref.ref(group)
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        self._global_ranks = dist.get_process_group_ranks(group)
        self._gloo = dist.get_backend(group) == "gloo"
        self._contracts: set[tuple] = set()
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._async_group: dist.ProcessGroup | None = None
        self._async_lane: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError("the process group of this call has been destroyed")
        return group

    def agree(self, contract: tuple, device: torch.device):
        """Compare `contract` with every rank's, the first time that this rank meets it.

        Raises:
            RuntimeError: some rank is about to do something else; raised on all ranks, naming two sides.
        """
        if contract in self._contracts or self.ranks == 1:
            return
        text = ", ".join(f"{key}={value}" for key, value in contract)
        mine = torch.zeros(_CONTRACT_BYTES, dtype=torch.uint8)
        encoded = torch.frombuffer(bytearray(text.encode()[:_CONTRACT_BYTES]), dtype=torch.uint8)
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
        size = 1
        for extent in shape:
            size *= extent
        held = self._buffers.get((name, device))
        if held is None or held.numel() < size:
            # A buffer born in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                held = self._buffers[name, device] = torch.empty(size, dtype=torch.uint8, device=device)
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

    def send(self, part: torch.Tensor, peer: int) -> dist.Work:
        """Start sending a contiguous `part`, which must stay as it is until ``wait()``."""
        work = dist.isend(part, self._global_ranks[peer], group=self.group, tag=_TAG)
        assert work is not None
        return work

    def receive(self, part: torch.Tensor, peer: int) -> dist.Work:
        """Start receiving into a contiguous `part`."""
        work = dist.irecv(part, self._global_ranks[peer], group=self.group, tag=_TAG)
        assert work is not None
        return work

    def async_lane(self) -> tuple["GroupState", ThreadPoolExecutor]:
        """A process group of the same ranks for asynchronous calls, and the one thread that uses it, in order.

        A group of its own, because gloo pairs up messages by the order in which they were started; with one group, a
        collective of the caller could slip between the two transfers of ours on one rank and not on another.
        """
        if self._async_lane is None:
            ranks = dist.get_process_group_ranks(self.group)
            group = dist.new_group(ranks, use_local_synchronization=True, group_desc="flashcomm async")
            assert isinstance(group, dist.ProcessGroup)
            self._async_group = group
            self._async_lane = ThreadPoolExecutor(1, thread_name_prefix="flashcomm-async")
        assert self._async_group is not None
        return state_of(self._async_group), self._async_lane

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The CUDA stream for asynchronous calls."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


_states: "weakref.WeakKeyDictionary[dist.ProcessGroup, GroupState]" = weakref.WeakKeyDictionary()


def state_of(group: "dist.ProcessGroup | None") -> GroupState:
    """The state of `group`, of the default group for None.

    Raises:
        ValueError: torch.distributed is not initialised, or this process is not in `group`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "torch.distributed has no process group yet: call torch.distributed.init_process_group() first, "
            "for example in a script started by torchrun"
        )
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a process group that this rank belongs to, not {group!r}")
    state = _states.get(group)
    if state is None:
        state = _states[group] = GroupState(group)
    return state


# torch 2.13 renames the collectives of one tensor; the older names warn there, the newer do not exist before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(received: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup):
    """received[ranks, ...] = every rank's `sent`."""
    _all_gather(received.view(-1), sent.reshape(-1), group=group)


def scatter_sum(received: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup):
    """Received = the sum over ranks of their sent[this rank]."""
    _reduce_scatter(received, sent, group=group)


def exchange(received: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup):
    """received[i] = rank i's sent[this rank]; both [ranks, ...]."""
    dist.all_to_all_single(received.view(-1), sent.view(-1), group=group)
