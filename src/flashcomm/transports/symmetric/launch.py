"""All-reduces in one launch: `exchange` on memory where every rank knows the addresses of all ranks.

The memory may be torch's symmetric memory across GPUs, or on one GPU that several ranks share (`memory`), or CPU memory
that processes map, in Triton's interpreter.
"""

import os
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from flashcomm import kernels
from flashcomm.codecs import Codec
from flashcomm.errors import CollectiveError, PeerLost
from flashcomm.kernels import gpu
from flashcomm.kernels.gpu.tiles.base import Format
from flashcomm.transports.base import OnRows, Task, nothing_to_abandon
from flashcomm.transports.symmetric import exchange

BLOCKS = 16
"""Programs of a launch, each on a multiprocessor of its own: few, so that a model can compute on the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """The memory of all ranks, as one rank sees it.

    Args:
        rank: of this process.
        buffers: int64 [R] on the device, the addresses of the ranks' memory, each a multiple of 16.
        size_bytes: of each rank's memory, which must be 0 when the ranks meet.
        epochs: int32 [2, B] zeros on the device: the epoch of each program, and whether it runs. B, the same on all
            ranks, is the number of programs of a launch.
        lost: int32 [1] that the host can read without waiting for the device: one more than the rank that did not come,
            or -1 after two launches that ran at the same time.
        patience: how often a flag is looked at before its rank counts as lost.
        streams: the one, if any, to which the last launch went.
        keep: what must live as long as the addresses.
    """

    rank: int
    buffers: torch.Tensor
    size_bytes: int
    epochs: torch.Tensor
    lost: torch.Tensor
    patience: int = 1 << 30
    streams: list = field(default_factory=list)
    keep: object = None

    @property
    def half_bytes(self) -> int:
        """Bytes that one call may use."""
        return (self.size_bytes - padded(8 * len(self.buffers) * self.blocks)) // 32 * 16

    @property
    def blocks(self) -> int:
        """Programs of a launch."""
        return self.epochs.shape[1]


def padded(size_bytes: int) -> int:
    """Round up to the 16 bytes that travel at once."""
    return -(-size_bytes // 16) * 16


@lru_cache(maxsize=4096)
def row_length(cols: int, codec: Codec) -> int | None:
    """The length of the rows, one tile each, that rows of `cols` values are cut into; None where there is none.

    >>> from flashcomm.codecs import parse
    >>> row_length(5120, parse("int8g128")), row_length(5120, parse("nvfp4"))
    (1024, 5120)
    """
    unit = codec.unit(cols)
    lengths = [n for n in range(unit, min(cols, gpu.LARGEST_TILE) + 1, unit) if cols % n == 0]
    lengths = [n for n in lengths if not any(gpu.why_not(single, n) for single in codec.formats)]
    short = [n for n in lengths if n <= gpu.TILE]
    # A tile without an edge first, then the longest that is no longer than usual.
    return max(short, key=lambda n: (n & -n == n and n >= gpu.TILE // 4, n)) if short else min(lengths, default=None)


@lru_cache(maxsize=4096)
def tile_of(codec: Codec, length: int) -> int:
    """Values of the tile that holds a whole row of `length` values in all of the codec's formats.

    >>> from flashcomm.codecs import parse
    >>> tile_of(parse("int8g128"), 1440), tile_of(parse("nvfp4"), 5120)
    (2048, 8192)
    """
    forms = [_form(single, length) for single in codec.formats]
    return max(gpu.tile(*forms, cols=length), 1 << (length - 1).bit_length())


def needed_bytes(algorithm: str, rows: int, cols: int, codec: Codec, ranks: int) -> int:
    """Bytes of half of a rank's memory that an all-reduce of x[rows, cols] uses; see `exchange`."""
    first, second = (padded(single.payload_bytes(cols)) for single in codec.formats)
    return ranks * rows * first if algorithm == "one_step" else ranks * -(-rows // ranks) * (2 * first + second)


def sent_bytes(algorithm: str, rows: int, cols: int, codec: Codec, ranks: int) -> int:
    """Bytes that a rank sends to others in an all-reduce of x[rows, cols]."""
    length = row_length(cols, codec)
    assert length is not None
    rows = rows * cols // length
    first, second = (padded(single.payload_bytes(length)) for single in codec.formats)
    return (ranks - 1) * (rows * first if algorithm == "one_step" else -(-rows // ranks) * (first + second))


def all_reduce(x: torch.Tensor, codec: Codec, peers: Peers, out: torch.Tensor, algorithm: str):
    """Sum every rank's x[T, H] into out[T, H], in as many launches as the memory needs.

    Args:
        x: contiguous bf16, fp16 or fp32 [T, H] on the device of `peers`.
        codec: one whose `row_length` is not None for H.
        peers: who takes part.
        out: contiguous, like x; may be x.
        algorithm: ``one_step`` or ``two_step``.

    Raises:
        PeerLost: an earlier call lost a rank.
        ValueError: not even one row fits into the memory.
    """
    length = row_length(x.shape[1], codec)
    assert length is not None
    ranks = len(peers.buffers)
    x, out = x.view(-1, length), out.view(-1, length)
    at_once = ranks * (peers.half_bytes // needed_bytes(algorithm, ranks, length, codec, ranks))
    if at_once == 0:
        raise ValueError(f"rows of {length} values in {codec} need more than {peers.size_bytes} bytes on each rank")
    for start in range(0, len(x), at_once):
        part = slice(start, min(start + at_once, len(x)))
        check(peers)
        arguments, constants = _call(x[part], out[part], codec, peers, algorithm)
        with gpu.on_device(x):
            _KERNELS[algorithm][(peers.blocks,)](*arguments, **constants)


_KERNELS: dict[str, Any] = {"one_step": exchange.one_step, "two_step": exchange.two_step}


def _call(
    x: torch.Tensor, out: torch.Tensor, codec: Codec, peers: Peers, algorithm: str
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a launch on rows of one tile each, and its constants."""
    rows, length = x.shape
    first, second = (_form(single, length) for single in codec.formats)
    widths = [padded(single.payload_bytes(length)) for single in codec.formats]
    # A row is one tile: columns beyond it would be neither sent nor written.
    size, values = tile_of(codec, length), gpu.VALUES[x.dtype]
    arguments = [
        gpu.typed(x, values),
        gpu.typed(out, values),
        peers.buffers,
        peers.epochs,
        peers.lost,
        peers.patience,
        peers.rank,
        rows,
        length,
        peers.half_bytes,
        *widths[: 1 if algorithm == "one_step" else 2],
    ]
    constants = {
        "R": len(peers.buffers),
        "VALUES": values,
        "FIRST": first,
        "SECOND": second,
        "V": size,
        "EDGE": gpu.edge(length, size),
        "WORDS": 1 << (max(widths) // 4 - 1).bit_length(),
        "PTX": x.is_cuda and torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1",
        **gpu.options(size, first, second),
    }
    return arguments, constants


def _form(codec: Codec, length: int) -> Format:
    """The constants of a format whose payloads lie in bytes, casts too."""
    form = gpu.describe(codec, length)
    return form._replace(kind="cast") if form.kind == "values" else form


def check(peers: Any):
    """Raise if the device has found that a rank is missing, or that launches overlap.

    Raises:
        PeerLost: a rank did not come.
        CollectiveError: two launches of this rank ran at the same time.
    """
    lost = int(peers.lost[0])
    if lost < 0:
        raise CollectiveError(
            f"two launches of rank {peers.rank} ran at the same time in an earlier call: let the stream of an eager "
            "call wait for that of a graph's replay, or use one stream"
        )
    if lost:
        raise PeerLost(f"rank {lost - 1} did not come while rank {peers.rank} waited for it in an earlier call")


def serves(task: Task) -> bool:
    """Whether one launch serves a task, from facts that all ranks share."""
    if task.name not in _KERNELS or not task.rows or task.out_dtype != task.dtype:
        return False
    return not kernels.any_missing(task.codec, "cuda") and row_length(task.cols, task.codec) is not None


def load(task: Task, peers: Peers):
    """Compile what sums of any number of rows like those of the task need, which launches nothing."""
    length = row_length(task.cols, task.codec)
    assert length is not None
    x = torch.empty(1, length, dtype=task.dtype, device=task.device)
    first, second = task.codec.formats
    for algorithm, kernel in _KERNELS.items():
        if algorithm == "one_step" and first != second:
            continue  # it has one format
        arguments, constants = _call(x, x, task.codec, peers, algorithm)
        with gpu.on_device(x):
            compiled = kernel.warmup(*arguments, grid=(peers.blocks,), **constants)
            if compiled is not None:
                compiled.run  # noqa: B018 - puts the code on the device, which the first launch would do


def prepare(task: Task, peers: Peers) -> OnRows | None:
    """Prepare a task; None where one launch does not serve it."""
    if not serves(task):
        return None
    sent = sent_bytes(task.name, task.rows, task.cols, task.codec, len(peers.buffers))

    def run(x: torch.Tensor, out: torch.Tensor) -> int:
        stream = torch.cuda.current_stream(x.device)
        # A graph that is captured may wait for nothing outside of it.
        if stream != peers.streams[-1] and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(peers.streams[-1])
            peers.streams[:] = [stream]
        all_reduce(x.contiguous(), task.codec, peers, out, task.name)
        return sent

    # Ranks of which one has been lost find out by themselves.
    return OnRows(run, (task.rows, task.cols), nothing_to_abandon)
