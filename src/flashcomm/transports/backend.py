"""The collectives and messages of torch.distributed: gloo, NCCL or whatever serves the group."""

import contextlib
import contextvars
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from flashcomm.transports.base import Transfer

# torch 2.13 renames the collectives of one tensor; the older names warn there, the newer do not exist before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Backend:
    """The collectives of a process group.

    The group is held weakly: what is kept per group must not keep it alive.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = weakref.ref(group)

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            RuntimeError: it has been destroyed.
        """
        group = self._group()
        if group is None:
            raise RuntimeError("the process group of this call has been destroyed")
        return group

    def gather(self, received: torch.Tensor, sent: torch.Tensor) -> Any:
        """Start received[r] = rank r's `sent`; return the backend's handle."""
        return _all_gather(received.view(-1), sent.reshape(-1), group=self.group, async_op=True)

    def exchange(self, received: torch.Tensor, sent: torch.Tensor) -> Any:
        """Start received[r] = rank r's sent[this rank]; return the backend's handle."""
        return dist.all_to_all_single(received.view(-1), sent.view(-1), group=self.group, async_op=True)

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, out_rows: Sequence[int], in_rows: Sequence[int]):
        """Send ``in_rows[r]`` rows to rank r, and receive ``out_rows[r]`` rows from it."""
        dist.all_to_all_single(received, sent, list(out_rows), list(in_rows), group=self.group)

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor, *, async_op: bool = False) -> Any:
        """Write the backend's own sum of `x` to a contiguous `out`; return its handle if `async_op`."""
        if out.data_ptr() != x.data_ptr() or out.stride() != x.stride():
            out.copy_(x)
        with plain_sums():
            return dist.all_reduce(out, group=self.group, async_op=async_op)

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor):
        """Write the backend's own sum of this rank's part of `x` to `out`."""
        _reduce_scatter(out, x.contiguous(), group=self.group)

    def all_gather(self, x: torch.Tensor, out: torch.Tensor):
        """Write every rank's `x` to `out`."""
        _all_gather(out.view(-1), x.reshape(-1), group=self.group)

    def gather_rows(self, x: torch.Tensor, out: torch.Tensor, sizes: Sequence[int]):
        """Write every rank's `x` to a contiguous `out`, of which rank r's are ``sizes[r]`` rows.

        As many broadcasts as ranks: gloo gathers tensors of one shape only.
        """
        parts = out.split(list(sizes))
        parts[self.group.rank()].copy_(x)
        for work in [self.broadcast(part, rank) for rank, part in enumerate(parts) if part.numel()]:
            work.wait()

    def reduce_rows(self, x: torch.Tensor, out: torch.Tensor, sizes: Sequence[int]):
        """Write the backend's own sum of this rank's rows of `x` to `out`; rank r's are ``sizes[r]`` rows.

        A whole all-reduce, which is as many bytes as gloo's own reduce-scatter sends.
        """
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self.all_reduce(x, total)
        out.copy_(total.split(list(sizes))[self.group.rank()])

    def broadcast(self, x: torch.Tensor, root: int) -> Any:
        """Start writing rank `root`'s contiguous `x` to every rank's; return the backend's handle."""
        with plain_sums():
            return dist.broadcast(x, group=self.group, group_src=root, async_op=True)


class BackendLink:
    """A `base.Link` of a backend's point-to-point messages: gloo's, or NCCL's in a channel.

    Args:
        group: the process group.
        tag: keeps these messages apart from those of other lanes and of the caller; NCCL knows no tags.
        members: ranks of the group that count as 0, 1 and so on here; all of them if not given.
    """

    tells_lengths = False

    def __init__(self, group: dist.ProcessGroup, tag: int, members: Sequence[int] | None = None):
        self._backend, self._tag = Backend(group), tag
        everyone = dist.get_process_group_ranks(group)
        self._global_ranks = everyone if members is None else [everyone[rank] for rank in members]
        self.timeout_s = timeout_s(group)

    def send(self, part: torch.Tensor, peer: int) -> Transfer:
        """See `base.Link`."""
        return self._start(dist.isend, part, peer)

    def receive(self, part: torch.Tensor, peer: int, *, up_to: bool = False) -> Transfer:
        """See `base.Link`."""
        return self._start(dist.irecv, part, peer)

    def close(self, why: str):
        """See `base.Link`. gloo's messages cannot be withdrawn: later ones may be paired with them."""

    def _start(self, operation: Any, part: torch.Tensor, peer: int) -> Transfer:
        if not part.numel():
            return _NOTHING
        with plain_sums():
            work = operation(part, self._global_ranks[peer], group=self._backend.group, tag=self._tag)
        # On GPUs a limit would make the host wait; there the backend's own watchdog has one.
        end = None if part.is_cuda else time.monotonic() + self.timeout_s
        return _BackendTransfer(work, end, part.numel())


class _BackendTransfer:
    """A message of gloo's, whose own handle must not be waited for twice.

    gloo counts anew in every wait; here all messages of a call share one clock, because they begin with it.
    """

    def __init__(self, work: Any = None, end: float | None = None, length: int = 0):
        self._work, self._end, self.length = work, end, length

    def wait(self):
        """See `base.Transfer`."""
        if self._work is not None:
            if self._end is None:
                self._work.wait()
            else:
                # gloo takes zero for no limit.
                self._work.wait(timedelta(milliseconds=max(1, 1000 * (self._end - time.monotonic()))))
            self._work = None


_NOTHING = _BackendTransfer()

_plain: "contextvars.ContextVar[bool]" = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_sums():
    """Keep torch's operations plain inside this context, also where ``flashcomm`` is the backend of the group."""
    before = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(before)


def is_plain() -> bool:
    """Whether this thread is in `plain_sums`."""
    return _plain.get()


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """The name of the backend that serves tensors on `device`, such as ``gloo``; ``none`` if no backend does.

    `dist.get_backend` does not know it for a group that has several.
    """
    try:
        return group._get_backend(device).name().lower()
    except RuntimeError:
        return "none"


def timeout_s(group: dist.ProcessGroup) -> float:
    """Seconds after which a collective that some rank has not joined is an error."""
    for device in ("cpu", "cuda"):
        with contextlib.suppress(RuntimeError):
            timeout = getattr(getattr(group._get_backend(torch.device(device)), "options", None), "_timeout", None)
            if timeout:
                return timeout.total_seconds()
    return 1800.0
