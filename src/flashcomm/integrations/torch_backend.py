"""A backend of `torch.distributed` that compresses large sums, for any program that can name its backend.

    import flashcomm
    dist.init_process_group("flashcomm")  # FLASHCOMM_CODEC=int8g128, or FLASHCOMM_POLICY=policy.toml

It is gloo on the CPU and NCCL on GPUs, with one operation replaced: an all-reduce that sums bf16, fp16 or fp32 and is
large enough for the policy goes through `flashcomm.all_reduce`. So do the all-reduces of functional collectives, of
DTensor and of compiled graphs. If the policy's ``[hops]`` name a codec for ``send`` or ``broadcast``, large ones go
through `flashcomm.isend`, `irecv` and `broadcast`. Everything else is torch's own. Sub-groups have the policy of the
default group.

A `CompressedGroup` holds a plain group of torch, which does everything else. It must be a plain one: torch calls the
inherited methods of a subclass of `ProcessGroup` with the interpreter locked, and gloo's threads may need the
interpreter to finish an earlier operation first, so that both wait for ever.

Hazard: a process group sees tensors, not modules or phases, so it uses only `codec`, `min_bytes` and `algorithm` of a
policy. Not supported: coalesced all-reduces, which stay plain; `split_group`, whose groups are plain.
"""

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from flashcomm import codecs, collectives
from flashcomm.collectives.stats import record_plain
from flashcomm.integrations.agreement import exchange
from flashcomm.integrations.sums import apply, refuse_unbound
from flashcomm.policy import CODEC_VARIABLE, FILE_VARIABLE, Choice, Policy
from flashcomm.transports.backend import is_plain

_log = logging.getLogger("flashcomm")


class CompressedGroup(dist.ProcessGroup):
    """The process group of backend ``flashcomm``; `torch.distributed.init_process_group` makes it."""

    policy: Policy | None
    """Policy of this group; None to compress nothing. `set_policy` changes it."""

    def __init__(self, store: Any, rank: int, size: int, policy: Policy | None, timeout_s: float):
        # Given the store too, torch makes an object that does not call the methods of a subclass.
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        self.policy = policy
        self._store, self._timeout_s = store, timeout_s
        self._plain = dist.ProcessGroup(store, rank, size)

    def allreduce(self, tensors: Any, *args: Any, **kwargs: Any) -> dist.Work:
        """Sum one tensor over all ranks, in place; compressed if the policy says so.

        Args:
            tensors, args, kwargs: those of `ProcessGroup.allreduce`.

        Returns:
            A finished `torch.distributed.Work`, or one that is under way if the caller asked for an asynchronous one.

        Raises:
            ValueError: a codec that cannot encode this tensor; raised before any communication.
            RuntimeError: one of `flashcomm.all_reduce`.
        """
        options = args[0] if args else kwargs.get("opts", kwargs.get("op", dist.ReduceOp.SUM))
        x = tensors if isinstance(tensors, torch.Tensor) else tensors[0] if len(tensors) == 1 else None
        plain = partial(self._plain.allreduce, tensors, *args, **kwargs)
        if x is None or getattr(options, "reduceOp", options) != dist.ReduceOp.SUM:
            return plain()
        choice = self._choose(x)
        if choice is None:
            return plain()
        # Like torch's own, which works on values and ignores gradients.
        async_op = getattr(options, "asyncOp", True)
        return apply(choice, compressed=partial(self._compressed, x.detach(), choice, async_op), plain=plain)

    def _compressed(self, x: torch.Tensor, choice: Choice, async_op: bool) -> dist.Work:
        if x.is_neg():
            # The result cannot be written to memory that holds other signs, so it is copied, which waits for it.
            total = collectives.all_reduce(x, choice.codec, self, algorithm=choice.algorithm)
            assert isinstance(total, torch.Tensor)
            return _Handle(collectives.Work(x.copy_(total)), x)
        work = collectives.all_reduce(x, choice.codec, self, algorithm=choice.algorithm, out=x, async_op=async_op)
        if not isinstance(work, collectives.Work):
            work = collectives.Work(x)
        return work.backend_work or _Handle(work, x)

    def send(self, tensors: Sequence[torch.Tensor], dst: int, tag: int = 0) -> dist.Work:
        """Send one tensor to a rank of the group; compressed if the policy's ``[hops]`` say so, as on the other end.

        Args:
            tensors, dst, tag: those of `ProcessGroup.send`.

        Returns:
            A `torch.distributed.Work`, under way.

        Raises:
            ValueError: a codec that cannot encode this tensor; raised before any communication.
            RuntimeError: one of `flashcomm.send`, by ``wait()``.
        """
        return self._hop("send", "send", tensors, partial(collectives.isend, tag=tag, group_dst=dst), (dst, tag))

    def recv(self, tensors: Sequence[torch.Tensor], src: int, tag: int = 0) -> dist.Work:
        """Receive into one tensor; as `send`."""
        return self._hop("recv", "send", tensors, partial(collectives.irecv, tag=tag, group_src=src), (src, tag))

    def broadcast(self, tensors: "torch.Tensor | Sequence[torch.Tensor]", *args: Any, **kwargs: Any) -> dist.Work:
        """Write one tensor of the root to every rank; as `send`.

        Args:
            tensors, args, kwargs: those of `ProcessGroup.broadcast`.
        """
        options = args[0] if args else kwargs.get("opts", kwargs.get("root", 0))
        call = partial(
            collectives.broadcast,
            group_src=getattr(options, "rootRank", options),
            async_op=getattr(options, "asyncOp", True),
        )
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        return self._hop("broadcast", "broadcast", tensors, call, args, kwargs)

    def _hop(
        self,
        verb: str,
        kind: str,
        tensors: Sequence[torch.Tensor],
        call: Callable[..., Any],
        args: tuple = (),
        kwargs: "dict[str, Any] | None" = None,
    ) -> dist.Work:
        """Make one operation, compressed by `call` if the policy's codec for this `kind` of hop serves the tensor."""
        plain = partial(getattr(self._plain, verb), tensors, *args, **kwargs or {})
        x = tensors[0] if len(tensors) == 1 else None
        if x is None or not self._may_compress(x) or self.policy is None or kind not in self.policy.hops.kinds:
            return plain()
        choice = self._unless_complex(x, self.policy.choose_hop(kind, x.numel() * x.element_size(), x.dtype))

        def compressed() -> dist.Work:
            work = call(x.detach(), group=self, codec=choice.codec)
            return _Handle(work if isinstance(work, collectives.Work) else collectives.Work(x), x)

        return apply(choice, compressed=compressed, plain=plain, count=partial(record_plain, verb))

    def _may_compress(self, x: torch.Tensor) -> bool:
        """Whether some policy could compress operations on `x`; others are not counted."""
        if self.policy is None or is_plain() or self.size() == 1:
            return False
        return x.is_floating_point() and x.layout is torch.strided and x.device.type in ("cpu", "cuda")

    def _choose(self, x: torch.Tensor) -> Choice | None:
        """Ask the policy about a sum of `x`; None for a sum that no policy could compress."""
        if self.policy is None or not self._may_compress(x):
            return None
        return self._unless_complex(x, self.policy.choose(x.numel() * x.element_size(), x.dtype))

    @staticmethod
    def _unless_complex(x: torch.Tensor, choice: Choice) -> Choice:
        if choice.reason is None and x.dim() > 1 and x.shape[-1] == 2:
            # Complex numbers come as pairs of reals, which nobody can tell from others, and not every rank alike.
            return choice.declined("rows of 2 values, as of complex numbers")
        return choice

    def _agree(self, said: str) -> str:
        """Compare the ranks' policies through the store, because the group may be half made.

        Returns:
            A name that no other agreement has, the same on all ranks.

        Raises:
            RuntimeError: the policies differ; raised on all ranks, naming two of them.
        """
        everyone, name = exchange(PrefixStore("policy/", self._store), self.rank(), self.size(), said, self._timeout_s)
        if len(set(everyone)) > 1:
            other = next(rank for rank, theirs in enumerate(everyone) if theirs != everyone[0])
            raise RuntimeError(
                f"ranks disagree about their policy: rank 0 has {everyone[0]}; rank {other} has {everyone[other]}. "
                "Give every rank the same"
            )
        return name


def _plain_method(name: str) -> Any:
    def method(self: CompressedGroup, *args: Any, **kwargs: Any) -> dist.Work:
        return getattr(self._plain, name)(*args, **kwargs)

    return method


# Methods that torch looks for in a subclass, by their names in this release and before.
for _name in (
    *("allgather", "allgather_into_tensor_coalesced", "all_gather_single_coalesced", "allreduce_coalesced"),
    *("alltoall_base", "all_to_all_single", "barrier", "reduce_scatter"),
    *("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"),
):
    if hasattr(dist.ProcessGroup, _name):
        setattr(CompressedGroup, _name, _plain_method(_name))


class _Handle(dist.Work):
    """A `flashcomm.Work` with the methods of torch's handles, whose `wait` does not return the result."""

    def __init__(self, work: collectives.Work, x: torch.Tensor):
        super().__init__()
        self._work, self._x = work, x
        self._future: Any = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        # The group's timeout, not this one, ends a call whose peers are gone, on all ranks alike.
        self._work.wait()
        return True

    def synchronize(self):
        self._work.wait()

    def is_completed(self) -> bool:
        return self._work.is_completed()

    def result(self) -> list[torch.Tensor]:
        self._work.wait()
        return [self._x]

    def get_future(self) -> torch.futures.Future:
        if self._future is None:
            done: Any = torch.futures.Future(devices=[self._x.device] if self._x.is_cuda else [])
            # In C++, a future fails if a callback of the one before it raises.
            self._future = done.then(lambda _: self.result())
            self._work.add_done_callback(lambda: done.set_result(None))
        return self._future


def set_policy(policy: Policy | None, group: dist.ProcessGroup | None = None):
    """Change the policy of a group of backend ``flashcomm``; every rank of the group calls this.

    Args:
        policy: the same on all ranks; None to compress nothing.
        group: None for the default group. Other groups keep their policy.

    Raises:
        ValueError: a group of another backend, or a policy whose codec needs a calibration.
        RuntimeError: the ranks give different policies; the group keeps the old one.

    Example::

        set_policy(Policy(codec="int4g32", min_bytes=2**20))
    """
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, CompressedGroup):
        raise ValueError(f'{group!r} is no group of backend "flashcomm": use init_process_group("flashcomm")')
    _check(policy)
    group._agree(repr(policy))
    group.policy = policy


def create(options: Any, policy: Any) -> CompressedGroup:
    """Make a group; torch calls this for ``init_process_group("flashcomm", pg_options=policy)`` and `new_group`.

    Args:
        options: torch's: the store, rank, size and timeout of the new group.
        policy: a `Policy`; None for the default group's, or else the environment's.

    Raises:
        ValueError: a policy that cannot be read, or whose codec needs a calibration.
        RuntimeError: ranks with different policies. Both are raised before any communication.
    """
    failure = None
    try:
        found = _policy(policy)
        said = repr(found)
    except ValueError as error:
        found, failure, said = None, error, f"an error: {error}"
    timeout_s = options.timeout.total_seconds()
    group = CompressedGroup(options.store, options.group_rank, options.group_size, found, timeout_s)
    try:
        name = group._agree(said)
    except RuntimeError as disagreement:
        raise failure or disagreement from None
    if failure:
        raise failure
    # The store may hold addresses of an earlier group, which gloo would take for this one's.
    _add_backends(group, options, PrefixStore(name, options.store))
    is_default = not options.global_ranks_in_group
    if is_default and options.group_rank == 0:
        _announce(found, options.group_size)
    return group


def _policy(given: Any) -> Policy | None:
    default = dist.group.WORLD
    if given is None:
        given = default.policy if isinstance(default, CompressedGroup) else Policy.from_environment()
    return _check(given)


def _check(policy: Any) -> Policy | None:
    if policy is not None and not isinstance(policy, Policy):
        raise ValueError(f'a flashcomm.policy.Policy is needed, such as Policy(codec="int8g128"), not {policy!r}')
    if policy is not None:
        served = (codecs.parse(policy.codec), *(policy.hops.codec(kind) for kind in ("send", "broadcast")))
        refuse_unbound(served, "and a process group sees no modules")
    return policy


def _add_backends(group: CompressedGroup, options: Any, store: Any):
    """Add gloo for CPU tensors and NCCL for those on GPUs, like torch does for ``cpu:gloo,cuda:nccl``."""
    ranks, name = options.global_ranks_in_group, options.group_id
    cpu_store, cuda_store = PrefixStore("cpu/", store), PrefixStore("cuda/", store)
    gloo = dist.ProcessGroupGloo(cpu_store, options.group_rank, options.group_size, timeout=options.timeout)
    gloo.options.global_ranks_in_group, gloo.options.group_name = ranks, name
    types = dist.ProcessGroup.BackendType
    backends: list[tuple[str, Any, Any]] = [("cpu", types.GLOO, gloo)]
    if torch.cuda.is_available() and dist.is_nccl_available():
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = options.timeout
        nccl_options.global_ranks_in_group, nccl_options.group_name = ranks, name
        nccl = dist.ProcessGroupNCCL(cuda_store, options.group_rank, options.group_size, nccl_options)
        backends.append(("cuda", types.NCCL, nccl))
    for device, kind, backend in backends:
        backend._set_sequence_number_for_group()
        for one in (group, group._plain):
            one._register_backend(torch.device(device), kind, backend)
            one._set_default_backend(kind)


def _announce(policy: Policy | None, ranks: int):
    if policy is None:
        _log.warning(
            "backend flashcomm has no policy and compresses nothing: set %s or %s, or give pg_options a Policy",
            FILE_VARIABLE,
            CODEC_VARIABLE,
        )
        return
    _log.info("backend flashcomm compresses sums over %d ranks: %s", ranks, policy)
    if policy.overlap != "off":
        _log.warning("backend flashcomm sees no prompts: the policy's overlap is for engines that run them")
    if policy.layers:
        _log.warning("backend flashcomm sees no modules: of the policy it uses %s, and no [[layers]]", policy.codec)
