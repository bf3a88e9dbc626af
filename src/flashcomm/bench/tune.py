"""`flashcomm tune`: measure the costs of collectives on this group of ranks once, for `algorithm="auto"`.

Every way to run an all-reduce is timed at a few sizes with two formats, 4 and 8 bits, which separates the cores' share
of the time from the link's; see `flashcomm.planner.costs`. A way that has fallen far behind is not tried on larger
messages.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

import flashcomm
from flashcomm import kernels, planner
from flashcomm.bench.timing import interleaved
from flashcomm.codecs import Cast, Codec, Levels, Lossless, parse
from flashcomm.collectives.group import group_of
from flashcomm.collectives.routes import run_of
from flashcomm.planner import Algorithm, Cost, LinkCosts
from flashcomm.transports.backend import backend_of
from flashcomm.transports.base import Run, Task

_ROW = 4096
SIZES = (2 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
CODECS = ("int8g128", "int4g128")
_PIECES = (1, 3, 6, 12)
_BEHIND = 2.0
_LARGE_BYTES = 1 << 20
_LARGE_REPEATS = 3
_LEAST_PIECE_BYTES = 1 << 20


def measure(
    repeats: int = 5, sizes: Sequence[int] = SIZES, progress: Callable[[str], object] = lambda text: None
) -> planner.Facts:
    """Measure the default group, on all ranks together: with CUDA tensors over NCCL, else with those of the CPU.

    Args:
        repeats: timed rounds for each size.
        sizes: message sizes in bytes.
        progress: called with a description before each size.

    Returns:
        The facts of the group with its `costs`, the same on every rank; `flashcomm.measured.save` keeps them for later.

    Raises:
        ValueError: a group of one rank, which has no link to measure.
    """
    if dist.get_world_size() == 1:
        raise ValueError("one rank has no link to measure: give 2 or more")
    group, device = group_of(None), _device()
    group.meet(device)
    facts, specs = group.facts_for(device), [*CODECS, "bf16"]
    if not facts.shared and not any(group.ranks.tell(kernels.any_missing(parse("lossless"), device.type))):
        specs.append("lossless")
    variants = [(way, codec) for way in _ways(facts) for codec in map(parse, specs)]
    # Pieces only help where the cores have work to do.
    variants = [(way, codec) for way, codec in variants if way.pieces == 1 or not isinstance(codec, Cast)]
    samples: dict[tuple[Algorithm | None, str], list[tuple[int, float, float]]] = {}
    for size in sizes:
        progress(f"messages of {size >> 10} KiB")
        fit = [(way, codec) for way, codec in variants if size >= way.pieces * _LEAST_PIECE_BYTES or way.pieces == 1]
        times = _times(size, device, fit, repeats if size < _LARGE_BYTES else min(repeats, _LARGE_REPEATS))
        for (way, codec), seconds in times.items():
            bits = codec.bits_per_value(_ROW) if codec else 16.0
            samples.setdefault((way, _kind(codec)), []).append((size, bits, seconds))
        if size >= _LARGE_BYTES:
            # All ranks see the same times. An algorithm is dropped with all its pieces and formats, whose order changes
            # as messages grow.
            best: dict[tuple[str, Codec], float] = {}
            for way, codec in fit:
                best[way.name, codec] = min(times[way, codec], best.get((way.name, codec), math.inf))
            least = {codec: min(t for (_, c), t in best.items() if c == codec) for _, codec in best}
            behind = {(name, _kind(codec)) for (name, codec), t in best.items() if t > _BEHIND * least[codec]}
            variants = [(way, codec) for way, codec in variants if (way.name, _kind(codec)) not in behind]
    costs = {key: Cost.measured(points) for key, points in samples.items()}
    of_kind = lambda kind: {way: cost for (way, its), cost in costs.items() if way and its == kind}  # noqa: E731
    measured = LinkCosts(
        name=group.name_for(device),
        plain=costs[None, "uncompressed"],
        compressed=of_kind("compressed"),
        uncompressed=of_kind("uncompressed"),
        lossless=of_kind("lossless"),
    )
    return replace(facts, costs=LinkCosts.from_dict(group.ranks.tell(measured.as_dict())[0]))


def _device() -> torch.device:
    """The device of the tensors that the default group's backend is for."""
    cuda = torch.device("cuda")
    if backend_of(group_of(None).backend.group, cuda) != "nccl":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _kind(codec: Codec | None) -> str:
    """The costs of `LinkCosts` that a codec's time belongs to; None is the backend's own."""
    if isinstance(codec, Lossless):
        return "lossless"
    return "uncompressed" if codec is None or isinstance(codec, Cast) else "compressed"


def _ways(facts: planner.Facts) -> list[Algorithm]:
    algorithms = ["one_step", "two_step", *(["hierarchical"] if facts.has_levels else [])]
    return [Algorithm(name=name, pieces=n) for name in algorithms for n in ((1,) if facts.shared else _PIECES)]


def _run(way: Algorithm, x: torch.Tensor, codec: Codec) -> Run:
    task = Task(
        name=way.name,
        codec=Levels(parse("bf16"), codec) if way.name == "hierarchical" else codec,
        rows=x.shape[0],
        cols=x.shape[1],
        dtype=x.dtype,
        out_dtype=x.dtype,
        device=x.device,
        pieces=way.pieces,
    )
    return run_of(task, group_of(None))


def _calls(size: int, device: torch.device) -> int:
    """Calls that are timed together: where they are short, or where a GPU's queue hides the cost of a launch."""
    if device.type == "cuda":
        return 20 if size <= 1 << 20 else 5
    return 20 if size <= 64 << 10 else 1


def _times(
    size: int, device: torch.device, variants: Sequence[tuple[Algorithm, Codec]], repeats: int
) -> dict[tuple[Algorithm | None, Codec | None], float]:
    """Seconds of each variant and of the backend's own all-reduce, on the slowest rank."""
    values = size // 2
    x = torch.randn(
        max(1, values // _ROW),
        min(values, _ROW),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
        device="cpu",
    ).to(device, torch.bfloat16)
    out = torch.empty_like(x)
    calls = _calls(size, device)
    timed: dict[tuple[Algorithm | None, Codec | None], Callable[[], object]] = {
        (None, None): lambda: flashcomm.all_reduce(x, "none", out=out)
    }
    for way, codec in variants:
        timed[way, codec] = partial(_run(way, x, codec), x, out)
    repeated = {str(n): lambda call=call: [call() for _ in range(calls)] for n, call in enumerate(timed.values())}
    done = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    times = interleaved(repeated, repeats=repeats, warmup=1, before=dist.barrier, after=done)
    medians = torch.tensor([times[name].p50_ms / 1e3 / calls for name in repeated], dtype=torch.float64, device=device)
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    return dict(zip(timed, medians.tolist(), strict=True))
