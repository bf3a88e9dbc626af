"""A small Llama that trains tensor parallel, with a codec for all sums of values and of gradients.

Separate from `training`, the command, because ranks in a lab import the functions that they run.

The architecture is that of the bundled model at half its width and a quarter of its depth: 2 layers, hidden size 128, 4
heads of 32, MLP 384, in fp32. A token is a byte of the standard library's source, so that the head is small; a step has
4 sequences of 64. `flashcomm.training.copy` stands before every column-wise linear and `all_reduce` behind every
row-wise one: 8 sums in a step, half of them of gradients. Seeds differ in weights and batches; codecs share both.

Shapes: B sequences, T bytes of context, H hidden size.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from flashcomm import collectives, training
from flashcomm.bench.timing import interleaved
from flashcomm.models import text
from flashcomm.report.rows import document, write_json

LAYERS, HIDDEN, HEADS, MLP, CONTEXT, SEQUENCES = 2, 128, 4, 384, 64, 4
RATE, WARMUP = 3e-3, 0.05
EVERY = 10
"""Steps of one point of a curve."""
LAST = 50
"""Steps at the end whose mean is the final training loss."""
HELD_OUT_WINDOWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training run."""

    ranks: int
    codec: str
    seed: int
    steps: int
    training_loss: float
    """Mean of the last steps, in nats per byte."""
    held_out_loss: float
    same_bits: bool
    """Whether all ranks end with the same bits in the parameters that all of them have."""
    curve: list[float]
    """Mean training loss of every ten steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """The time of one step."""

    ranks: int
    link: str
    sequences: int
    codec: str
    repeats: int
    p50_ms: float
    p20_ms: float
    p80_ms: float
    wire_bytes: int
    """Bytes that a rank sends in a step."""
    speedup: float


def weights(seed: int) -> dict[str, torch.nn.Parameter]:
    """Return this rank's parameters: rows of column-wise linears, columns of row-wise ones, and all of the others."""
    generator = torch.Generator().manual_seed(seed)
    size, rank = dist.get_world_size(), dist.get_rank()

    def normal(*shape: int, split: int | None = None) -> torch.nn.Parameter:
        full = 0.02 * torch.randn(shape, generator=generator)
        return torch.nn.Parameter(full if split is None else full.chunk(size, split)[rank].clone())

    found = {
        "embedding": normal(256, HIDDEN),
        "head": normal(256, HIDDEN),
        "norm": torch.nn.Parameter(torch.ones(HIDDEN)),
    }
    for layer in range(LAYERS):
        for name in ("q", "k", "v"):
            found[f"{layer}.{name}"] = normal(HIDDEN, HIDDEN, split=0)
        found[f"{layer}.o"] = normal(HIDDEN, HIDDEN, split=1)
        for name in ("gate", "up"):
            found[f"{layer}.{name}"] = normal(MLP, HIDDEN, split=0)
        found[f"{layer}.down"] = normal(HIDDEN, MLP, split=1)
        for name in ("norm1", "norm2"):
            found[f"{layer}.{name}"] = torch.nn.Parameter(torch.ones(HIDDEN))
    return found


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of [B, heads, T, D] by their position."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 1e4 ** (-torch.arange(half) / half)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def logits(p: dict[str, torch.nn.Parameter], ids: torch.Tensor, codec: str, algorithm: str) -> torch.Tensor:
    """[B, T] bytes -> [B, T, 256]; every sum of values and of gradients goes through `codec`."""
    heads = HEADS // dist.get_world_size()
    begin = lambda x: training.copy(x, codec, algorithm=algorithm)  # noqa: E731
    end = lambda x: training.all_reduce(x, codec, algorithm=algorithm)  # noqa: E731
    x = p["embedding"][ids]
    for layer in range(LAYERS):
        of = lambda name, layer=layer: p[f"{layer}.{name}"]  # noqa: E731
        y = begin(F.rms_norm(x, (HIDDEN,), of("norm1"), 1e-6))
        q, k, v = ((y @ of(name).T).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q", "k", "v"))
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + end(y.transpose(1, 2).flatten(2) @ of("o").T)
        y = begin(F.rms_norm(x, (HIDDEN,), of("norm2"), 1e-6))
        x = x + end((F.silu(y @ of("gate").T) * (y @ of("up").T)) @ of("down").T)
    return F.rms_norm(x, (HIDDEN,), p["norm"], 1e-6) @ p["head"].T


def loss_of(p: dict[str, torch.nn.Parameter], window: torch.Tensor, codec: str, algorithm: str) -> torch.Tensor:
    """Mean cross-entropy of every byte of [B, T + 1] but the first, in nats."""
    found = logits(p, window[:, :-1].long(), codec, algorithm)
    return F.cross_entropy(found.flatten(0, 1), window[:, 1:].long().flatten())


def stream(files: list[Path]) -> torch.Tensor:
    """Return the files as one sequence of bytes."""
    return torch.frombuffer(bytearray("".join(text.read(files)).encode()), dtype=torch.uint8)


def rate(done: float) -> float:
    """Learning rate after the fraction `done`: linear warm-up, then cosine to 0."""
    return RATE * min(done / WARMUP, 0.5 * (1 + math.cos(math.pi * max(0.0, done - WARMUP) / (1 - WARMUP))))


def algorithm_of(codec: str) -> str:
    """Compress also where ranks share memory and `auto` would not."""
    return "plain" if codec == "none" else "two_step"


class Run:
    """One training run on this rank."""

    def __init__(self, codec: str, seed: int, source: torch.Tensor, sequences: int = SEQUENCES):
        self.codec, self.algorithm, self.source, self.sequences = codec, algorithm_of(codec), source, sequences
        self.p = weights(seed)
        self.optimizer = torch.optim.AdamW(self.p.values(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, done: float = 0.5) -> float:
        """Learn from one batch; return its loss."""
        starts = torch.randint(len(self.source) - CONTEXT, (self.sequences, 1), generator=self.generator)
        loss = loss_of(self.p, self.source[starts + torch.arange(CONTEXT + 1)], self.codec, self.algorithm)
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = rate(done)
        self.optimizer.step()
        return loss.item()

    def same_bits(self) -> bool:
        """Whether all ranks hold the same bits where they should."""
        shared = torch.cat([p.detach().flatten() for name, p in self.p.items() if "norm" in name or "." not in name])
        everyone = [torch.empty_like(shared) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, shared)
        return all(torch.equal(shared.view(torch.int32), theirs.view(torch.int32)) for theirs in everyone)


def rank_curves(codecs: list[str], seeds: list[int], steps: int, out: Path | None) -> list[Row]:
    """Train with each codec and seed in turn; rank 0 writes what is there after every run."""
    source, held_out = stream(text.training_files(None)), stream(text.held_out_files(None))
    index = torch.linspace(0, len(held_out) - CONTEXT - 2, HELD_OUT_WINDOWS).long()[:, None] + torch.arange(CONTEXT + 1)
    rows = [Row(**row) for row in json.loads(out.read_text())["rows"]] if out and out.exists() else []
    done = {(row.codec, row.seed) for row in rows}
    for seed in seeds:
        for codec in codecs:
            if (codec, seed) in done:
                continue
            run = Run(codec, seed, source)
            losses = [run.step((step + 1) / steps) for step in range(steps)]
            with torch.no_grad():
                held = loss_of(run.p, held_out[index], codec, run.algorithm).item()
            curve = [round(statistics.fmean(losses[at : at + EVERY]), 4) for at in range(0, steps, EVERY)]
            row = Row(
                ranks=dist.get_world_size(),
                codec=codec,
                seed=seed,
                steps=steps,
                training_loss=statistics.fmean(losses[-LAST:]),
                held_out_loss=held,
                same_bits=run.same_bits(),
                curve=curve,
            )
            rows.append(row)
            if dist.get_rank() == 0:
                print(f"seed {seed} {codec:14} training {row.training_loss:.4f} held out {held:.4f}", flush=True)
                write_json(out, document("training", rows))
    return rows


def rank_steps(codecs: list[str], link: str, repeats: int, sequences: int) -> list[StepRow]:
    """Time steps of all codecs in turn."""
    source = stream(text.training_files(None)[:20])
    runs = {codec: Run(codec, 0, source, sequences) for codec in codecs}
    sent = {}
    for codec, run in runs.items():
        run.step()
        collectives.reset_stats()
        run.step()
        sent[codec] = collectives.stats()["wire_bytes"]

    def slowest(seconds: list[float]) -> list[float]:
        times = torch.tensor(seconds)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        return times.tolist()

    steps = {codec: run.step for codec, run in runs.items()}
    times = interleaved(steps, repeats=repeats, before=dist.barrier, combine=slowest)
    return [
        StepRow(
            ranks=dist.get_world_size(),
            link=link,
            sequences=sequences,
            codec=codec,
            repeats=repeats,
            p50_ms=one.p50_ms,
            p20_ms=one.p20_ms,
            p80_ms=one.p80_ms,
            wire_bytes=sent[codec],
            speedup=times["none"].p50_ms / one.p50_ms,
        )
        for codec, one in times.items()
    ]
