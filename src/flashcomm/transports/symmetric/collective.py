"""Collectives in one launch in CUDA C++: `exchange.cu` on memory where every rank knows the addresses of all ranks.

For the formats of `kernels.gpu.cuda` in rows of whole packs of 128 values, and up to eight ranks; `launch` has the
all-reduces of other formats. **No GPU has run it yet**: FLASHCOMM_FUSED=1 and FLASHCOMM_CUDA=1 together switch it on.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from flashcomm.codecs import Codec
from flashcomm.kernels.gpu import cuda
from flashcomm.kernels.gpu.cuda import driver
from flashcomm.transports.base import OnRows, Task, nothing_to_abandon
from flashcomm.transports.symmetric.launch import check

SOURCE = Path(__file__).with_name("exchange.cu")
# Those of the source.
MOST_RANKS, MOST_BLOCKS, LINES = 8, 256, 1 << 15
_PACK = 128
_FLAGS_BYTES, _LINES_BYTES = 2 * MOST_RANKS * MOST_BLOCKS * 8, 2 * MOST_RANKS * LINES * 8

# Not measured: no GPU has run this yet.
LOW_LATENCY_BYTES = 64 << 10
"""Messages of up to so many bytes travel as lines in a one-step all-reduce."""
_THREADS, _LOW_LATENCY_THREADS = 256, 64
_ALL_TO_ALL_BLOCKS = 32
"""The same on all ranks, whose messages may differ in length."""


class Exchange(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("memory", "x", "out", "state", "lost")),
        ("half_bytes", ctypes.c_int64),
        *((name, ctypes.c_uint32) for name in ("rank", "packs", "patience", "distance", "ring", "unused")),
        *((name, ctypes.c_uint32 * MOST_RANKS) for name in ("sent", "received")),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """The memory of all ranks, as one rank sees it.

    Args:
        rank: of this process.
        memory: int64 [R] on the device, the addresses of the ranks' memory, each a multiple of 16.
        size_bytes: of each rank's memory, which must be 0 when the ranks meet.
        state: int64 [4] zeros on the device.
        lost: int32 [1] that the host can read without waiting for the device: see `launch.Peers`.
        processors: the fewest multiprocessors of a rank's GPU.
        patience: how often a flag is looked at before its rank counts as lost.
        streams: the one, if any, to which the last launch went.
        keep: what must live as long as the addresses.
    """

    rank: int
    memory: torch.Tensor
    size_bytes: int
    state: torch.Tensor
    lost: torch.Tensor
    processors: int
    patience: int = 1 << 30
    streams: list = field(default_factory=list)
    keep: object = None

    @property
    def half_bytes(self) -> int:
        """Bytes that one launch may use."""
        return (self.size_bytes - _FLAGS_BYTES - _LINES_BYTES) // 32 * 16


class Launch(NamedTuple):
    """One launch of the kernel."""

    macros: tuple[tuple[str, str], ...]
    blocks: int
    threads: int
    argument: Exchange


def why_not(name: str, codec: Codec, cols: int, ranks: int) -> str | None:
    """Why one launch does not serve a collective on rows of `cols` values; None if it does."""
    if name not in ("one_step", "two_step", "reduce_scatter", "all_gather", "all_to_all"):
        return f"no launch for {name}"
    if ranks > MOST_RANKS:
        return f"one launch serves up to {MOST_RANKS} ranks, not {ranks}"
    if cols == 0 or cols % _PACK:
        return f"one launch takes rows of whole packs of {_PACK} values, not of {cols}"
    return next((f"no CUDA C++ kernel for {single}" for single in codec.formats if not cuda.spell(single)), None)


def launches(
    name: str,
    codec: Codec,
    x: torch.Tensor,
    out: torch.Tensor,
    peers: Peers,
    splits: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Iterator[Launch]:
    """The launches of a collective, several if a message needs more than half of the memory.

    Args:
        name: as in `base.Task`.
        codec: that `why_not` allows.
        x: contiguous rows at a multiple of 16 bytes.
        out: the same, for the result; may be x in an all-reduce.
        peers: who takes part.
        splits: rows to each rank and from each rank, of an all-to-all.
    """
    ranks, per_row, size = len(peers.memory), x.shape[1] // _PACK, x.element_size() * _PACK
    first, second = codec.formats

    def launch(algorithm: str, tiles: int, x_at: int = 0, out_at: int = 0, **fields) -> Launch:
        macros, threads = _macros(algorithm, codec, x.dtype, ranks), _threads(algorithm)
        argument = Exchange(
            memory=peers.memory.data_ptr(),
            x=x.data_ptr() + x_at * size,
            out=out.data_ptr() + out_at * size,
            state=peers.state.data_ptr(),
            lost=peers.lost.data_ptr(),
            half_bytes=peers.half_bytes,
            rank=peers.rank,
            patience=peers.patience,
            **fields,
        )
        return Launch(macros, min(tiles, peers.processors, MOST_BLOCKS), threads, argument)

    packs, room = _THREADS // 4, peers.half_bytes // ranks
    tile_bytes = [single.payload_bytes(packs * _PACK) for single in (first, second)]
    if name == "all_to_all":
        assert splits
        blocks = min(_ALL_TO_ALL_BLOCKS, peers.processors)
        counts = [(ctypes.c_uint32 * MOST_RANKS)(*(rows * per_row for rows in part)) for part in splits]
        ring = room // (blocks * tile_bytes[0])
        yield launch("ALL_TO_ALL", blocks, ring=ring, sent=counts[0], received=counts[1])
        return
    whole = len(x) * per_row
    if name == "one_step" and _fits_lines(whole, x, first):
        tiles = -(-whole // (_LOW_LATENCY_THREADS // 4))
        yield launch("LOW_LATENCY", tiles, packs=whole)
        return
    bytes_of_a_tile = {"two_step": sum(tile_bytes), "reduce_scatter": tile_bytes[0]}.get(name, tile_bytes[1])
    # Packs of a stripe, and those that one launch has room for.
    stripe, most = whole // (ranks if name == "reduce_scatter" else 1), room // bytes_of_a_tile * packs
    if name == "two_step":
        most *= ranks
    assert most, "half of the memory holds no tile of every rank"
    for start in range(0, stripe, most):
        count = min(most, stripe - start)
        here = {"x_at": start, "out_at": start}
        if name == "two_step":
            part = -(-count // ranks)
            yield launch("TWO_STEP", -(-part // packs), packs=count, distance=part, **here)
        elif name == "reduce_scatter":
            yield launch("REDUCE_SCATTER", -(-count // packs), packs=count * ranks, distance=stripe, **here)
        else:
            yield launch(name.upper(), -(-count // packs), packs=count, distance=stripe, **here)


def _threads(algorithm: str) -> int:
    return _LOW_LATENCY_THREADS if algorithm == "LOW_LATENCY" else _THREADS


def _macros(algorithm: str, codec: Codec, dtype: torch.dtype, ranks: int) -> tuple[tuple[str, str], ...]:
    kinds = algorithm, cuda.VALUES[dtype], *map(cuda.spell, codec.formats), ranks
    return ("COLLECTIVE", ", ".join(map(str, kinds))), ("THREADS", str(_threads(algorithm)))


def variants(task: Task, ranks: int) -> list[tuple[tuple[str, str], ...]]:
    """The macros of all kernels that collectives of any number of rows like those of the task need."""
    first, second = task.codec.formats
    # One step has one format.
    sums = ("TWO_STEP", "ONE_STEP", "LOW_LATENCY")[: 3 if first == second else 1]
    names = sums if task.name in ("one_step", "two_step") else (task.name.upper(),)
    return [_macros(name, task.codec, task.dtype, ranks) for name in names]


def _fits_lines(packs: int, x: torch.Tensor, codec: Codec) -> bool:
    tile = _LOW_LATENCY_THREADS // 4
    words = -(-packs // tile) * codec.payload_bytes(tile * _PACK) // 4
    return x.nbytes <= LOW_LATENCY_BYTES and words <= LINES


def sent_bytes(name: str, codec: Codec, x: torch.Tensor, ranks: int, sent_rows: int) -> int:
    """Bytes of payloads that a rank sends to others; `sent_rows` of an all-to-all."""
    first, second = (single.payload_bytes(x.shape[1]) for single in codec.formats)
    if name == "all_to_all":
        return sent_rows * first
    if name == "two_step":
        return (ranks - 1) * -(-len(x) * (first + second) // ranks)
    if name == "reduce_scatter":
        return (ranks - 1) * len(x) * first // ranks
    lines = name == "one_step" and _fits_lines(x.numel() // _PACK, x, codec.formats[0])
    # A line carries four bytes in eight.
    return (ranks - 1) * len(x) * second * (2 if lines else 1)


def serves(task: Task, ranks: int) -> bool:
    """Whether one launch serves a task, from facts that all ranks share."""
    # Parts that differ in length are not what the ranks share.
    if task.sizes or why_not(task.name, task.codec, task.cols, ranks) or task.out_dtype != task.dtype:
        return False
    return bool(task.rows or task.splits) and not any(cuda.why_not(single) for single in task.codec.formats)


def load(task: Task, peers: Peers):
    """Compile and load what collectives of any number of rows like those of the task need."""
    with torch.cuda.device(task.device):
        index = torch.cuda.current_device()
        driver.make_current(index)
        for macros in variants(task, len(peers.memory)):
            driver.kernel(macros, index, "collective", SOURCE)


def prepare(task: Task, peers: Peers) -> OnRows | None:
    """Prepare a task; None where one launch does not serve it."""
    ranks = len(peers.memory)
    if not serves(task, ranks):
        return None

    def run(x: torch.Tensor, out: torch.Tensor) -> int:
        stream = torch.cuda.current_stream(x.device)
        # A graph that is captured may wait for nothing outside of it.
        if stream != peers.streams[-1] and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(peers.streams[-1])
            peers.streams[:] = [stream]
        x = _aligned(x)
        target = out if out.data_ptr() % 16 == 0 else torch.empty_like(out)
        with torch.cuda.device(x.device):
            index = torch.cuda.current_device()
            driver.make_current(index)
            for launch in launches(task.name, task.codec, x, target, peers, task.splits):
                check(peers)
                kernel = driver.kernel(launch.macros, index, "collective", SOURCE)
                kernel(launch.blocks, stream.cuda_stream, launch.argument, launch.threads)
        if target is not out:
            out.copy_(target)
        sent_rows = sum(task.splits[0]) - task.splits[0][peers.rank] if task.splits else 0
        return sent_bytes(task.name, task.codec, x, ranks, sent_rows)

    # Ranks of which one has been lost find out by themselves.
    return OnRows(run, (task.rows, task.cols), nothing_to_abandon)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
