"""The contract of a transport: how the bytes of one rank reach the others.

    Link       send and receive between two ranks          `connections`, `backend.BackendLink`
    Messages   scatter, gather and exchange, in pieces     `direct` over a Link, `bulk` over a backend
    Memory     whole collectives over memory ranks share   `shared.memory`, `symmetric.memory`

There are two seams because there are two kinds of transport. Over messages an algorithm encodes, sends, waits and
decodes. Over memory that all ranks map, these are one loop, which is where its speed comes from; so such a transport is
given the whole collective, as a `Task`, and returns a `Run`.

A transport knows ranks and bytes. It never sees a process group's other users, a policy or a plan.

Source: the division of pytorch/gloo into algorithms and ``transport/``; the second seam is our own.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch

from flashcomm.codecs import Codec
from flashcomm.errors import kind_of

T = TypeVar("T")


class Step(Enum):
    """Everything that a rank does alone while the others wait, as errors say it."""

    SITE = "look at its host"
    COSTS = "read what was measured"
    CREATE = "create shared memory"
    MAP = "map shared memory"
    SYMMETRIC = "map the memory of GPUs"
    LISTEN = "listen for connections"
    CONNECT = "connect to the others"
    KERNELS = "load the kernels"


@dataclass(frozen=True, slots=True)
class Failure:
    """A step that failed on one rank, as text: an exception may hold what cannot be sent."""

    step: Step
    kind: type[Exception]
    why: str

    def error(self, rank: str) -> Exception:
        """The error that every rank raises if the step failed on the rank of that name."""
        return self.kind(f"{rank} could not {self.step.value} while the ranks met: {self.why}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The ranks of a group, and how they talk before they have a transport."""

    rank: int
    """This process, from 0."""
    world_size: int
    timeout_s: float
    """Seconds after which a rank that has not come is an error."""
    tell: Callable[[Any], list]
    """Every rank's fact, in rank order; all ranks call it together."""
    members: tuple[int, ...] | None = None
    """Numbers by which errors name the ranks, if not by their own: a channel's two ranks are 0 and 1."""

    def name(self, rank: int) -> str:
        """A rank as errors name it."""
        return f"rank {rank if self.members is None else self.members[rank]}"

    @property
    def peers(self) -> list[int]:
        """The other ranks, the next one first, so that not all start with rank 0."""
        return [(self.rank + i) % self.world_size for i in range(1, self.world_size)]

    def alone(self, step: Step, act: Callable[[], T]) -> tuple[T | Failure, Exception | None]:
        """Run `act`; return its result, or a `Failure` to tell all ranks and the error on this one.

        Every step that a rank does alone (a file, memory, a socket, a kernel) goes through here, so that no rank waits
        for another that has failed.
        """
        try:
            return act(), None
        except Exception as error:
            kind = ValueError if isinstance(error, ValueError) else kind_of(error)
            return Failure(step, kind, f"{type(error).__name__}: {error}"), error

    def each(self, step: Step, act: Callable[[], T]) -> list[T]:
        """Run `act` on every rank and return every rank's result; where it fails on one, all ranks raise.

        Raises:
            ValueError: `act` raised one on some rank.
            CollectiveError: `act` raised anything else on some rank; the error says on which and why.
        """
        mine, cause = self.alone(step, act)
        results = self.tell(mine)
        for rank, result in enumerate(results):
            if isinstance(result, Failure):
                raise result.error(self.name(rank)) from cause
        return results


class Transfer(Protocol):
    """A message on its way."""

    length: int
    """Bytes of the message; of one that is received ``up_to`` a length, only once it has arrived."""

    def wait(self) -> Any:
        """Block until it has arrived, or has left; may be repeated."""


class Link(Protocol):
    """Messages between this rank and each other, in the order in which they are sent."""

    tells_lengths: bool
    """Whether a message tells its length, so that it may be shorter than its receiver's room for it."""

    def send(self, part: torch.Tensor, peer: int) -> Transfer:
        """Start sending a contiguous uint8 `part`, which must not change until ``wait()``."""
        ...

    def receive(self, part: torch.Tensor, peer: int, *, up_to: bool = False) -> Transfer:
        """Start receiving into a contiguous uint8 `part`, after earlier messages from that peer.

        Args:
            part: as long as the message.
            peer: rank that sends it.
            up_to: the message may be shorter than `part`, and fills the beginning of it; only if `tells_lengths`.
        """
        ...

    def close(self, why: str):
        """Let the peers know that nothing will come any more; later calls raise `why`."""


class Scatter(Protocol):
    """One message to each rank: its stripe, in pieces. This rank receives its own stripe from every rank."""

    pieces: list[slice]

    def place(self, rank: int, piece: slice, rows: int) -> torch.Tensor:
        """Payload rows [rows, P] to write for `rank`, before `send`."""
        ...

    def whole(self, piece: slice) -> torch.Tensor:
        """Payload rows [R * n, P] of all ranks, to write before one `send` of this rank's own.

        Only where ``Messages.whole_pieces``. On a GPU, each part is a kernel more.
        """
        ...

    def send(self, rank: int, piece: slice, rows: int):
        """Send what lies in that place. This rank's own comes last, in every piece."""

    def wait(self, piece: slice) -> torch.Tensor:
        """Block until every rank's part of `piece` has arrived; return it as [R, n, P]."""
        ...

    def finish(self) -> int:
        """Block until all that was sent has left; return the bytes of it."""
        ...


class Gather(Protocol):
    """One message to all ranks: this rank's rows, in pieces. This rank receives the rows of every rank."""

    pieces: list[slice]

    def place(self, piece: slice) -> torch.Tensor:
        """Payload rows [n, P] to write before `send`."""
        ...

    def send(self, piece: slice):
        """Send what lies in that place to every other rank."""

    def wait(self, piece: slice) -> torch.Tensor:
        """Block until every rank's rows of `piece` have arrived; return them as [R, n, P]."""
        ...

    def wait_gone(self, piece: slice):
        """Block until this rank's rows of `piece`, and all that it sent before, have left."""

    def whole(self, piece: slice) -> torch.Tensor:
        """Block until all ranks' rows of `piece` have arrived; return them as [R * n, P].

        Only where ``Messages.whole_pieces``.
        """
        ...

    def arrivals(self) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Yield (rank, piece, payload rows) of all ranks, this one's first, then roughly as they arrive."""
        ...

    def finish(self) -> int:
        """Block until all that was sent has left; return the bytes of it."""
        ...


class Messages(Protocol):
    """Payloads between all ranks of a group.

    Rows take `width` bytes in memory. Where `varies`, each begins with the number of its bytes that are used, as `rows`
    says, and a transport may leave out the rest.
    """

    ranks: Ranks
    whole_pieces: bool
    """Whether a piece is one message to or from all ranks, and its payloads one tensor."""

    def scatter(self, sizes: list[int], width: int, pieces: int, device: torch.device, varies: bool = False) -> Scatter:
        """Start a scatter of stripes with `sizes` rows of `width` bytes."""
        ...

    def gather(self, sizes: list[int], width: int, pieces: int, device: torch.device, varies: bool = False) -> Gather:
        """Start a gather where rank r sends ``sizes[r]`` rows of `width` bytes."""
        ...

    def exchange(
        self, width: int, in_rows: list[int], out_rows: list[int], device: torch.device, varies: bool = False
    ) -> "Exchange":
        """Start an exchange of ``in_rows[r]`` rows to and ``out_rows[r]`` rows from rank r."""
        ...

    def abandon(self, why: str):
        """Give up after an error in the middle of a call: what is under way would be taken for the next one's."""


class Exchange(Protocol):
    """Rows to every rank in turn, and theirs back."""

    sent: torch.Tensor
    """Payload rows to write before `run`, those for rank 0 first."""

    def run(self) -> torch.Tensor:
        """Send and receive; return the payload rows that arrived, those of rank 0 first. May change `sent`."""
        ...

    def finish(self) -> int:
        """Return the bytes that were sent to other ranks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A collective on rows, without its values."""

    name: str
    """``one_step``, ``two_step``, ``hierarchical``, ``reduce_scatter``, ``all_gather``, ``all_to_all`` or
    ``broadcast``."""
    codec: Codec
    rows: int
    cols: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    device: torch.device
    pieces: int = 1
    """Pieces in which a message travels."""
    splits: tuple[Sequence[int], Sequence[int]] | None = None
    """Rows to each rank and from each rank, of ``all_to_all``."""
    root: int = 0
    """Rank that sends, of ``broadcast``."""
    sizes: tuple[int, ...] | None = None
    """Rows of each rank, of ``reduce_scatter`` and ``all_gather`` with other than equal parts."""


class Run(Protocol):
    """A task, ready to run."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> int:
        """Run on x and out, of any strides; return the bytes that this rank sent."""
        ...

    def abandon(self, why: str):
        """Give up after an error in the middle of a call."""


class Memory(Protocol):
    """Memory that all ranks map."""

    name: str
    """Name that users read, such as ``shared memory``."""

    def load(self, task: Task):
        """Load what `prepare` needs and may be missing on this rank alone, such as compiled code."""

    def prepare(self, task: Task, finish: Callable[[], object]) -> Run | None:
        """Make the task ready, and room for it; None if this memory does not serve it. All ranks call it together.

        Args:
            task: the collective.
            finish: blocks until no call is under way; called before the memory changes its place.
        """
        ...

    def abandon(self, why: str):
        """Give up after an error in the middle of a call."""


class OnRows:
    """A function of rows, as a `Run`.

    Args:
        function: takes rows x[T, H] of any strides and contiguous rows out; returns the bytes sent.
        rows: (T, H) of x.
        abandon: called with the reason after an error.
    """

    __slots__ = ("_abandon", "_function", "_rows")

    def __init__(
        self,
        function: Callable[[torch.Tensor, torch.Tensor], int],
        rows: tuple[int, int],
        abandon: Callable[[str], Any],
    ):
        self._function, self._rows, self._abandon = function, rows, abandon

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> int:
        """See `Run`."""
        target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        sent = self._function(x.reshape(self._rows), target.view(-1, self._rows[1]))
        if target is not out:
            out.copy_(target)
        return sent

    def abandon(self, why: str):
        """See `Run`."""
        self._abandon(why)


def nothing_to_abandon(why: str):
    """Do nothing, for a `Run` that leaves nothing under way."""


def cut_into(length: int, count: int) -> list[slice]:
    """`length` rows in `count` runs, as even as possible; fewer where there are fewer rows.

    >>> cut_into(5, 2), cut_into(1, 4)
    ([slice(0, 2, None), slice(2, 5, None)], [slice(0, 1, None)])
    """
    count = max(1, min(count, length))
    edges = [length * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]
