"""`flashcomm tune`: what collectives cost on this group of ranks, measured once, for `algorithm="auto"`.

Every way to run an all-reduce is timed at a few sizes with two formats, 4 and 8 bits, which tells the cores' share of
the time from the link's; see `flashcomm.planner.model`. A way that has fallen far behind is not tried on larger
messages.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

import flashcomm
from flashcomm import planner
from flashcomm.bench.timing import interleaved
from flashcomm.codecs import Codec, Levels, parse
from flashcomm.collectives import state_of
from flashcomm.collectives.levels import hierarchical
from flashcomm.collectives.moving import mover
from flashcomm.collectives.state import GroupState
from flashcomm.planner import Cost, Machine, Way

_ROW = 4096
SIZES = (2 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
CODECS = ("int8g128", "int4g128")
_PIECES = (1, 2, 4, 8)
_BEHIND = 2.0
_LARGE_BYTES = 1 << 20
_LEAST_PIECE_BYTES = 256 << 10


def measure(
    repeats: int = 5, sizes: Sequence[int] = SIZES, progress: Callable[[str], object] = lambda text: None
) -> planner.Group:
    """Measure the default group, on all ranks together.

    Args:
        repeats: timed rounds for each size.
        sizes: message sizes in bytes.
        progress: called with what is about to be measured.

    Returns:
        The group with its `machine`, the same on every rank; `flashcomm.collectives.tuning.save` keeps it for later.

    Raises:
        ValueError: one rank, which has nobody to send to.
    """
    if dist.get_world_size() == 1:
        raise ValueError("one rank has no link to measure: give 2 or more")
    # Any call makes the ranks meet.
    flashcomm.all_reduce(torch.zeros(1), "none")
    state = state_of(None)
    ways = _ways(state.facts)
    tried = ways
    samples: dict[str, list[tuple[int, float, float]]] = {}
    for size in sizes:
        progress(f"messages of {size >> 10} KiB")
        times = _times(size, tried, repeats)
        for name, (bits, seconds) in times.items():
            samples.setdefault(name.split(" ")[0] if bits < 16 else name, []).append((size, bits, seconds))
        # All ranks see the same times.
        best = min(seconds for bits, seconds in times.values() if bits < 16)
        fast = {name.split(" ")[0] for name, (bits, seconds) in times.items() if bits < 16 and seconds < _BEHIND * best}
        if size >= _LARGE_BYTES:
            tried = [way for way in tried if str(way) in fast or size < way.pieces * _LEAST_PIECE_BYTES]
    costs = {name: Cost.measured(points) for name, points in samples.items()}
    exact = {name.split(" ")[0]: cost for name, cost in costs.items() if name.endswith(" bf16")}
    machine = Machine(
        name=state.name,
        plain=costs["plain"],
        compressed={way: costs[str(way)] for way in ways if str(way) in costs},
        uncompressed={Way.parse(name): cost for name, cost in exact.items()},
    )
    return replace(state.facts, machine=Machine.from_dict(state.tell(machine.as_dict())[0]))


def _ways(group: planner.Group) -> list[Way]:
    algorithms = ["one_step", "two_step", *(["hierarchical"] if group.has_levels else [])]
    return [Way(algorithm=name, pieces=n) for name in algorithms for n in ((1,) if group.shared else _PIECES)]


def _run(way: Way, x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor):
    if way.algorithm == "hierarchical":
        hierarchical(x, Levels(parse("bf16"), codec), state, out, way.pieces)
    else:
        mover(way.algorithm, codec, x, state, way.pieces)(x, codec, state, out)


def _times(size: int, ways: Sequence[Way], repeats: int) -> dict[str, tuple[float, float]]:
    """(bits per value, seconds of the slowest rank) of each variant."""
    values = size // 2
    x = torch.randn(max(1, values // _ROW), min(values, _ROW), generator=torch.Generator().manual_seed(0)).bfloat16()
    out, state = torch.empty_like(x), state_of(None)
    calls = 20 if size <= 64 << 10 else 1
    bits: dict[str, float] = {"plain": 16.0}
    variants: dict[str, Callable[[], object]] = {
        "plain": lambda: flashcomm.all_reduce(x, "none", out=out),
    }
    for way in ways:
        if size < way.pieces * _LEAST_PIECE_BYTES and way.pieces > 1:
            continue
        for spec in (*CODECS, "bf16"):
            codec = parse(spec)
            name = f"{way} {spec}"
            variants[name] = lambda codec=codec, way=way: _run(way, x, codec, state, out)
            bits[name] = codec.bits_per_value(x.shape[1])
    repeated = {name: lambda call=call: [call() for _ in range(calls)] for name, call in variants.items()}
    times = interleaved(repeated, repeats=repeats, warmup=1, before=dist.barrier)
    medians = torch.tensor([times[name].p50_ms / 1e3 / calls for name in variants], dtype=torch.float64)
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    return {name: (bits[name], seconds) for name, seconds in zip(variants, medians.tolist(), strict=True)}
