"""Measure how fast the ranks of a group compute a decoder, and how much their sums slow it: `flashcomm tune --save`.

All ranks run the same small decoder at the same time, each with its share of the heads and of the MLP and without sums,
so ranks that share cores are measured under the load of a real run. Prompts of several lengths separate the constant
time from the time per token and per pair of tokens. The two segments of a layer do different amounts of products per
value, which separates the products' rate from the memory's.

Source: our own.
"""

import itertools
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

import flashcomm
from flashcomm import planner
from flashcomm.bench import tune
from flashcomm.machine import Seat, crowd
from flashcomm.planner.batches import pairs
from flashcomm.planner.hardware import Cluster
from flashcomm.planner.overlap import CROWDED, Line
from flashcomm.planner.shapes import Shape, Workload

PROBE = Shape(
    name="probe", hidden=1024, layers=4, heads=16, kv_heads=16, head_dim=64, intermediate=3072, vocabulary=1024
)
"""Shape of the decoder that is run; the ranks share its heads and its MLP."""
LENGTHS = (128, 256, 512, 1024)
_REPEATS = 3
_SUM_BYTES, _SUMS = 2 << 20, 8


def measure(repeats: int = 5) -> Cluster:
    """Measure the default group's link and its ranks' speed, on all ranks together.

    Args:
        repeats: timed rounds, see `flashcomm.bench.tune.measure`.

    Returns:
        The same on every rank, with the measured group.

    Raises:
        ValueError: a group of one rank, which has no link to measure.
    """
    return computed(tune.measure(repeats))


def computed(group: planner.Facts) -> Cluster:
    """Measure how fast the ranks of the default group compute, given its measured collectives."""
    assert group.costs is not None
    ranks = dist.get_world_size()
    share = replace(PROBE, heads=-(-PROBE.heads // ranks), kv_heads=-(-PROBE.kv_heads // ranks))
    share = replace(share, intermediate=PROBE.intermediate // ranks)
    attention, mlp = _lines(share)
    flops, bytes_s = _rates((share.attention(1), _token_s(attention)), (share.mlp(1), _token_s(mlp)))
    # CPU time of sums delays compute where ranks share cores, the more the more they share; elsewhere not at all.
    seats: list = [None] * ranks
    dist.all_gather_object(seats, Seat.mine())
    crowded = crowd(seats)
    plain_core, codec_core = (crowded * _core_s(spec) if crowded else 0.0 for spec in ("none", "int8g128"))
    cluster = Cluster(
        name=group.costs.name,
        group=group,
        flops=flops,
        attention_flops=share.attention(1).pair_flops / max(attention.pair_s, 1e-15),
        bytes_s=bytes_s,
        segment_s=(attention.fixed_s + mlp.fixed_s) / 2,
        plain_core=plain_core,
        codec_core=codec_core,
        crowded=CROWDED * crowded,
        skips="first",
    )
    everyone: list = [None] * ranks
    dist.all_gather_object(everyone, cluster.as_dict())
    return Cluster.from_dict(everyone[0], group.costs.name)


def _token_s(line: Line) -> float:
    """Seconds per token; where noise hides the slope, an equal share of the constant time of the longest prompt.

    >>> _token_s(Line(fixed_s=5.0, token_s=0.25)), _token_s(Line(fixed_s=512.0))
    (0.25, 0.5)
    """
    return line.token_s or line.fixed_s / LENGTHS[-1]


def _rates(*segments: tuple[Workload, float]) -> tuple[float, float]:
    """Operations and bytes per second, from two segments and their seconds per token.

    >>> attention, mlp = Workload(flops=400.0, weight_bytes=0, value_bytes=100.0), Workload(1600.0, 0, 100.0)
    >>> _rates((attention, 400 / 50 + 100 / 10), (mlp, 1600 / 50 + 100 / 10))
    (50.0, 10.0)
    """
    (one, first_s), (other, second_s) = segments
    determinant = one.flops * other.value_bytes - other.flops * one.value_bytes
    per_flop = (first_s * other.value_bytes - second_s * one.value_bytes) / determinant
    per_byte = (one.flops * second_s - other.flops * first_s) / determinant
    if min(per_flop, per_byte) <= 0:
        # Noise: take one rate for both, that of the two segments together.
        per_flop = per_byte = (first_s + second_s) / (one.flops + other.flops + one.value_bytes + other.value_bytes)
    return 1 / per_flop, 1 / per_byte


def _lines(share: Shape) -> tuple[Line, Line]:
    """Times of a layer's attention and MLP over tokens, on the slowest rank."""
    model = _decoder(share)
    points: tuple[list, list] = ([], [])
    for length in (LENGTHS[0], *LENGTHS):
        laps = [_laps(model, length) for _ in range(_REPEATS)]
        medians = torch.tensor(
            [statistics.median(lap[kind] for lap in laps) for kind in (0, 1)], dtype=torch.float64, device="cpu"
        )
        dist.all_reduce(medians, dist.ReduceOp.MAX)
        for kind, seconds in enumerate(medians.tolist()):
            points[kind].append((length, pairs(length, 0, "first") if kind == 0 else 0.0, seconds))
    # The first length ran once more, to warm up.
    return Line.through(points[0][1:]), Line.through(points[1][1:])


def _decoder(share: Shape) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=share.hidden, num_hidden_layers=share.layers, num_attention_heads=share.heads,
        num_key_value_heads=share.kv_heads, head_dim=share.head_dim, intermediate_size=share.intermediate,
        vocab_size=share.vocabulary, max_position_embeddings=max(LENGTHS),
    )  # fmt: skip
    return transformers.LlamaModel(config).bfloat16().eval()


@torch.inference_mode()
def _laps(model: Any, tokens: int) -> tuple[float, float]:
    """Seconds of one layer's attention and of its MLP, in a prompt of `tokens` tokens."""
    times: list[float] = []
    note = lambda *_: times.append(time.perf_counter())  # noqa: E731
    ends = [end for layer in model.layers for end in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    hooks = [model.layers[0].register_forward_pre_hook(note), *(end.register_forward_hook(note) for end in ends)]
    try:
        dist.barrier()
        model(torch.arange(tokens, dtype=torch.long, device="cpu")[None] % model.config.vocab_size, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    laps = [end - start for start, end in itertools.pairwise(times)]
    return statistics.median(laps[0::2]), statistics.median(laps[1::2])


def _core_s(spec: str) -> float:
    """CPU seconds per byte of a message, on the busiest rank."""
    x = torch.randn(_SUM_BYTES // 2 // PROBE.hidden, PROBE.hidden, dtype=torch.float32, device="cpu").bfloat16()
    out = torch.empty_like(x)
    flashcomm.all_reduce(x, spec, out=out)
    start = time.process_time()
    for _ in range(_SUMS):
        flashcomm.all_reduce(x, spec, out=out)
    busy = torch.tensor((time.process_time() - start) / _SUMS / _SUM_BYTES, dtype=torch.float64, device="cpu")
    dist.all_reduce(busy, dist.ReduceOp.MAX)
    return busy.item()
