"""Scatter and gather over a Link: each piece goes to each rank by itself, so codecs work while bytes travel.

On gloo that is also the faster gather: gloo's own is a ring of R - 1 rounds, one after the other.

Rows that vary in length are packed before they leave, and spread when they have arrived, if the Link tells lengths.
"""

from collections.abc import Iterator
from functools import partial

import torch

from flashcomm.errors import RanksDisagree
from flashcomm.transports.base import Link, Ranks, Transfer, cut_into
from flashcomm.transports.buffers import Buffers, Payloads


class Direct:
    """`base.Messages` over a Link."""

    whole_pieces = False
    """Messages to the first ranks leave while those to the last are encoded."""

    def __init__(self, link: Link, ranks: Ranks, buffers: Buffers):
        self.link, self.ranks, self.buffers = link, ranks, buffers

    def scatter(
        self, sizes: list[int], width: int, pieces: int, device: torch.device, varies: bool = False
    ) -> "DirectScatter":
        """See `base.Messages`."""
        return DirectScatter(self, sizes, width, pieces, device, varies)

    def gather(
        self, sizes: list[int], width: int, pieces: int, device: torch.device, varies: bool = False
    ) -> "DirectGather":
        """See `base.Messages`."""
        return DirectGather(self, sizes, width, pieces, device, varies)

    def exchange(
        self, width: int, in_rows: list[int], out_rows: list[int], device: torch.device, varies: bool = False
    ) -> "DirectExchange":
        """See `base.Messages`."""
        return DirectExchange(self, width, in_rows, out_rows, device, varies)

    def abandon(self, why: str):
        """See `base.Messages`."""
        self.link.close(why)


class _Spread:
    """Packed rows on their way, which are spread when they have arrived; a `base.Transfer`."""

    def __init__(self, link: Link, ranks: Ranks, part: torch.Tensor, peer: int):
        self._part, self._peer = part, ranks.name(peer)
        self._transfer: Transfer | None = link.receive(part, peer, up_to=True)
        self.length = part.numel()

    def wait(self):
        """See `base.Transfer`.

        Raises:
            RanksDisagree: the message is not packed rows of that number and bound.
        """
        from flashcomm.transports import rows

        if self._transfer is None:
            return
        self._transfer.wait()
        self.length = self._transfer.length
        if not rows.spread(self._part, self.length):
            count, bound = self._part.shape
            raise RanksDisagree(
                f"{self._peer} sends {self.length} bytes that are not {count} rows of at most {bound} bytes"
            )
        self._transfer = None


def _packed(part: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    from flashcomm.transports import rows

    return rows.pack(part, into)


class _Pending:
    """Transfers to and from the other ranks."""

    def __init__(self, link: Link, ranks: Ranks, varies: bool):
        self._link, self._ranks = link, ranks
        self._packs = varies and link.tells_lengths
        self._going: list[Transfer] = []
        self._coming: dict[tuple[int, int], Transfer] = {}
        self._sent_bytes = 0

    def _expect(self, part: torch.Tensor, piece: slice, peer: int):
        if part.numel():
            receive = partial(_Spread, self._link, self._ranks) if self._packs else self._link.receive
            self._coming[piece.start, peer] = receive(part, peer)

    def _send(self, part: torch.Tensor, peer: int):
        if part.numel():
            self._going.append(self._link.send(part, peer))
            self._sent_bytes += part.numel()

    def _wait_for(self, piece: slice, peer: int):
        transfer = self._coming.pop((piece.start, peer), None)
        if transfer is not None:
            transfer.wait()

    def _wait_for_all(self, piece: slice):
        # The next rank sends to this one last.
        for peer in reversed(self._ranks.peers):
            self._wait_for(piece, peer)

    def finish(self) -> int:
        """See `base.Scatter`."""
        for transfer in self._going:
            transfer.wait()
        return self._sent_bytes


class DirectScatter(_Pending):
    """See `base.Scatter`. This rank's own stripe is written where it stays."""

    def __init__(self, messages: Direct, sizes: list[int], width: int, pieces: int, device: torch.device, varies: bool):
        super().__init__(messages.link, messages.ranks, varies)
        self._mine, self.pieces = sizes[self._ranks.rank], cut_into(max(sizes), pieces)
        count = self._ranks.world_size
        self._sent = Payloads(messages.buffers, "sent", max(sizes), width, count, device)
        self._received = Payloads(messages.buffers, "received", max(sizes), width, count, device)
        for piece in self.pieces:
            for peer in self._ranks.peers:
                self._expect(self._arriving(piece)[peer], piece, peer)

    def place(self, rank: int, piece: slice, rows: int) -> torch.Tensor:
        """See `base.Scatter`."""
        payloads = self._received if rank == self._ranks.rank else self._sent
        return payloads[piece][rank, :rows]

    def whole(self, piece: slice) -> torch.Tensor:
        """See `base.Scatter`."""
        raise NotImplementedError

    def send(self, rank: int, piece: slice, rows: int):
        """See `base.Scatter`."""
        if rank != self._ranks.rank:
            part = self._sent[piece][rank, :rows]
            self._send(_packed(part, part) if self._packs else part, rank)

    def wait(self, piece: slice) -> torch.Tensor:
        """See `base.Scatter`."""
        self._wait_for_all(piece)
        return self._arriving(piece)

    def _arriving(self, piece: slice) -> torch.Tensor:
        return self._received[piece][:, : max(0, self._mine - piece.start)]


class DirectGather(_Pending):
    """See `base.Gather`."""

    def __init__(self, messages: Direct, sizes: list[int], width: int, pieces: int, device: torch.device, varies: bool):
        super().__init__(messages.link, messages.ranks, varies)
        self._sizes, self.pieces = sizes, cut_into(max(sizes), pieces)
        self._leaving: list[tuple[int, Transfer]] = []
        self._own: dict[int, torch.Tensor] = {}
        count = self._ranks.world_size
        self._payloads = Payloads(messages.buffers, "gathered", max(sizes), width, count, device)
        if self._packs:
            # This rank decodes its own rows too.
            self._leaving_rows = messages.buffers.take("packed", device, sizes[self._ranks.rank], width)
        for piece in self.pieces:
            for peer in reversed(self._ranks.peers):
                self._expect(self._of(peer, piece), piece, peer)

    def _of(self, rank: int, piece: slice) -> torch.Tensor:
        return self._payloads[piece][rank, : max(0, self._sizes[rank] - piece.start)]

    def place(self, piece: slice) -> torch.Tensor:
        """See `base.Gather`."""
        own = self._own.get(piece.start)
        if own is None:
            own = self._own[piece.start] = self._of(self._ranks.rank, piece)
        return own

    def send(self, piece: slice):
        """See `base.Gather`."""
        under_way = len(self._going)
        payload = self.place(piece)
        if self._packs:
            payload = _packed(payload, self._leaving_rows[piece])
        for peer in self._ranks.peers:
            self._send(payload, peer)
        self._leaving += [(piece.start, transfer) for transfer in self._going[under_way:]]

    def wait_gone(self, piece: slice):
        """See `base.Gather`."""
        for start, transfer in self._leaving:
            if start <= piece.start:
                transfer.wait()

    def wait(self, piece: slice) -> torch.Tensor:
        """See `base.Gather`."""
        self._wait_for_all(piece)
        return self._payloads[piece]

    def whole(self, piece: slice) -> torch.Tensor:
        """See `base.Gather`."""
        raise NotImplementedError

    def arrivals(self) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """See `base.Gather`."""
        for piece in self.pieces:
            yield self._ranks.rank, piece, self.place(piece)
        for piece in self.pieces:
            for peer in reversed(self._ranks.peers):
                self._wait_for(piece, peer)
                yield peer, piece, self._of(peer, piece)


class DirectExchange:
    """See `base.Exchange`."""

    def __init__(
        self, messages: Direct, width: int, in_rows: list[int], out_rows: list[int], device: torch.device, varies: bool
    ):
        self._link, self._ranks = messages.link, messages.ranks
        self._packs, self._sent_bytes = varies and self._link.tells_lengths, 0
        self._in_rows, self._out_rows = in_rows, out_rows
        self.sent = messages.buffers.take("sent", device, sum(in_rows), width)
        self._received = messages.buffers.take("received", device, sum(out_rows), width)

    def run(self) -> torch.Tensor:
        """See `base.Exchange`."""
        going, coming = self.sent.split(self._in_rows), self._received.split(self._out_rows)
        # Parts without rows too: a Link that checks lengths finds ranks with splits that do not fit together.
        receive = partial(_Spread, self._link, self._ranks) if self._packs else self._link.receive
        pending: list[Transfer] = [receive(coming[peer], peer) for peer in self._ranks.peers]
        for peer in self._ranks.peers:
            part = _packed(going[peer], going[peer]) if self._packs else going[peer]
            pending.append(self._link.send(part, peer))
            self._sent_bytes += part.numel()
        coming[self._ranks.rank].copy_(going[self._ranks.rank])
        for transfer in pending:
            transfer.wait()
        return self._received

    def finish(self) -> int:
        """See `base.Exchange`."""
        return self._sent_bytes
