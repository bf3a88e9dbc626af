"""`flashcomm bench attention`: keys that stay, merged by log-sum-exp, against keys that go around a ring.

Queries and keys are both shared out. Both ways attend by the same kernel, so they differ in what travels: in the ring
all keys and values in their dtype, in ours queries and outputs in a codec. Every answer is checked before anything is
timed: ours must have the bits of the simulation, the ring's may err by its dtype.

Shape legend: R ranks, B batch, Hq and Hk heads of queries and keys, L queries and K keys of all ranks, d head size.

Source of the ring: Ring Attention (arXiv 2310.01889).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

import flashcomm
from flashcomm import attention, codecs
from flashcomm.attention.partial import partial_attention
from flashcomm.attention.rows import Rows, weighted_sum
from flashcomm.bench.collectives import link_name, slowest, usage
from flashcomm.bench.timing import interleaved
from flashcomm.codecs import Codec
from flashcomm.lab import hosts as labs
from flashcomm.lab import launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One attention, of all ranks together."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRow:
    """One way for one shape; the fields are the columns of `results/attention_*.json`."""

    op: str
    ranks: int
    ranks_per_host: int
    backend: str
    dtype: str
    link: str
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_size: int
    way: str
    """``merge``: keys stay; ``ring``: keys and values go around; ``alone``: no exchange, each rank its own keys."""
    codec: str
    repeats: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ring_over_this: float
    """Median of the ring over this one's, from the same rounds."""
    formula_bytes: int
    """Bytes that one rank sends, by the formula of docs/attention.md."""
    wire_bytes: int
    """Bytes that one rank sent, without headers."""
    interface_bytes: int | None
    """Bytes that an interface sent, on the host that sent most; None outside a lab."""
    cpu_ms: float
    """CPU time of a rank, mean over the ranks."""
    sqnr_db: float | None
    """SQNR of the output against attention in one place in fp32; None without an exchange."""


def ring(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> tuple[torch.Tensor, int]:
    """Attend to all keys while they pass by: (output for this rank's queries, bytes that this rank sent).

    Args:
        query: ``[B, Hq, L / R, d]``.
        key, value: ``[B, Hk, K / R, d]``, as many on every rank.
        scale: factor of the scores.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine, coming = torch.stack([key, value]), torch.empty((2, *key.shape), dtype=key.dtype, device=key.device)
    partials, sent = [], 0
    for hop in range(ranks):
        works: list = []
        if hop < ranks - 1:
            works = [dist.isend(mine, (rank + 1) % ranks), dist.irecv(coming, (rank - 1) % ranks)]
            sent += mine.numel() * mine.element_size()
        partials.append(partial_attention(query, mine[0], mine[1], None, scale))
        for work in works:
            work.wait()
        mine, coming = coming, mine
    rows = Rows(shape=query.shape)
    outs = torch.stack([rows.split(out) for out, _ in partials])
    return rows.join(weighted_sum(outs, torch.stack([rows.split(lse[..., None]) for _, lse in partials]))), sent


def ring_bytes(shape: Shape, ranks: int, dtype: torch.dtype) -> int:
    """Bytes that one rank sends in the ring: 2 (R - 1) / R B K Hk d values.

    >>> ring_bytes(Shape(batch=1, heads=2, key_heads=2, queries=4, keys=64, head_size=8), 4, torch.bfloat16)
    3072
    """
    return 2 * (ranks - 1) * shape.batch * shape.keys // ranks * shape.key_heads * shape.head_size * dtype.itemsize


def merge_bytes(shape: Shape, ranks: int, codec: Codec, dtype: torch.dtype) -> int:
    """Bytes that one rank sends to merge: (R - 1) / R B L times a row of each step and Hq fp32 of log-sum-exps.

    >>> shape = Shape(batch=1, heads=2, key_heads=2, queries=4, keys=64, head_size=8)
    >>> merge_bytes(shape, 4, codecs.parse("bf16"), torch.bfloat16)
    216
    """
    row = sum(single.payload_bytes(shape.heads * shape.head_size, dtype) for single in codec.formats)
    return (ranks - 1) * shape.batch * shape.queries // ranks * (row + 4 * shape.heads)


def run(
    shapes: Sequence[Shape],
    specs: Sequence[str],
    *,
    ranks: int,
    repeats: int = 7,
    dtype: torch.dtype = torch.bfloat16,
    lab: labs.Lab | None = None,
) -> list[AttentionRow]:
    """Measure on ranks of this machine.

    Args:
        shapes: the ranks divide their queries and keys.
        specs: codecs of our merge.
        ranks: world size.
        repeats: timed rounds.
        dtype: of queries, keys and values.
        lab: hosts for the ranks; None for this machine without a slow link.

    Raises:
        flashcomm.lab.launch.RankError: a rank failed, or a result is wrong.
    """
    return launch.run(measure, (shapes, specs, repeats, dtype), ranks=ranks, lab=lab)[0]


def measure(shapes: Sequence[Shape], specs: Sequence[str], repeats: int, dtype: torch.dtype) -> list[AttentionRow]:
    """Measure on every rank of the default process group; arguments as for `run`. Rank 0 has the full rows.

    Raises:
        RuntimeError: a result is wrong, or other bytes were sent than the formula says.
    """
    return [row for shape in shapes for row in _measure_shape(shape, specs, repeats, dtype)]


def _measure_shape(shape: Shape, specs: Sequence[str], repeats: int, dtype: torch.dtype) -> list[AttentionRow]:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    sizes = (shape.heads, shape.queries), (shape.key_heads, shape.keys), (shape.key_heads, shape.keys)
    query, key, value = (
        torch.randn(
            shape.batch, heads, tokens, shape.head_size, generator=generator, dtype=torch.float32, device="cpu"
        ).to(dtype)
        for heads, tokens in sizes
    )
    scale = shape.head_size**-0.5
    keys, values, queries = (x.chunk(ranks, 2) for x in (key, value, query))
    own = queries[rank].contiguous(), keys[rank].contiguous(), values[rank].contiguous()
    whole = own[0].float(), key.float(), value.float()
    exact = F.scaled_dot_product_attention(*whole, enable_gqa=shape.heads != shape.key_heads)
    variants: dict[str, Callable[[], object]] = {}
    facts = {}

    def add(way: str, spec: str, call: Callable[[], object], formula: int, wire: int, sqnr: float | None):
        if wire != formula:
            raise RuntimeError(f"{way} {spec}: rank {rank} sent {wire} bytes, and the formula says {formula}")
        name = f"{way} {spec}"
        interface, cpu_ms = usage(call, 1, torch.device("cpu"))
        variants[name] = call
        facts[name] = {
            "way": way,
            "codec": spec,
            "formula_bytes": formula,
            "wire_bytes": wire,
            "interface_bytes": interface,
            "cpu_ms": cpu_ms,
            "sqnr_db": sqnr,
        }

    out, sent = ring(*own, scale)
    if not (out.float() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * value.abs().max():
        raise RuntimeError(f"ring: rank {rank} is {(out.float() - exact).abs().max():.3g} away from the exact result")
    add("ring", "none", lambda: ring(*own, scale), ring_bytes(shape, ranks, dtype), sent, _sqnr(out, exact))
    add("alone", "none", lambda: partial_attention(query, *own[1:], None, scale), 0, 0, None)
    for spec in specs:
        codec = codecs.parse(spec)

        def call(codec: Codec = codec) -> torch.Tensor:
            return attention.scaled_dot_product_attention(*own, codec, sharded=True)

        call()
        flashcomm.reset_stats()
        out = call()
        want = attention.simulate(query, keys, values, codec, sharded=True).chunk(ranks, 2)[rank]
        if not torch.equal(out, want):
            raise RuntimeError(f"merge {codec}: rank {rank} got other values than one process computes")
        wire = flashcomm.stats()["wire_bytes"]
        add("merge", str(codec), call, merge_bytes(shape, ranks, codec, dtype), wire, _sqnr(out, exact))
    times = interleaved(variants, repeats=repeats, before=dist.barrier, combine=slowest)
    return [
        AttentionRow(
            op="attention",
            ranks=ranks,
            ranks_per_host=int(os.environ.get("LOCAL_WORLD_SIZE") or ranks),
            backend=dist.get_backend(),
            dtype=str(dtype).removeprefix("torch."),
            link=link_name(ranks),
            batch=shape.batch,
            heads=shape.heads,
            key_heads=shape.key_heads,
            queries=shape.queries,
            keys=shape.keys,
            head_size=shape.head_size,
            repeats=repeats,
            p20_ms=took.p20_ms,
            p50_ms=took.p50_ms,
            p80_ms=took.p80_ms,
            ring_over_this=times["ring none"].p50_ms / took.p50_ms,
            **facts[name],
        )
        for name, took in times.items()
    ]


def _sqnr(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal over noise in dB."""
    return float(20 * torch.log10(exact.norm() / (out.float() - exact).norm()))
