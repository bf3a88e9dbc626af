"""Notes, times on the device and on the host, and the sums that ranks must get."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flashcomm import codecs
from flashcomm.codecs import Codec
from flashcomm.report.rows import write_json

DRY = os.environ.get("DRY") == "1"
"""Run the logic on a CPU; times mean nothing then."""
DEVICE = "cpu" if DRY else "cuda"
if DRY:
    import interpreter

    interpreter.hasten()

_notes: dict[str, Any] = {}
_files: list[Path] = []


def keep_in(file: Path):
    """Keep what this process notes in `file`."""
    _files[:] = [file]


def note(**facts: Any):
    """Keep facts at once, as the process may be ended at any time; `wrong`, unless empty, fails the check."""
    _notes.update(facts)
    for file in _files:
        write_json(file, _notes)


def synchronize():
    """Wait for the device."""
    if not DRY:
        torch.cuda.synchronize()


def device_ms(call: Callable[[], object], calls: int = 10, rounds: int = 7) -> float:
    """Milliseconds of one call on the device: a graph of `calls`, so that the host's share is left out."""
    if DRY:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(2):
        call()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(rounds):
        start.record()
        graph.replay()
        end.record()
        synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def host_us(call: Callable[[], object], calls: int = 60, rounds: int = 5) -> float:
    """Microseconds that the host needs to start a call, while the device's queue is short."""
    if DRY:
        calls = rounds = 1
    call()
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return round(1e6 * min(times), 1)


def values(rank: int, *shape: int, seed: int = 0) -> torch.Tensor:
    """The bf16 values of a rank, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * seed + rank)).bfloat16()


def summed(xs: Sequence[torch.Tensor], codec: Codec, algorithm: str) -> torch.Tensor:
    """The sum that every rank must get, by the specification alone: also of one rank, which encodes, too."""
    (first, second), cols = codec.formats, xs[0].shape[-1]
    payloads = torch.stack([first.encode(x) for x in xs])
    if algorithm == "one_step":
        return codecs.decode_sum(payloads, first, cols, xs[0].dtype)
    return second.decode(codecs.decode_sum_encode(payloads, first, second, cols), cols, xs[0].dtype)


def differing(got: torch.Tensor, want: torch.Tensor) -> int:
    """Number of bytes that differ."""
    got, want = (tensor.cpu().contiguous().view(torch.uint8) for tensor in (got, want))
    return int((got != want).sum())
