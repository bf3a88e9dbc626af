"""One message from a rank to another: checked, decided and remembered once, then agreed on and run.

Before values travel, each end tells the other its *contract*: codec, dtype and shape. The two texts pass each other on
the wire, and a receiver that waits already has sent its own. So a message costs no round trip, and ends that differ
both find out, in every message, before any value has left; the next message finds the channel as it was.

On GPUs the comparison would make the host wait in every message. There only the first of messages that differ in
nothing but their number of rows is compared.

Source: our own.
"""

from dataclasses import replace
from functools import partial

import torch

from flashcomm import kernels, planner
from flashcomm.codecs import Codec, Plain
from flashcomm.collectives import arguments, routes
from flashcomm.collectives.call import Call, Work, describe
from flashcomm.collectives.group import Group
from flashcomm.collectives.stats import tally
from flashcomm.errors import CollectiveError, RanksDisagree
from flashcomm.transports.base import Failure, Run, Step, Task
from flashcomm.transports.channels import MOST_TAGS, Channel

# In the place of the contract of an end that cannot keep it, before the reason. No contract begins like this.
_FAILED = "\x01"


def start(
    x: torch.Tensor,
    codec: "str | Codec",
    home: Group,
    sender: int,
    receiver: int,
    tag: int,
    async_op: bool,
    strict: bool,
) -> "torch.Tensor | Work":
    """Send `x`, or receive into it; this rank is the sender or the receiver."""
    is_sender = home.ranks.rank == sender
    x = arguments.check_tensor(x, None if is_sender else x)
    key = "hop", sender, receiver, tag, codec, x.shape, x.dtype, x.device, strict
    # What is neither a text nor a codec may have no hash, and is refused.
    call = home.calls.get(key) if isinstance(codec, (str, Codec)) else None
    if call is None:
        call = _decide(x, codec, home, sender, receiver, tag, strict)
        home.remember(key, call)
    if is_sender and x.is_conj():
        x = x.resolve_conj()
    return call.start(x, x, async_op)


def _decide(
    x: torch.Tensor, codec: "str | Codec", home: Group, sender: int, receiver: int, tag: int, strict: bool
) -> Call:
    """Check and decide everything that depends only on x's shape, dtype and device."""
    verb = "send" if home.ranks.rank == sender else "recv"
    codec = arguments.sent_once(arguments.fitting(codec, x), verb)
    count, cols = arguments.row_shape(x.shape)
    if x.numel():
        codec.check(cols)
    plain, missing = isinstance(codec, Plain), kernels.any_missing(codec, x.device.type)
    channel = home.channel(sender, receiver, tag, x.device)
    task = Task(name="broadcast", codec=codec, rows=count, cols=cols, dtype=x.dtype, out_dtype=x.dtype, device=x.device)
    contract = describe(codec.identity, x.dtype, x.shape)
    reason = "codec none" if plain else "asked for"
    return Call(
        verb=verb,
        ranks=home.ranks,
        backend=home.backend,
        plan=planner.Plan(algorithm="one_step", codec=codec, reason=reason),
        contract=f"from rank {sender} to rank {receiver}, {contract}",
        shape=x.shape,
        dtype=x.dtype,
        device=x.device,
        large=False,
        plain_bytes=x.numel() * x.element_size() if verb == "send" else 0,
        prepared=_Hop(channel, task, contract, (sender, receiver)),
        lane=channel,
        refusal=f"would run {codec} without a kernel: {missing}" if strict and missing else None,
        tally=tally(
            verb,
            "plain" if plain else "one_step",
            str(codec),
            reason,
            uncompressed=plain,
            slow=None if plain else missing,
        ),
    )


class _Hop:
    """A `base.Run` over a channel."""

    def __init__(self, channel: Channel, task: Task, contract: str, ends: tuple[int, int]):
        self._channel, self._task, self._contract, self._ends = channel, task, contract, ends
        self._run: Run | None = None
        self._under_way = True
        """Whether an error may leave bytes behind."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> int:
        """See `base.Run`."""
        channel, self._under_way = self._channel, True
        channel.meet()
        self._agree()
        if not x.numel():
            return 0
        if isinstance(self._task.codec, Plain):
            return self._plain(x)
        if self._run is None:
            # Where both share a host, nothing is gained by codecs that work during the transfer.
            size = x.numel() * x.element_size()
            pieces = planner.pieces(size, self._task.codec, x.device.type) if channel.num_hosts > 1 else 1
            self._run = routes.route(replace(self._task, pieces=pieces), channel, lambda: None)
        # An empty tensor in the place of the result: the sender needs none.
        return self._run(x, torch.empty(0, dtype=x.dtype, device=x.device) if channel.ranks.rank == 0 else out)

    def abandon(self, why: str):
        """See `base.Run`."""
        if self._under_way:
            self._channel.abandon(why)

    def _agree(self):
        """Compare both ends' contracts; load what this one needs.

        Raises:
            RanksDisagree: they differ; raised on both.
            CollectiveError: one cannot encode or decode; raised on both.
        """
        channel, task, mine, cause = self._channel, self._task, self._contract, None
        known_as = f"{task.codec.identity} {task.dtype} {task.cols}"
        if task.device.type != "cpu" and known_as in channel.agreed:
            return
        if self._run is None and not isinstance(task.codec, Plain) and task.rows and task.cols:
            loaded, cause = channel.ranks.alone(Step.KERNELS, partial(routes.load, task, channel))
            mine = _FAILED + loaded.why if isinstance(loaded, Failure) else mine
        texts = channel.exchange(mine)
        sender, receiver = self._ends
        self._under_way = False
        for rank, text in zip(self._ends, texts, strict=True):
            if text.startswith(_FAILED):
                raise Failure(Step.KERNELS, CollectiveError, text.removeprefix(_FAILED)).error(
                    f"rank {rank}"
                ) from cause
        if texts[0] != texts[1]:
            raise RanksDisagree(
                f"ranks disagree about this message: rank {sender} sends {texts[0]}; rank {receiver} receives "
                f"{texts[1]}. Both must give the same codec, dtype and shape"
            )
        self._under_way = True
        channel.agreed.add(known_as)

    def _plain(self, x: torch.Tensor) -> int:
        """Send or receive the values themselves, by the backend."""
        link, sends = self._channel.backend_link, self._channel.ranks.rank == 0
        values = x if x.is_contiguous() else x.contiguous()
        data = values.view(-1).view(torch.uint8)
        (link.send(data, 1) if sends else link.receive(data, 0)).wait()
        if not sends and values is not x:
            x.copy_(values)
        return data.numel() if sends else 0


def other_end(home: Group, role: str, rank: int | None, group_rank: int | None, tag: int) -> int:
    """The rank in the group of the other end, from a global rank or one in the group, as torch takes them.

    Args:
        home: the group.
        role: ``dst`` or ``src``, for errors.
        rank: global.
        group_rank: in the group.
        tag: of the message.

    Raises:
        ValueError: none or both of the ranks, a rank outside of the group, this rank itself, or another tag.
    """
    if not 0 <= tag < MOST_TAGS:
        raise ValueError(f"tag must be from 0 to {MOST_TAGS - 1}, not {tag}")
    found = arguments.group_rank(home.backend.group, role, rank, group_rank)
    if found == home.ranks.rank:
        raise ValueError(f"{role} is this rank itself, {found} of its group: give another rank")
    return found
