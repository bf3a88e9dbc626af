"""The algorithms, on rows: they move payloads and never look inside.

    one_step   encode | all-gather | decode and sum                      one rounding, (R - 1) payloads sent
    two_step   encode | all-to-all | decode, sum, encode | all-gather | decode
                                                                         two roundings, 2 (R - 1) / R payloads sent

A two-step all-reduce is a reduce-scatter followed by an all-gather. The owner of a stripe decodes it from the payload
that it sent, like everybody else, so all ranks end with the same bits.

A message travels in `pieces`: while one is on its way the next is encoded, and those that have arrived are added up and
decoded, so that the link has always something to carry. On gloo ranks send each piece to each other directly; over
other backends, such as NCCL, it is one operation, for which on CUDA streams wait and not the host. The bits do not
depend on the pieces.

Shape legend: R ranks, T rows, H columns, S rows of one rank's stripe, P payload bytes of a row.

Source: Flash Communication (arXiv 2412.04964), Algorithm 1; one_step: arXiv 2411.09510.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from flashcomm import kernels
from flashcomm.codecs import Codec
from flashcomm.collectives.connections import Transfer
from flashcomm.collectives.state import GroupState, exchange, gather

# A stripe is whole rows; where that leaves some ranks idle, rows are cut at group borders until at least this share of
# the rows of the longest stripe is real on average.
_BALANCE = 0.9


def cut(rows: int, cols: int, codec: Codec, ranks: int) -> tuple[int, int]:
    """[rows, cols] as more and shorter rows, so that few rows spread evenly over ranks and no decoded bit changes.

    >>> from flashcomm.codecs import parse
    >>> cut(1, 4096, parse("int8g128"), ranks=4)
    (4, 1024)
    """
    unit = math.lcm(*(step.segment(cols) for step in codec.steps))
    if rows == 0 or cols == 0 or cols % unit:
        return rows, cols
    best = (0.0, 1)
    for pieces in range(1, min(cols // unit, ranks) + 1):
        if cols // unit % pieces == 0:
            stripe = -(-rows * pieces // ranks)
            balance = rows * pieces / (stripe * ranks)
            if balance > best[0]:
                best = (balance, pieces)
            if balance >= _BALANCE:
                break
    return rows * best[1], cols // best[1]


def one_step(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor, pieces: int = 1) -> int:
    """Sum of every rank's x[T, H] into out[T, H]. Returns the bytes that this rank sent."""
    rows, cols = cut(x.shape[0], x.shape[1], codec, pieces)
    x, into = x.reshape(rows, cols), out.view(rows, cols)
    gather = Gather([rows] * state.ranks, codec.payload_bytes(cols, x.dtype), pieces, x.device, state)
    for piece in gather.pieces:
        gather.send(piece, kernels.encode(x[piece], codec, out=gather.mine(piece)))
    for piece in gather.pieces:
        kernels.decode_sum(gather.wait_all(piece), codec, cols=cols, dtype=out.dtype, out=into[piece])
    return gather.finish()


def two_step(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor, pieces: int = 1) -> int:
    """Sum of every rank's x[T, H] into out[T, H]. Returns the bytes that this rank sent."""
    first, second = codec.steps
    rows, cols = cut(x.shape[0], x.shape[1], codec, state.ranks * pieces)
    x, into = x.reshape(rows, cols), out.view(rows, cols)
    stripes = Stripes(rows, state)
    # Of gloo's messages each waits until its receiver is ready, so be ready for all before anything is encoded.
    scatter = Scatter(stripes, first.payload_bytes(cols, x.dtype), pieces, x.device, state)
    gather = Gather(stripes.sizes, second.payload_bytes(cols, x.dtype), pieces, x.device, state)
    scatter.send_all(lambda rank, piece: x[stripes.part(rank, piece)], first)
    for piece in gather.pieces:
        sums = kernels.decode_sum_encode(scatter.wait_all(piece), first, second, cols=cols, out=gather.mine(piece))
        gather.send(piece, sums)
    for rank, piece, payload in gather.arrivals():
        kernels.decode(payload, second, cols=cols, dtype=out.dtype, out=into[stripes.part(rank, piece)])
    return scatter.finish() + gather.finish()


def reduce_scatter(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor, pieces: int = 1) -> int:
    """out[S, H] = sum over ranks of their x[R * S, H] rows that belong to this rank. Returns the bytes sent."""
    cols, stripes = x.shape[1], Stripes(x.shape[0], state)
    scatter = Scatter(stripes, codec.payload_bytes(cols, x.dtype), pieces, x.device, state)
    scatter.send_all(lambda rank, piece: x[stripes.part(rank, piece)], codec)
    for piece in scatter.pieces:
        kernels.decode_sum(scatter.wait_all(piece), codec, cols=cols, dtype=out.dtype, out=out[piece])
    return scatter.finish()


def all_gather(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor, pieces: int = 1) -> int:
    """out[R * T, H] = every rank's x[T, H], each as its payload decodes, our own too. Returns the bytes sent."""
    rows, cols = x.shape
    gather = Gather([rows] * state.ranks, codec.payload_bytes(cols, x.dtype), pieces, x.device, state)
    for piece in gather.pieces:
        gather.send(piece, kernels.encode(x[piece], codec, out=gather.mine(piece)))
    into = out.view(state.ranks, rows, cols)
    for rank, piece, payload in gather.arrivals():
        kernels.decode(payload, codec, cols=cols, dtype=out.dtype, out=into[rank, piece])
    return gather.finish()


def all_to_all(
    x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor, out_rows: list[int], in_rows: list[int]
) -> int:
    """Rows of x to the ranks in turn, in_rows[i] to rank i; out_rows[i] from rank i. Returns the bytes sent."""
    cols = x.shape[1]
    width = codec.payload_bytes(cols, x.dtype)
    sent = kernels.encode(x, codec, out=state.buffer("sent", x.device, x.shape[0], width))
    received = state.buffer("received", x.device, out.shape[0], width)
    if state.direct(x.device):
        going, coming = sent.split(in_rows), received.split(out_rows)
        # Over connections nothing is sent too, so that ranks which differ find out.
        even_nothing = state.connections is not None
        pending = [state.receive(coming[peer], peer) for peer in state.peers() if out_rows[peer] or even_nothing]
        pending += [state.send(going[peer], peer) for peer in state.peers() if in_rows[peer] or even_nothing]
        coming[state.rank].copy_(going[state.rank])
        for work in pending:
            work.wait()
    else:
        dist.all_to_all_single(received, sent, out_rows, in_rows, group=state.group)
    kernels.decode(received, codec, cols=cols, dtype=out.dtype, out=out)
    return (x.shape[0] - in_rows[state.rank]) * width


class Stripes:
    """Rows dealt out to ranks in runs of `length`; the last ranks may have fewer, or none."""

    def __init__(self, rows: int, state: GroupState):
        self.length = -(-rows // state.ranks)
        edges = [min(rank * self.length, rows) for rank in range(state.ranks + 1)]
        self._slices = [slice(*pair) for pair in itertools.pairwise(edges)]
        self.sizes = [part.stop - part.start for part in self._slices]

    def part(self, rank: int, piece: slice) -> slice:
        """The rows of `rank` that belong to a piece of its stripe; fewer, or none, where the stripe is shorter."""
        stripe = self._slices[rank]
        return slice(min(stripe.start + piece.start, stripe.stop), min(stripe.start + piece.stop, stripe.stop))


def _cut_into(length: int, count: int) -> list[slice]:
    """`length` rows in `count` runs, as even as possible; fewer where there are fewer rows."""
    count = max(1, min(count, length))
    edges = [length * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


class _Payloads:
    """Uninitialised payloads, [R, n, P] of each piece, so that a piece is one operation for a backend."""

    def __init__(self, name: str, length: int, width: int, device: torch.device, state: GroupState):
        self._width, self._ranks = width, state.ranks
        self._bytes = state.buffer(name, device, length * state.ranks * width)

    def __getitem__(self, piece: slice) -> torch.Tensor:
        row = self._ranks * self._width
        return self._bytes[piece.start * row : piece.stop * row].view(self._ranks, -1, self._width)


class _Transfers:
    """What is under way to and from the other ranks."""

    def __init__(self, state: GroupState, device: torch.device):
        self._state, self._direct = state, state.direct(device)
        self._going: list[dist.Work | Transfer] = []
        self._coming: dict[tuple[int, int], dist.Work | Transfer] = {}
        self._sent_bytes = 0

    def _expect(self, part: torch.Tensor, piece: slice, peer: int):
        if part.numel():
            self._coming[piece.start, peer] = self._state.receive(part, peer)

    def _send(self, part: torch.Tensor, peer: int):
        if part.numel():
            self._going.append(self._state.send(part, peer))
            self._sent_bytes += part.numel()

    def _started(self, work: dist.Work, piece: slice, received: torch.Tensor):
        """Note an operation that brings that piece from all ranks, for whichever of them is waited for first."""
        self._coming[piece.start, self._state.peers()[-1]] = work
        self._sent_bytes += received[1:].numel()

    def wait(self, piece: slice, peer: int):
        """Until that piece from that rank is here; of peers, the last one first."""
        work = self._coming.pop((piece.start, peer), None)
        if work is not None:
            work.wait()

    def finish(self) -> int:
        """Until the others have what was sent to them; the bytes of it."""
        for work in self._going:
            work.wait()
        return self._sent_bytes


class Scatter(_Transfers):
    """Every rank sends each other its stripe of a message; what this one receives is its own stripe, R times."""

    def __init__(self, stripes: Stripes, width: int, pieces: int, device: torch.device, state: GroupState):
        super().__init__(state, device)
        self._mine, self.pieces = stripes.sizes[state.rank], _cut_into(stripes.length, pieces)
        self._sent = _Payloads("sent", stripes.length, width, device, state)
        self._received = _Payloads("received", stripes.length, width, device, state)
        if self._direct:
            for piece in self.pieces:
                for peer in state.peers():
                    self._expect(self._arriving(piece)[peer], piece, peer)

    def send_all(self, rows_of: Callable[[int, slice], torch.Tensor], codec: Codec):
        """Encode and send the rows that `rows_of` gives for a rank and a piece of its stripe."""
        state = self._state
        for piece in self.pieces:
            sent, received = self._sent[piece], self._received[piece]
            # Our own stripe last: the others are on their way meanwhile, and where it stays here it needs no copy.
            for peer in (*state.peers(), state.rank):
                rows, own = rows_of(peer, piece), self._direct and peer == state.rank
                part = (received if own else sent)[peer, : len(rows)]
                kernels.encode(rows, codec, out=part)
                if self._direct and not own:
                    self._send(part, peer)
            if not self._direct:
                self._started(exchange(received, sent, state.group), piece, received)

    def wait_all(self, piece: slice) -> torch.Tensor:
        """[R, n, P]: that piece of our stripe, as every rank sent it."""
        for peer in reversed(self._state.peers()):
            self.wait(piece, peer)
        return self._arriving(piece)

    def _arriving(self, piece: slice) -> torch.Tensor:
        return self._received[piece][:, : max(0, self._mine - piece.start)]


class Gather(_Transfers):
    """Every rank sends all others its rows; `sizes` says how many those of each rank are."""

    def __init__(self, sizes: list[int], width: int, pieces: int, device: torch.device, state: GroupState):
        super().__init__(state, device)
        self._sizes, self.pieces = sizes, _cut_into(max(sizes), pieces)
        self._leaving: list[tuple[int, dist.Work | Transfer]] = []
        self._payloads = _Payloads("gathered", max(sizes), width, device, state)
        if self._direct:
            for piece in self.pieces:
                # The next rank sends to us last.
                for peer in reversed(state.peers()):
                    self._expect(self.of(peer, piece), piece, peer)
        else:
            # The source of a backend's operation must not overlap its destination.
            self._own = state.buffer("own", device, max(sizes), width)

    def of(self, rank: int, piece: slice) -> torch.Tensor:
        """That piece of a rank's payload, where it will be."""
        return self._payloads[piece][rank, : max(0, self._sizes[rank] - piece.start)]

    def mine(self, piece: slice) -> torch.Tensor:
        """Where to write that piece of this rank's payload."""
        rank = self._state.rank
        return self.of(rank, piece) if self._direct else self._own[: self._sizes[rank]][piece]

    def send(self, piece: slice, payload: torch.Tensor):
        """Send that piece, which lies in its place, to all others."""
        state = self._state
        if self._direct:
            under_way = len(self._going)
            for peer in state.peers():
                self._send(payload, peer)
            self._leaving += [(piece.start, work) for work in self._going[under_way:]]
        else:
            received = self._payloads[piece]
            self._started(gather(received, self._own[piece], state.group, async_op=True), piece, received)

    def wait_gone(self, piece: slice):
        """Until that piece of this rank's rows has left for all others, and all that was sent before."""
        for start, work in self._leaving:
            # gloo's messages leave by themselves, and must not be waited for twice.
            if start <= piece.start and isinstance(work, Transfer):
                work.wait()

    def wait_all(self, piece: slice) -> torch.Tensor:
        """[R, n, P]: that piece of every rank's rows."""
        for peer in reversed(self._state.peers()):
            self.wait(piece, peer)
        return self._payloads[piece]

    def arrivals(self) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """(rank, piece, payload) of all, our own first, then roughly as they arrive."""
        state = self._state
        for piece in self.pieces:
            yield state.rank, piece, self.mine(piece)
        for piece in self.pieces:
            for peer in reversed(state.peers()):
                self.wait(piece, peer)
                yield peer, piece, self.of(peer, piece)
