"""Messages from one rank of a group to another, in which no other rank takes part.

A channel leads one way, so two ranks that send to each other never wait for each other's reading. It is a lane of two
ranks, the sender 0 and the receiver 1, with an order, buffers and a thread of its own. It begins with the messages of
the backend, over which the two ranks meet in their first call and open what is faster.

Source: our own.
"""

import pickle
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from flashcomm.errors import kind_of
from flashcomm.transports import lanes
from flashcomm.transports.backend import BackendLink
from flashcomm.transports.base import Link, Ranks
from flashcomm.transports.buffers import Buffers
from flashcomm.transports.direct import Direct

# Apart from the tags of lanes and of most callers.
_TAG = 0xFC0000
MOST_TAGS = 1 << 20
_TEXT_BYTES = 512


class Channel(lanes.Lane):
    """The messages from rank `sender` to rank `receiver` of a group; made on each of the two alone.

    Args:
        group: the process group.
        sender, receiver: ranks of the group.
        tag: the caller's, from 0; channels of different tags do not mix.
        device: of the tensors.
        timeout_s: seconds to wait for the other rank.
    """

    def __init__(
        self, group: dist.ProcessGroup, sender: int, receiver: int, tag: int, device: torch.device, timeout_s: float
    ):
        # Both channels between two ranks pair their messages by the same two ranks.
        link = BackendLink(group, _TAG + 2 * tag + (sender > receiver), (sender, receiver))
        rank = 0 if group.rank() == sender else 1
        self.ranks = Ranks(
            rank=rank,
            world_size=2,
            timeout_s=timeout_s,
            tell=partial(_tell, link, rank, device),
            members=(sender, receiver),
        )
        # NCCL keeps its own order, on a stream.
        super().__init__(Direct(link, self.ranks, Buffers()), threaded=device.type != "cuda")
        self.device, self.backend_link = device, link
        self.link: Link = link
        self.num_hosts = 0
        """Number of hosts of the two ranks; 0 before they have met."""
        self.agreed: set[str] = set()
        """Contracts of messages on a GPU that were compared."""

    def meet(self):
        """On the first call: learn whether both ranks share a host, and open the transports that both can.

        Raises:
            ValueError, CollectiveError: a step failed on one rank; raised on both, and tried again by the next call.
        """
        if not self.num_hosts:
            messages, self.memories, hosts = lanes.open_pair(self.ranks, self.backend_link, self.device)
            self.messages, self.link, self.num_hosts = messages, messages.link, hosts

    def exchange(self, text: str) -> list[str]:
        """Tell the other rank a text of up to 512 bytes; return the sender's and the receiver's."""
        mine = torch.zeros(_TEXT_BYTES, dtype=torch.uint8, device="cpu")
        encoded = torch.frombuffer(bytearray(text.encode()[:_TEXT_BYTES]), dtype=torch.uint8)
        mine[: len(encoded)] = encoded
        theirs = _swap(self.link, self.ranks.rank, mine.to(self.device), _TEXT_BYTES)
        other = bytes(theirs.cpu().numpy()).rstrip(b"\0").decode(errors="replace")
        return [text, other] if self.ranks.rank == 0 else [other, text]


def _swap(link: Link, rank: int, mine: torch.Tensor, length: int) -> torch.Tensor:
    """Send bytes to the other of two ranks, and return its `length` bytes."""
    theirs = torch.empty(length, dtype=torch.uint8, device=mine.device)
    # One sends first where the other receives first: NCCL runs one after the other.
    if rank == 0:
        transfers = [link.send(mine, 1), link.receive(theirs, 1)]
    else:
        transfers = [link.receive(theirs, 0), link.send(mine, 0)]
    for transfer in transfers:
        transfer.wait()
    return theirs


def _tell(link: BackendLink, rank: int, device: torch.device, fact: Any) -> list:
    """Both ranks' facts, while the two have no transport yet."""
    mine = torch.frombuffer(bytearray(pickle.dumps(fact)), dtype=torch.uint8).to(device)
    length = torch.tensor([mine.numel()], dtype=torch.int64, device=device).view(torch.uint8)
    try:
        theirs = _swap(link, rank, length, 8).view(torch.int64).item()
        other = pickle.loads(_swap(link, rank, mine, int(theirs)).cpu().numpy().tobytes())
    except RuntimeError as error:
        raise kind_of(error)(f"the two ranks could not meet: {error}") from error
    return [fact, other] if rank == 0 else [other, fact]
