"""Scatter and gather as one operation of a backend for each piece, such as NCCL's.

On CUDA streams wait for an operation, the host does not.
"""

from collections.abc import Iterator
from typing import Any

import torch

from flashcomm.transports.backend import Backend
from flashcomm.transports.base import Ranks, cut_into
from flashcomm.transports.buffers import Buffers, Payloads


class Bulk:
    """`base.Messages` by the collectives of a backend."""

    whole_pieces = True

    def __init__(self, backend: Backend, ranks: Ranks, buffers: Buffers):
        self.backend, self.ranks, self.buffers = backend, ranks, buffers

    def scatter(
        self, sizes: list[int], width: int, pieces: int, device: torch.device, varies: bool = False
    ) -> "BulkScatter":
        """See `base.Messages`. The backend's operations send rows whole."""
        return BulkScatter(self, sizes, width, pieces, device)

    def gather(
        self, sizes: list[int], width: int, pieces: int, device: torch.device, varies: bool = False
    ) -> "BulkGather":
        """See `base.Messages`."""
        return BulkGather(self, sizes, width, pieces, device)

    def exchange(
        self, width: int, in_rows: list[int], out_rows: list[int], device: torch.device, varies: bool = False
    ) -> "BulkExchange":
        """See `base.Messages`."""
        return BulkExchange(self, width, in_rows, out_rows, device)

    def abandon(self, why: str):
        """See `base.Messages`. The backend knows what failed."""


class BulkScatter:
    """See `base.Scatter`. A piece starts when its last part, this rank's own, lies in its place."""

    def __init__(self, messages: Bulk, sizes: list[int], width: int, pieces: int, device: torch.device):
        self._backend, self._ranks = messages.backend, messages.ranks
        self._mine, self.pieces = sizes[self._ranks.rank], cut_into(max(sizes), pieces)
        count = self._ranks.world_size
        self._sent = Payloads(messages.buffers, "sent", max(sizes), width, count, device)
        self._received = Payloads(messages.buffers, "received", max(sizes), width, count, device)
        self._works: dict[int, Any] = {}
        self._sent_bytes = 0

    def place(self, rank: int, piece: slice, rows: int) -> torch.Tensor:
        """See `base.Scatter`."""
        return self._sent[piece][rank, :rows]

    def whole(self, piece: slice) -> torch.Tensor:
        """See `base.Scatter`."""
        return self._sent[piece].flatten(0, 1)

    def send(self, rank: int, piece: slice, rows: int):
        """See `base.Scatter`."""
        if rank == self._ranks.rank:
            received = self._received[piece]
            self._works[piece.start] = self._backend.exchange(received, self._sent[piece])
            self._sent_bytes += received[1:].numel()

    def wait(self, piece: slice) -> torch.Tensor:
        """See `base.Scatter`."""
        if work := self._works.pop(piece.start, None):
            work.wait()
        return self._received[piece][:, : max(0, self._mine - piece.start)]

    def finish(self) -> int:
        """See `base.Scatter`."""
        return self._sent_bytes


class BulkGather:
    """See `base.Gather`."""

    def __init__(self, messages: Bulk, sizes: list[int], width: int, pieces: int, device: torch.device):
        self._backend, self._ranks, self._sizes = messages.backend, messages.ranks, sizes
        self.pieces = cut_into(max(sizes), pieces)
        count = self._ranks.world_size
        self._payloads = Payloads(messages.buffers, "gathered", max(sizes), width, count, device)
        # The source of a backend's operation must not overlap its destination.
        self._own = messages.buffers.take("own", device, max(sizes), width)
        self._works: dict[int, Any] = {}
        self._sent_bytes = 0
        senders = [rank for rank, size in enumerate(sizes) if size]
        self._root = senders[0] if len(senders) == 1 and count > 1 else None
        """The only rank that sends anything, if there is one."""

    def place(self, piece: slice) -> torch.Tensor:
        """See `base.Gather`."""
        return self._own[: self._sizes[self._ranks.rank]][piece]

    def send(self, piece: slice):
        """See `base.Gather`."""
        received = self._payloads[piece]
        if self._root is None:
            self._works[piece.start] = self._backend.gather(received, self._own[piece])
            self._sent_bytes += received[1:].numel()
            return
        whole = received[self._root]
        if self._ranks.rank == self._root:
            whole.copy_(self._own[piece])
            self._sent_bytes += received[1:].numel()
        self._works[piece.start] = self._backend.broadcast(whole, self._root)

    def wait_gone(self, piece: slice):
        """See `base.Gather`. The backend's messages leave by themselves."""

    def wait(self, piece: slice) -> torch.Tensor:
        """See `base.Gather`."""
        if work := self._works.pop(piece.start, None):
            work.wait()
        return self._payloads[piece]

    def whole(self, piece: slice) -> torch.Tensor:
        """See `base.Gather`."""
        return self.wait(piece).flatten(0, 1)

    def arrivals(self) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """See `base.Gather`."""
        for piece in self.pieces:
            yield self._ranks.rank, piece, self.place(piece)
        for piece in self.pieces:
            payloads = self.wait(piece)
            for peer in reversed(self._ranks.peers):
                yield peer, piece, payloads[peer, : max(0, self._sizes[peer] - piece.start)]

    def finish(self) -> int:
        """See `base.Gather`."""
        return self._sent_bytes


class BulkExchange:
    """See `base.Exchange`."""

    def __init__(self, messages: Bulk, width: int, in_rows: list[int], out_rows: list[int], device: torch.device):
        self._backend, self._in_rows, self._out_rows = messages.backend, in_rows, out_rows
        self.sent = messages.buffers.take("sent", device, sum(in_rows), width)
        self._received = messages.buffers.take("received", device, sum(out_rows), width)
        self._sent_bytes = (sum(in_rows) - in_rows[messages.ranks.rank]) * width

    def run(self) -> torch.Tensor:
        """See `base.Exchange`."""
        self._backend.all_to_all(self._received, self.sent, self._out_rows, self._in_rows)
        return self._received

    def finish(self) -> int:
        """See `base.Exchange`."""
        return self._sent_bytes
