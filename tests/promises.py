"""The seven promises as checks that run on every rank, and a broken all-reduce for each that its check must catch.

A check takes a `Member`, which is a rank on a process of its own or one of a loopback, and returns the violations that
this rank sees, as sentences. It never raises in the middle: the ranks must stay in step.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist

import flashcomm
import values
from flashcomm.collectives.group import group_of

CODECS = (
    *("int8g128", "int4g32", "int4g128:int8g128", "bf16:int5g100", "int3sg7", "fp32"),
    *(
        "mxfp4",
        "nvfp4:fp8g128",
        "fp4_e2m1g8_e5m0",
        "int2g32+spike",
        "int4g128+hadamard",
        "int3g32+taco",
        "int4g32+sr",
        "ec4.25",
        "lossless",
    ),
)


def tensor(rank: int, shape, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """What rank `rank` contributes; every rank can compute every other's."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


@cache
def simulated(world_size: int, spec: str, algorithm: str, shape, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Result of the simulation for `tensor` of each rank; the same for every kind of messages, so it is kept."""
    xs = [tensor(rank, shape, dtype, seed) for rank in range(world_size)]
    return flashcomm.simulate.all_reduce(xs, spec, algorithm)


def algorithms(spec: str) -> list[str]:
    return ["two_step"] if ":" in spec else ["one_step", "two_step"]


def everyone(x: torch.Tensor) -> list[torch.Tensor]:
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, x)
    return gathered


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, NaN included."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


@dataclass(frozen=True)
class Member:
    """One rank of a group, as a check sees it."""

    group: Any = None
    """Process group; None for the default one."""
    function: Callable = flashcomm.all_reduce
    """The all-reduce that is checked."""

    @property
    def rank(self) -> int:
        return group_of(self.group).ranks.rank

    @property
    def world_size(self) -> int:
        return group_of(self.group).ranks.world_size

    @property
    def dtypes(self) -> Sequence[torch.dtype]:
        """All dtypes on few ranks; more ranks cut messages into other parts, in whatever dtype."""
        return values.DTYPES if self.world_size <= 3 else values.DTYPES[:1]

    def all_reduce(self, x: torch.Tensor, spec: str, algorithm: str = "auto") -> torch.Tensor:
        return self.function(x, spec, self.group, algorithm=algorithm)

    def everyone(self, fact: Any) -> list:
        """Every rank's fact, in rank order, once all ranks are here."""
        return group_of(self.group).ranks.tell(fact)

    def judged(self, cases: Iterable, mine: Sequence) -> Iterator[tuple]:
        """Yield (case, every rank's outcome) of the cases that this rank judges: the ranks share them."""
        for number, (case, ours) in enumerate(zip(cases, zip(*self.everyone(mine), strict=True), strict=True)):
            if number % self.world_size == self.rank:
                yield case, ours

    def predicted(self, make: Callable[[int], torch.Tensor], spec: str, algorithm: str) -> torch.Tensor:
        """The result that the simulation gives where rank r holds ``make(r)``; one rank keeps its values."""
        if isinstance(make, partial) and self.world_size > 1:
            return simulated(self.world_size, spec, algorithm, **make.keywords)
        xs = [make(rank) for rank in range(self.world_size)]
        return xs[0] if len(xs) == 1 else flashcomm.simulate.all_reduce(xs, spec, algorithm)


def _cases():
    for spec in CODECS:
        for algorithm in algorithms(spec):
            yield spec, algorithm


def same_bits(me: Member) -> list[str]:
    """Promise 1, and that one process predicts the bits."""
    bad, results = [], []
    cases = [(*case, dtype) for case in _cases() for dtype in me.dtypes]
    for spec, algorithm, dtype in cases:
        results.append(me.all_reduce(tensor(me.rank, (5, 300), dtype), spec, algorithm))
    for (spec, algorithm, dtype), ours in me.judged(cases, results):
        if not all(same(one, ours[0]) for one in ours):
            bad.append(f"{spec} {algorithm} {dtype}: ranks hold different bits")
        if not same(ours[0], me.predicted(partial(tensor, shape=(5, 300), dtype=dtype), spec, algorithm)):
            bad.append(f"{spec} {algorithm} {dtype}: not the bits that one process predicts")
    return bad


def bounded_error(me: Member) -> list[str]:
    """Promise 2: half a step for each rank's rounding, half a step of the sum's, and the output's own rounding."""
    bad, mine = [], []
    cases = [(*case, dtype, scale) for case in _cases() for dtype in me.dtypes for scale in (1.0, 1e-6, 1e3)]
    for spec, algorithm, dtype, scale in cases:
        first = flashcomm.codec(spec).formats[0]
        x = (tensor(me.rank, (4, 257), torch.float32, seed=1) * scale).to(dtype)
        rounding = values.allowed_error(first.step(x), x, torch.float32)
        decoded = first.decode(first.encode(x), 257, torch.float32)
        mine.append((x, me.all_reduce(x, spec, algorithm), rounding, decoded))
    for (spec, algorithm, dtype, scale), ours in me.judged(cases, mine):
        xs, results, roundings, decoded = zip(*ours, strict=True)
        exact, allowed = sum(x.double() for x in xs), sum(roundings, torch.zeros(4, 257, dtype=torch.float64))
        if algorithm == "two_step":
            total = sum(decoded, torch.zeros(4, 257))
            allowed += values.allowed_error(flashcomm.codec(spec).formats[1].step(total), total, torch.float32)
        allowed += 2**-22 * sum(x.double().abs() for x in xs)
        allowed += values.last_rounding(exact.abs() + allowed, dtype)
        error = torch.stack([(result.double() - exact).abs() for result in results])
        if me.world_size > 1 and not (error <= allowed).all():
            bad.append(f"{spec} {algorithm} {dtype} at {scale}: error {error.max():.3g} beyond the bound")
    return bad


def fp32_sums(me: Member) -> list[str]:
    """Promise 3: fp32 accumulation in rank order; no fp16 on the way; subnormals and 1e38 survive."""
    bad, ranks = [], me.world_size
    terms = [1e8, 1.0, -1e8, 1.0, 3.0, -1.0, 1e-3][:ranks]
    expected = torch.tensor(terms[0])
    for term in terms[1:]:
        expected = expected + torch.tensor(term)
    for algorithm in ("one_step", "two_step"):
        got = me.all_reduce(torch.full((3, 8), terms[me.rank]), "fp32", algorithm)
        if not same(got, torch.full((3, 8), expected.item())):
            bad.append(f"{algorithm}: fp32 sum {got[0, 0].item()} instead of {expected.item()} in rank order")
        # A bf16 accumulator would lose each of these ones; an fp32 one keeps them until the single rounding at the end.
        x = torch.full((2, 128), 256.0 if me.rank == 0 else 1.0).bfloat16()
        got = me.all_reduce(x, "bf16:fp32" if algorithm == "two_step" else "bf16", algorithm)
        want = torch.tensor(256.0 + ranks - 1).bfloat16().item()
        if got[0, 0].item() != want:
            bad.append(f"{algorithm}: bf16 sum {got[0, 0].item()} instead of {want}")
        for value in (2.0**-133, 1e38 / ranks, 333824.0):
            got = me.all_reduce(torch.full((2, 128), value), "int8g128", algorithm)
            if not torch.isfinite(got).all() or (got / ranks - value).abs().max() > value / 100 + 2**-126:
                bad.append(f"{algorithm}: {value} became {got[0, 0].item() / ranks}")
    return bad


def token_alone(me: Member) -> list[str]:
    """Promise 4: batching, padding and chunking of tokens change no bit."""
    bad = []
    for spec, algorithm in _cases():
        for cols in (256, 300):
            x = tensor(me.rank, (9, cols), seed=2)
            whole = me.all_reduce(x, spec, algorithm)
            chunks = torch.cat([me.all_reduce(x[a:b], spec, algorithm) for a, b in ((0, 1), (1, 4), (4, 9))])
            padded = me.all_reduce(torch.cat([x * 100, x, -x]), spec, algorithm)[9:18]
            if not same(whole, chunks) or not same(whole, padded):
                bad.append(f"{spec} {algorithm} {cols} columns: a token's bits depend on its neighbours")
    return bad


_SHAPES = ((0,), (0, 128), (4, 0), (), (1,), (7,), (1, 1), (3, 1), (3, 100), (2, 127), (2, 3, 5), (1, 4096), (2, 4096))
_VIEWS = {
    "transposed": lambda x: x.T,
    "every other column": lambda x: x[:, ::2],
    "window": lambda x: x[1:4, 3:17],
    "expanded": lambda x: x[:1].expand(6, -1),
}


def any_shape(me: Member) -> list[str]:
    """Promise 5: any numel, hidden size and stride; the input stays as it was."""
    bad, results = [], []
    makers = {
        f"{dtype} {list(shape)}": partial(tensor, shape=shape, dtype=dtype, seed=3)
        for shape in _SHAPES
        for dtype in me.dtypes
    }
    makers |= {name: lambda r, view=view: view(tensor(r, (6, 20), seed=4)) for name, view in _VIEWS.items()}
    specs = ("int8g128", "int4g32", "int5g100:int8g3", "nvfp4", "int2g32+spike")
    cases = [(spec, algorithm, *item) for spec in specs for algorithm in algorithms(spec) for item in makers.items()]
    for spec, algorithm, name, make in cases:
        x = make(me.rank)
        before = x.clone()
        results.append(me.all_reduce(x, spec, algorithm))
        if not same(x, before):
            bad.append(f"{spec} {algorithm} {name}: the input was changed")
    for (spec, algorithm, name, make), ours in me.judged(cases, results):
        want = me.predicted(make, spec, algorithm)
        if not all(same(got, want) for got in ours):
            bad.append(f"{spec} {algorithm} {name}: wrong result")
    return bad


def nothing_hides(me: Member) -> list[str]:
    """Promise 6, the values: a NaN or Inf makes its own group NaN and no other."""
    bad = []
    for spec in ("int8g128", "int4g32", "int3sg64", "mxfp6_e3m2", "nvfp4", "int2g32+spike", "int4g64+taco"):
        group = flashcomm.codec(spec).group
        for algorithm in algorithms(spec):
            for poison in (float("nan"), float("inf"), float("-inf")):
                x = tensor(me.rank, (4, 256), seed=5)
                if me.rank == me.world_size - 1:
                    x[2, 70] = poison
                got = me.all_reduce(x, spec, algorithm)
                expected = torch.zeros(4, 256, dtype=torch.bool)
                first = 70 // group * group
                expected[2, first : first + group] = True
                if me.world_size > 1 and not (torch.equal(got.isnan(), expected) and not got.isinf().any()):
                    bad.append(f"{spec} {algorithm}: {poison} did not make its own group NaN and no other")
    return bad


def nothing_silent(me: Member) -> list[str]:
    """Promise 7: what ran uncompressed, and why, is in `flashcomm.stats()`; bytes are what the formula says."""
    bad, ranks = [], me.world_size
    # Ranks of one process are counted together.
    together = me.everyone(os.getpid()).count(os.getpid())

    def counted(*call) -> dict:
        flashcomm.reset_stats()
        me.everyone("has reset")
        me.all_reduce(*call)
        me.everyone("has called")
        seen = flashcomm.stats()
        me.everyone("has looked")
        return seen

    seen = counted(tensor(me.rank, (2, 64)), "int8g128", "auto")
    shared = group_of(me.group).facts.shared
    reason = "compression does not pay in shared memory" if shared else "message under 64 KiB"
    reason = "one rank" if ranks == 1 else reason
    if seen["plain"] != {reason: together}:
        bad.append(f"a small message ran uncompressed and stats() says {seen['plain']}")
    if ranks > 1:
        seen = counted(tensor(me.rank, (ranks, 128)), "int4g128", "two_step")
        sent = 2 * (ranks - 1) * flashcomm.codec("int4g128").payload_bytes(128)
        if seen["calls"] != {"all_reduce/two_step/int4g128": together} or seen["wire_bytes"] != together * sent:
            bad.append(f"one row for each rank should send {sent} bytes; stats() of {together} ranks says {seen}")
    return bad


PROMISES = (same_bits, bounded_error, fp32_sums, token_alone, any_shape, nothing_hides, nothing_silent)


def _summed(x, spec, me: Member):
    """Plain building block of the broken variants: every rank's decoded rows, added in fp32."""
    first = flashcomm.codec(spec).formats[0]
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)
    return sum(first.decode(first.encode(r), rows.shape[1], torch.float32) for r in me.everyone(rows))


def owner_keeps_its_stripe(x, spec, group, algorithm):
    """Breaks 1: the owner of a stripe skips the codec that its peers see."""
    result, me = flashcomm.all_reduce(x, spec, group, algorithm=algorithm), Member(group)
    total = _summed(x, spec, me)
    stripe = -(-total.shape[0] // me.world_size)
    mine = slice(me.rank * stripe, (me.rank + 1) * stripe)
    result.view(total.shape)[mine] = total[mine].to(x.dtype)
    return result


def clips(x, spec, group, algorithm):
    """Breaks 2: scales from the 90th percentile, so that the largest values clip."""
    limit = x.float().abs().flatten().quantile(0.9) if x.numel() else torch.tensor(0.0)
    return flashcomm.all_reduce(x.float().clamp(-limit, limit).to(x.dtype), spec, group, algorithm=algorithm)


def sums_in_bf16(x, spec, group, algorithm):
    """Breaks 3: a bf16 accumulator."""
    total = torch.zeros_like(x, dtype=torch.bfloat16)
    for theirs in Member(group).everyone(x):
        total = total + theirs.bfloat16()
    return total.to(x.dtype)


def groups_cross_rows(x, spec, group, algorithm):
    """Breaks 4: groups over the flattened message."""
    return flashcomm.all_reduce(x.reshape(-1), spec, group, algorithm=algorithm).view(x.shape)


def works_in_place(x, spec, group, algorithm):
    """Breaks 5: the input is overwritten."""
    result = flashcomm.all_reduce(x, spec, group, algorithm=algorithm)
    if x.numel() and not any(stride == 0 for stride in x.stride()):
        x.copy_(result)
    return result


def hides_nan(x, spec, group, algorithm):
    """Breaks 6: NaN and Inf are replaced by something harmless."""
    return flashcomm.all_reduce(torch.nan_to_num(x, 0.0, 1.0, -1.0), spec, group, algorithm=algorithm)


def silently_plain(x, spec, group, algorithm):
    """Breaks 7: a small message takes the backend's own all-reduce without a word."""
    result = torch.empty_like(x)
    group_of(group).backend.all_reduce(x, result)
    return result


BROKEN = (owner_keeps_its_stripe, clips, sums_in_bf16, groups_cross_rows, works_in_place, hides_nan, silently_plain)


def check(promise) -> list[str]:
    """Run one promise on this rank, of the default group."""
    return promise(Member())
