"""The seven promises as checks that run on every rank, and a broken all-reduce for each that its check must catch.

A check takes an all_reduce function and returns the violations that this rank sees, as sentences. It never raises in
the middle: the ranks must stay in step.
"""

import torch
import torch.distributed as dist

import flashcomm
import values

CODECS = (
    *("int8g128", "int4g32", "int4g128:int8g128", "bf16:int5g100", "int3sg7", "fp32"),
    *("mxfp4", "nvfp4:fp8g128", "fp4_e2m1g8_e5m0", "int2g32+spike", "int4g128+hadamard", "int3g32+spike+taco"),
)


def tensor(rank: int, shape, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """What rank `rank` contributes; every rank can compute every other's."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


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


def _cases():
    for spec in CODECS:
        for algorithm in algorithms(spec):
            yield spec, algorithm


def same_bits(all_reduce) -> list[str]:
    """Promise 1, and that one process predicts the bits."""
    bad = []
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for spec, algorithm in _cases():
        for dtype in values.DTYPES:
            shape = (5, 300)
            mine = all_reduce(tensor(rank, shape, dtype), spec, algorithm=algorithm)
            if not all(same(mine, theirs) for theirs in everyone(mine)):
                bad.append(f"{spec} {algorithm} {dtype}: ranks hold different bits")
            predicted = flashcomm.simulate.all_reduce([tensor(r, shape, dtype) for r in range(ranks)], spec, algorithm)
            if ranks > 1 and not same(mine, predicted):
                bad.append(f"{spec} {algorithm} {dtype}: not the bits that one process predicts")
    return bad


def bounded_error(all_reduce) -> list[str]:
    """Promise 2: half a step for each rank's rounding, half a step of the sum's, and the output's own rounding."""
    bad = []
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for spec, algorithm in _cases():
        first, second = flashcomm.codec(spec).formats
        for dtype in values.DTYPES:
            for scale in (1.0, 1e-6, 1e3):
                xs = [(tensor(r, (4, 257), torch.float32, seed=1) * scale).to(dtype) for r in range(ranks)]
                exact = sum(x.double() for x in xs)
                result = all_reduce(xs[rank], spec, algorithm=algorithm)
                allowed = torch.zeros(4, 257, dtype=torch.float64)
                partial = torch.zeros(4, 257)
                for x in xs:
                    step = first.step(x)
                    allowed += values.allowed_error(step, x, torch.float32)
                    partial = partial + first.decode(first.encode(x), 257, torch.float32)
                if algorithm == "two_step":
                    allowed += values.allowed_error(second.step(partial), partial, torch.float32)
                allowed += 2**-22 * sum(x.double().abs() for x in xs)
                allowed += values.last_rounding(exact.abs() + allowed, dtype)
                error = (result.double() - exact).abs()
                if ranks > 1 and not (error <= allowed).all():
                    bad.append(f"{spec} {algorithm} {dtype} at {scale}: error {error.max():.3g} beyond the bound")
    return bad


def fp32_sums(all_reduce) -> list[str]:
    """Promise 3: fp32 accumulation in rank order; no fp16 on the way; subnormals and 1e38 survive."""
    bad = []
    ranks, rank = dist.get_world_size(), dist.get_rank()
    terms = [1e8, 1.0, -1e8, 1.0, 3.0, -1.0, 1e-3][:ranks]
    expected = torch.tensor(terms[0])
    for term in terms[1:]:
        expected = expected + torch.tensor(term)
    for algorithm in ("one_step", "two_step"):
        got = all_reduce(torch.full((3, 8), terms[rank]), "fp32", algorithm=algorithm)
        if not same(got, torch.full((3, 8), expected.item())):
            bad.append(f"{algorithm}: fp32 sum {got[0, 0].item()} instead of {expected.item()} in rank order")
        # A bf16 accumulator would lose each of these ones; an fp32 one keeps them until the single rounding at the end.
        x = torch.full((2, 128), 256.0 if rank == 0 else 1.0).bfloat16()
        got = all_reduce(x, "bf16:fp32" if algorithm == "two_step" else "bf16", algorithm=algorithm)
        want = torch.tensor(256.0 + ranks - 1).bfloat16().item()
        if got[0, 0].item() != want:
            bad.append(f"{algorithm}: bf16 sum {got[0, 0].item()} instead of {want}")
        for value in (2.0**-133, 1e38 / ranks, 333824.0):
            got = all_reduce(torch.full((2, 128), value), "int8g128", algorithm=algorithm)
            if not torch.isfinite(got).all() or (got / ranks - value).abs().max() > value / 100 + 2**-126:
                bad.append(f"{algorithm}: {value} became {got[0, 0].item() / ranks}")
    return bad


def token_alone(all_reduce) -> list[str]:
    """Promise 4: batching, padding and chunking of tokens change no bit."""
    bad = []
    rank = dist.get_rank()
    for spec, algorithm in _cases():
        for cols in (256, 300):
            x = tensor(rank, (9, cols), seed=2)
            whole = all_reduce(x, spec, algorithm=algorithm)
            chunks = torch.cat([all_reduce(x[a:b], spec, algorithm=algorithm) for a, b in ((0, 1), (1, 4), (4, 9))])
            padded = all_reduce(torch.cat([x * 100, x, -x]), spec, algorithm=algorithm)[9:18]
            if not same(whole, chunks) or not same(whole, padded):
                bad.append(f"{spec} {algorithm} {cols} columns: a token's bits depend on its neighbours")
    return bad


def any_shape(all_reduce) -> list[str]:
    """Promise 5: any numel, hidden size and stride; the input stays as it was."""
    bad = []
    ranks, rank = dist.get_world_size(), dist.get_rank()
    shapes = [
        (0,),
        (0, 128),
        (4, 0),
        (),
        (1,),
        (7,),
        (1, 1),
        (3, 1),
        (3, 100),
        (2, 127),
        (2, 3, 5),
        (1, 4096),
        (2, 4096),
    ]
    views = {
        "transposed": lambda x: x.T,
        "every other column": lambda x: x[:, ::2],
        "window": lambda x: x[1:4, 3:17],
        "expanded": lambda x: x[:1].expand(6, -1),
    }
    cases = [
        (f"{dtype} {list(shape)}", lambda r, shape=shape, dtype=dtype: tensor(r, shape, dtype, seed=3))
        for shape in shapes
        for dtype in values.DTYPES
    ]
    cases += [(name, lambda r, view=view: view(tensor(r, (6, 20), seed=4))) for name, view in views.items()]
    for spec in ("int8g128", "int4g32", "int5g100:int8g3", "nvfp4", "int2g32+spike+hadamard"):
        for algorithm in algorithms(spec):
            for name, make in cases:
                x = make(rank)
                before = x.clone()
                got = all_reduce(x, spec, algorithm=algorithm)
                want = (
                    x if ranks == 1 else flashcomm.simulate.all_reduce([make(r) for r in range(ranks)], spec, algorithm)
                )
                if not same(got, want):
                    bad.append(f"{spec} {algorithm} {name}: wrong result")
                if not same(x, before):
                    bad.append(f"{spec} {algorithm} {name}: the input was changed")
    return bad


def nothing_hides(all_reduce) -> list[str]:
    """Promise 6, the values: a NaN or Inf makes its own group NaN and no other."""
    bad = []
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for spec in ("int8g128", "int4g32", "int3sg64", "mxfp6_e3m2", "nvfp4", "int2g32+spike", "int4g64+taco"):
        group = flashcomm.codec(spec).group
        for algorithm in algorithms(spec):
            for poison in (float("nan"), float("inf"), float("-inf")):
                x = tensor(rank, (4, 256), seed=5)
                if rank == ranks - 1:
                    x[2, 70] = poison
                got = all_reduce(x, spec, algorithm=algorithm)
                expected = torch.zeros(4, 256, dtype=torch.bool)
                first = 70 // group * group
                expected[2, first : first + group] = True
                if ranks > 1 and not (torch.equal(got.isnan(), expected) and not got.isinf().any()):
                    bad.append(f"{spec} {algorithm}: {poison} did not make its own group NaN and no other")
    return bad


def nothing_silent(all_reduce) -> list[str]:
    """Promise 7: what ran uncompressed, and why, is in `flashcomm.stats()`; bytes are what the formula says."""
    bad = []
    ranks, rank = dist.get_world_size(), dist.get_rank()
    flashcomm.reset_stats()
    all_reduce(tensor(rank, (2, 64)), "int8g128", algorithm="auto")
    shared = flashcomm.collectives.group.group_of(None).facts.shared
    reason = "compression does not pay in shared memory" if shared else "message under 64 KiB"
    reason = "one rank" if ranks == 1 else reason
    if flashcomm.stats()["plain"] != {reason: 1}:
        bad.append(f"a small message ran uncompressed and stats() says {flashcomm.stats()['plain']}")
    if ranks > 1:
        flashcomm.reset_stats()
        all_reduce(tensor(rank, (ranks, 128)), "int4g128", algorithm="two_step")
        row = flashcomm.codec("int4g128").payload_bytes(128)
        seen = flashcomm.stats()
        if seen["calls"] != {"all_reduce/two_step/int4g128": 1} or seen["wire_bytes"] != 2 * (ranks - 1) * row:
            bad.append(f"one row for each rank should send {2 * (ranks - 1) * row} bytes; stats() says {seen}")
    return bad


PROMISES = (same_bits, bounded_error, fp32_sums, token_alone, any_shape, nothing_hides, nothing_silent)


def _summed(x, spec):
    """Plain building block of the broken variants: every rank's decoded rows, added in fp32."""
    first = flashcomm.codec(spec).formats[0]
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)
    return sum(first.decode(first.encode(r), rows.shape[1], torch.float32) for r in everyone(rows)), rows


def owner_keeps_its_stripe(x, spec, algorithm="auto"):
    """Breaks 1: the owner of a stripe skips the codec that its peers see."""
    result = flashcomm.all_reduce(x, spec, algorithm=algorithm)
    total, _ = _summed(x, spec)
    stripe = -(-total.shape[0] // dist.get_world_size())
    mine = slice(dist.get_rank() * stripe, (dist.get_rank() + 1) * stripe)
    result.view(total.shape)[mine] = total[mine].to(x.dtype)
    return result


def clips(x, spec, algorithm="auto"):
    """Breaks 2: scales from the 90th percentile, so that the largest values clip."""
    limit = x.float().abs().flatten().quantile(0.9) if x.numel() else torch.tensor(0.0)
    return flashcomm.all_reduce(x.float().clamp(-limit, limit).to(x.dtype), spec, algorithm=algorithm)


def sums_in_bf16(x, spec, algorithm="auto"):
    """Breaks 3: a bf16 accumulator."""
    total = torch.zeros_like(x, dtype=torch.bfloat16)
    for theirs in everyone(x):
        total = total + theirs.bfloat16()
    return total.to(x.dtype)


def groups_cross_rows(x, spec, algorithm="auto"):
    """Breaks 4: groups over the flattened message."""
    return flashcomm.all_reduce(x.reshape(-1), spec, algorithm=algorithm).view(x.shape)


def works_in_place(x, spec, algorithm="auto"):
    """Breaks 5: the input is overwritten."""
    result = flashcomm.all_reduce(x, spec, algorithm=algorithm)
    if x.numel() and not any(stride == 0 for stride in x.stride()):
        x.copy_(result)
    return result


def hides_nan(x, spec, algorithm="auto"):
    """Breaks 6: NaN and Inf are replaced by something harmless."""
    return flashcomm.all_reduce(torch.nan_to_num(x, 0.0, 1.0, -1.0), spec, algorithm=algorithm)


def silently_plain(x, spec, algorithm="auto"):
    """Breaks 7: a small message takes torch's all-reduce without a word."""
    result = x.clone()
    dist.all_reduce(result)
    return result


BROKEN = (owner_keeps_its_stripe, clips, sums_in_bf16, groups_cross_rows, works_in_place, hides_nan, silently_plain)


def check(promise, all_reduce_name: str) -> list[str]:
    """Run one promise on this rank against flashcomm's all_reduce or a broken one."""
    broken = {function.__name__: function for function in BROKEN}
    return promise(broken.get(all_reduce_name, flashcomm.all_reduce))
