"""Messages between the ranks of a CPU group, over TCP connections of our own.

gloo moves a message only once the receiver has said that it is ready, by threads that must wake each other up. Here a
rank writes into its connection at once, and the kernel carries the bytes while codecs run.

Messages leave one after the other, in the order in which they are sent, so that the pieces of a large one arrive in
order at all peers. Each message begins with its length, so that ranks with different lengths find out.

Ranks find each other through the group, which also carries the secret that opens a connection. Where a connection
cannot be made, for example because of a firewall, all ranks use the group's own messages.

Hazard: there is no background thread. Bytes move only inside of `Connections.send` and `Transfer.wait`, in both
directions. Before a caller blocks on anything else, its own pending bytes must have left; the hierarchical all-reduce
does this with ``wait_gone``.

Hazard: after an error this rank cannot know which bytes are still under way. It closes all its connections, which its
peers notice at once, and every later call raises.

Source: our own.
"""

import contextlib
import math
import secrets
import select
import socket
import struct
import time
import weakref
from collections import deque
from typing import NamedTuple, NoReturn

import torch

from flashcomm import settings
from flashcomm.errors import CollectiveError, PeerLost, RanksDisagree, TimedOut
from flashcomm.transports import addresses
from flashcomm.transports.base import Ranks, Step

_LENGTH = struct.Struct("!Q")
_SECRET_BYTES = 32
# The secret of whom it is for, and the rank that says so.
_HELLO = struct.Struct(f"!{_SECRET_BYTES}sI")
_CONNECT_S, _HELLO_S, _POLL_MS = 5.0, 1.0, 1000
# Where there are several peers, what the kernel may hold of a connection beyond what is in flight: enough for the link
# while codecs run, little enough that messages travel in the order of `send`. Measured 2026-11-21, 1 Gbit/s.
_UNSENT_BYTES = 128 << 10


class _Offer(NamedTuple):
    """The addresses at which a rank can be reached, or the reason why there is none."""

    addresses: list[str] = []
    port: int = 0
    secret: bytes = b""
    why: str = ""


class Transfer:
    """A message on its way to or from a peer."""

    def __init__(self, connections: "Connections", peer: int, part: torch.Tensor, header: bytes, up_to: bool = False):
        self._connections, self.peer, self.header = connections, peer, bytearray(header)
        self.end = time.monotonic() + connections.timeout_s
        """When to give up: messages begin with their call, so all of a call share one clock."""
        self.length = part.numel()
        self.views = [memoryview(self.header), part.view(-1).numpy().data]
        """The bytes that are still to be moved."""
        # Bytes of the next message could follow a short one, so nothing else is read before the length.
        self.room = self.views.pop() if up_to else None
        """The place of a message of unknown length; None once that is known."""

    def moved(self, count: int):
        """Advance past `count` bytes that have been moved."""
        while self.views and count >= len(self.views[0]):
            count -= len(self.views.pop(0))
        if count:
            self.views[0] = self.views[0][count:]

    def arrived(self, count: int) -> str:
        """Advance past `count` bytes that have come; return what is wrong with the length of the message, or ""."""
        self.moved(count)
        if len(self.views) > 1 or (self.room is not None and self.views):
            return ""
        length = _LENGTH.unpack(self.header)[0]
        if self.room is not None and length <= self.length:
            self.length, self.views, self.room = length, [self.room[:length]] if length else [], None
        if length == self.length:
            return ""
        at_most = "" if self.room is None else " at most"
        return f"sends {length} bytes where {self.length}{at_most} were expected"

    def wait(self):
        """Block until the message has arrived, or until the kernel has taken all of it.

        Raises:
            PeerLost: a peer has closed its connection.
            TimedOut: a peer did not come within the group's timeout.
            RanksDisagree: a peer sends another length.
        """
        if self.views:
            self._connections.wait(self)


class Connections:
    """A `base.Link`: one connection from this rank to each other, made by all ranks together or by none."""

    name = "connections"
    tells_lengths = True

    def __init__(self, ranks: Ranks):
        self.rank, self.ranks, self.timeout_s = ranks.rank, ranks.world_size, ranks.timeout_s
        self._name = ranks.name
        # Half of the timeout: a rank where this failed waits for the others, which are still trying.
        self._patience_s = min(_CONNECT_S, ranks.timeout_s / 2)
        self._failure: type[CollectiveError] = CollectiveError
        self.broken: str | None = None
        self._sockets: dict[int, socket.socket] = {}
        self._peers: dict[int, int] = {}
        self._going: deque[Transfer] = deque()
        self._coming: dict[int, deque[Transfer]] = {}
        self._poll = select.poll()
        self._finalizer = weakref.finalize(self, _close, self._sockets)

    @classmethod
    def open(cls, ranks: Ranks) -> "tuple[Connections | None, str]":
        """Connect all ranks: (connections, "") on every rank, or (None, why) on every rank if one cannot be reached."""
        self = cls(ranks)
        listening: list[socket.socket] = []
        try:
            offers = ranks.each(Step.LISTEN, lambda: self._listen(listening))
            whys = [offer.why for offer in offers]
            if not any(whys):
                whys = ranks.each(Step.CONNECT, lambda: self._connect(listening[0], offers))
        finally:
            for listener in listening:
                listener.close()
        # Higher ranks connect to lower ones, so they know more of what went wrong.
        for rank, why in reversed(list(enumerate(whys))):
            if why:
                self.close()
                return None, f"{ranks.name(rank)}: {why}"
        for peer, connection in self._sockets.items():
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peers[connection.fileno()] = peer
            self._coming[peer] = deque()
            if ranks.world_size > 2 and hasattr(socket, "TCP_NOTSENT_LOWAT"):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        return self, ""

    def _listen(self, listening: list[socket.socket]) -> "_Offer":
        """Listen for the higher ranks; `listening` gets the socket."""
        if not settings.switched_on("FLASHCOMM_CONNECTIONS"):
            return _Offer(why="FLASHCOMM_CONNECTIONS=0")
        try:
            listening.append(_listen(self.ranks))
            theirs, port = addresses.own(self._patience_s / 2), listening[0].getsockname()[1]
        except OSError as error:
            return _Offer(why=f"cannot listen: {error}")
        return _Offer(theirs, port, secrets.token_bytes(_SECRET_BYTES))

    def _connect(self, listener: socket.socket, offers: "list[_Offer]") -> str:
        """Connect to the lower ranks, then accept the higher ones; return "" or the reason why that failed."""
        try:
            return self._meet(listener, offers)
        except OSError as error:
            return f"cannot accept connections: {error}"

    def _meet(self, listener: socket.socket, offers: "list[_Offer]") -> str:
        end = time.monotonic() + self._patience_s
        for peer in range(self.rank):
            theirs, port, secret, _ = offers[peer]
            candidates = [address for told in theirs for address in addresses.seen_from_here(told)]
            reason = ""
            for tried, address in enumerate(candidates):
                try:
                    seconds = max(0.001, end - time.monotonic()) / (len(candidates) - tried)
                    self._sockets[peer] = _greet(address, port, secret, offers[self.rank].secret, self.rank, seconds)
                    break
                except OSError as error:
                    reason = f": {error.strerror or error}"
            else:
                return f"cannot reach {self._name(peer)} at {' or '.join(candidates or theirs)}, port {port}{reason}"
        while len(self._sockets) < self.ranks - 1 and (left := end - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                peer = _welcome(connection, [offer.secret for offer in offers], self.rank)
                if peer is not None:
                    self._sockets[peer] = connection
        missing = [peer for peer in range(self.ranks) if peer != self.rank and peer not in self._sockets]
        return f"{self._name(missing[0])} did not connect within {self._patience_s:g} s" if missing else ""

    def close(self, why: str = "closed"):
        """See `base.Link`. Of several reasons, later calls give the first."""
        self.broken = self.broken or why
        for connection in self._sockets.values():
            # A child of this process may hold it too.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._finalizer()

    def send(self, part: torch.Tensor, peer: int) -> Transfer:
        """See `base.Link`."""
        self._check()
        transfer = Transfer(self, peer, part, _LENGTH.pack(part.numel()))
        self._going.append(transfer)
        if len(self._going) == 1:
            self._write()
        # A peer's bytes must not fill the kernel's buffers while we are busy with ours.
        self._move(0)
        return transfer

    def receive(self, part: torch.Tensor, peer: int, *, up_to: bool = False) -> Transfer:
        """See `base.Link`."""
        self._check()
        transfer = Transfer(self, peer, part, bytes(_LENGTH.size), up_to)
        self._coming[peer].append(transfer)
        if len(self._coming[peer]) == 1:
            self._watch(peer)
        return transfer

    def _check(self):
        if self.broken:
            raise self._failure(self.broken)

    def wait(self, transfer: Transfer):
        """Move messages until `transfer` has been moved."""
        self._check()
        while transfer.views:
            left_ms = 1000 * (transfer.end - time.monotonic())
            self._move(max(0, min(_POLL_MS, math.ceil(left_ms))))
            if left_ms <= 0 and transfer.views:
                why = f"did not come within the group's timeout of {self.timeout_s:g} s"
                self._fail(TimedOut, transfer.peer, why)

    def _move(self, patience_ms: int):
        """Wait up to `patience_ms` until some connection is ready, then move its bytes."""
        for descriptor, event in self._poll.poll(patience_ms):
            peer = self._peers[descriptor]
            if event & ~select.POLLOUT and self._coming[peer]:
                self._read(peer)
            if event & ~select.POLLIN and self._sends_to(peer):
                self._write()

    def _watch(self, peer: int):
        """Poll a connection only while bytes are expected or pending: a peer that is done may have ended."""
        events = (select.POLLIN if self._coming[peer] else 0) | (select.POLLOUT if self._sends_to(peer) else 0)
        if events:
            self._poll.register(self._sockets[peer], events)
        else:
            self._poll.unregister(self._sockets[peer])

    def _sends_to(self, peer: int) -> bool:
        """Whether the next message goes to `peer`; the others wait, so that each message has the whole link."""
        return bool(self._going) and self._going[0].peer == peer

    def _write(self):
        while self._going:
            transfer = self._going[0]
            self._watch(transfer.peer)
            try:
                transfer.moved(self._sockets[transfer.peer].sendmsg(transfer.views))
            except BlockingIOError:
                return
            except OSError as error:
                self._fail(PeerLost, transfer.peer, f"has closed its connection ({error.strerror})")
            if transfer.views:
                return
            self._going.popleft()
            self._watch(transfer.peer)

    def _read(self, peer: int):
        line = self._coming[peer]
        while line:
            try:
                count = self._sockets[peer].recvmsg_into(line[0].views)[0]
            except BlockingIOError:
                return
            except OSError as error:
                self._fail(PeerLost, peer, f"has closed its connection ({error.strerror})")
            if count == 0:
                self._fail(PeerLost, peer, "has closed its connection")
            if wrong := line[0].arrived(count):
                self._fail(RanksDisagree, peer, wrong)
            if line[0].views:
                return
            line.popleft()
        self._watch(peer)

    def _fail(self, kind: type[CollectiveError], peer: int, what: str) -> NoReturn:
        if not self.broken:
            self._failure = kind
        self.close(f"{self._name(peer)} {what}, as {self._name(self.rank)} sees it")
        raise kind(self.broken)


def _close(sockets: dict[int, socket.socket]):
    for connection in sockets.values():
        connection.close()


def _listen(ranks: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=ranks, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=ranks)


def _greet(address: str, port: int, theirs: bytes, ours: bytes, rank: int, seconds: float) -> socket.socket:
    """Connect to a rank, and check that each side knows the other's secret."""
    connection = socket.create_connection((address, port), timeout=seconds)
    try:
        connection.sendall(_HELLO.pack(theirs, rank))
        answer = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        if not secrets.compare_digest(answer[:_SECRET_BYTES], ours):
            raise ConnectionError("somebody else listens there")
    except OSError:
        connection.close()
        raise
    return connection


def _welcome(connection: socket.socket, secrets_of: list[bytes], rank: int) -> int | None:
    """Answer a new connection and return its rank; None if the other side does not know our secret."""
    with contextlib.suppress(OSError, struct.error, IndexError):
        connection.settimeout(_HELLO_S)
        secret, peer = _HELLO.unpack(connection.recv(_HELLO.size, socket.MSG_WAITALL))
        if secrets.compare_digest(secret, secrets_of[rank]):
            connection.sendall(_HELLO.pack(secrets_of[peer], rank))
            return peer
    connection.close()
    return None
