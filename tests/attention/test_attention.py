"""Attention over ranks: against attention in one place, the bits of all ranks, the published bound, and refusals."""

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import flashcomm
import promises
import ranks
import values
from flashcomm import attention
from flashcomm.attention import partial
from flashcomm.attention.partial import partial_attention
from flashcomm.attention.rows import Rows, weighted_sum
from flashcomm.collectives.group import group_of
from flashcomm.errors import RanksDisagree
from loopback import Loopback

CODECS = ("int8g128", "int4g32:int8g128", "ec4.25", "lossless", "nvfp4", "fp32", "none")


def tensors(dtype=torch.float32, heads=4, key_heads=2, queries=6, keys=37, size=16, batch=2):
    """Query, key and value of all ranks."""
    generator = torch.Generator().manual_seed(heads * keys + queries)
    shapes = ((batch, heads, queries, size), *[(batch, key_heads, keys, size)] * 2)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def shares(x: torch.Tensor, edges) -> list[torch.Tensor]:
    """Columns of x, cut at `edges`."""
    return [x[..., a:b, :] for a, b in pairwise(edges)]


def exact(query, key, value, mask=None, scale=None):
    """Attention in one place, in fp64; 0 where no key is visible."""
    key, value = (x.double().repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = (scale or query.shape[3] ** -0.5) * (query.double() @ key.mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1).nan_to_num(0) @ value


def masks(queries=6, keys=37, heads=4, batch=2):
    """Masks of all kinds, by name; some hide all keys of a rank or of a query."""
    generator = torch.Generator().manual_seed(5)
    causal = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    random = torch.rand(batch, heads, queries, keys, generator=generator) < 0.3
    random[:, :, 2], random[:, 1, :, :20] = False, False
    bias = torch.randn(heads, queries, keys, generator=generator)
    hidden = bias[None].masked_fill(~random, -math.inf)
    return {"none": None, "causal": causal, "random": random, "bias": bias, "bias that hides": hidden,
            "keys of a batch": torch.rand(batch, 1, 1, keys, generator=generator) < 0.7}  # fmt: skip


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_ranks_together_attend_as_one_does(name, key_heads):
    query, key, value = tensors(key_heads=key_heads)
    mask = masks()[name]
    # The second rank has no keys.
    edges = (0, 9, 9, 30, 37)
    own = None if mask is None else [mask[..., a:b] for a, b in pairwise(edges)]
    got = attention.simulate(query, shares(key, edges), shares(value, edges), "none", attn_masks=own, scale=0.3)
    torch.testing.assert_close(got.double(), exact(query, key, value, mask, 0.3), rtol=1e-5, atol=1e-5)
    if mask is None:
        want = F.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", values.DTYPES)
def test_plain_torch_attends_as_the_kernel_does(dtype, monkeypatch):
    query, key, value = tensors(dtype)
    monkeypatch.setattr(partial, "_SCORE_BYTES", 4 * 2 * 2 * 37 * 5)
    bias = masks()["bias that hides"].float()[:, :2, :, :].nan_to_num(neginf=-50)
    for mask in (None, bias):
        args = query[:, :2], key, value, mask, 0.25
        out, lse = partial._plain(*args)
        want, want_lse = partial_attention(*args)
        # In bf16 the kernel's exp has 20 bits.
        torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out, want, rtol=2**-7, atol=2**-7)


def test_scores_beyond_the_range_of_exp_do_not_overflow():
    query, key, value = tensors()
    got = attention.simulate(100 * query, shares(key, (0, 20, 37)), shares(value, (0, 20, 37)), "fp32")
    torch.testing.assert_close(got.double(), exact(100 * query, key, value), rtol=1e-4, atol=1e-4)


def test_no_phantom_key_is_counted():
    """A merge that starts from a log-sum-exp of 0 instead of -inf would see one more key, of score 0."""
    query = torch.full((1, 1, 1, 4), 1.0)
    key, value = torch.full((1, 1, 2, 4), -20.0), torch.ones(1, 1, 2, 4)
    assert attention.simulate(query, [key, key], [value, value], "fp32").eq(1).all()


@pytest.mark.parametrize("algorithm", ["one_step", "two_step"])
def test_queries_without_keys_get_zeros(algorithm):
    query, key, value = tensors()
    nothing = torch.zeros(6, 37, dtype=torch.bool)
    got = attention.simulate(query, [key] * 3, [value] * 3, attn_masks=[nothing] * 3, algorithm=algorithm)
    assert not got.any()
    empty = key[:, :, :0]
    assert not attention.simulate(query, [empty] * 3, [empty] * 3, algorithm=algorithm).any()


@pytest.mark.parametrize("world_size", [2, 5])
@pytest.mark.parametrize("spec", ["int8g128", "int4g32:int8g128", "ec4.25", "nvfp4", "bf16"])
@pytest.mark.parametrize("dtype", values.DTYPES)
def test_the_error_keeps_the_published_bound(dtype, spec, world_size):
    """Half a step of each rank's output by its weight, half a step of the merged, and roundings to the dtype."""
    query, key, value = tensors(dtype, keys=41)
    value = (value.float() * 10.0 ** torch.arange(-2, 2).repeat_interleave(4)).to(dtype)
    edges = [0, *sorted((7 * i) % 41 for i in range(1, world_size)), 41]
    keys, own = shares(key, edges), shares(value, edges)
    codec, shape = flashcomm.codec(spec), query.shape
    partials = [partial_attention(query, k, v, None, 0.25) for k, v in zip(keys, own, strict=True)]
    outs, lses = (torch.stack(each).double() for each in zip(*partials, strict=True))
    weights = (lses - lses.logsumexp(0)).exp()[..., None]
    best = (weights * outs).sum(0)
    whole = Rows(shape=shape)

    def half_step(x, single):
        rows = whole.split(x.to(dtype))
        return whole.join(values.allowed_error(single.step(rows), rows, dtype)).double()

    first = (weights * torch.stack([half_step(out, codec.formats[0]) for out in outs])).sum(0)
    # exp has a relative error of 2**-53 and weights are rounded, multiplied, added and divided in fp32.
    first += (world_size + 4) * 2.0**-23 * (weights * outs.abs()).sum(0)
    # What is left of the difference of two log-sum-exps in fp32.
    first += 2.0**-23 * lses.abs().amax(0)[..., None] * (outs.amax(0) - outs.amin(0))
    first += values.last_rounding(best.abs() + first, dtype)
    for algorithm in ("one_step", "two_step") if ":" not in spec else ("two_step",):
        got = attention.simulate(query, keys, own, spec, scale=0.25, algorithm=algorithm)
        allowed = first
        if algorithm == "two_step":
            # The merge is within `first` of the best, so its step is at most that of the worst value in reach.
            merged = weighted_sum(
                torch.stack([_arrived(whole.split(o.to(dtype)), codec.formats[0]) for o in outs]),
                torch.stack([whole.split(lse.float()[..., None]) for lse in lses]),
            )
            allowed = first + half_step(whole.join(merged), codec.formats[1])
        error = (got.double() - best).abs()
        assert (error <= allowed).all(), (algorithm, (error / allowed).max())
        assert error.max() > 0


def _arrived(rows, codec):
    return flashcomm.decode(flashcomm.encode(rows, codec), codec, cols=rows.shape[1], dtype=rows.dtype)


def test_the_bound_on_compressed_queries():
    """Scores that are off by at most e move an output by at most tanh(e / 2) of the values' range."""
    query, key, value = tensors(queries=8, keys=64)
    codec, whole = flashcomm.codec("int4g32"), Rows(shape=query.shape)
    got = whole.join(_arrived(whole.split(query), codec))
    off = (0.25 * ((got - query).double() @ key.double().repeat_interleave(2, 1).mT)).abs().amax(-1, keepdim=True)
    seen = value.double().repeat_interleave(2, 1)
    reach = seen.amax(2, keepdim=True) - seen.amin(2, keepdim=True)
    error = (exact(got, key, value, None, 0.25) - exact(query, key, value, None, 0.25)).abs()
    assert (error <= (off / 2).tanh() * reach).all()
    # Two values, whose weights trade places, reach it.
    one = torch.tensor([[[[1.0]]]])
    ends = torch.tensor([[[[0.0], [1.0]]]])
    moved = [exact(one, torch.tensor([[[[s], [-s]]]]), ends, None, 1.0).item() for s in (0.1, -0.1)]
    assert math.isclose(moved[1] - moved[0], math.tanh(0.2 / 2), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("queries", "heads", "size", "spec", "parts", "pieces", "padding"),
    [(1, 32, 128, "int8g128", 4, 4, 0), (8, 32, 128, "int8g128", 4, 1, 0), (1, 4, 64, "int8g128", 4, 2, 2),
     (3, 6, 80, "int8g128", 2, 1, 1), (5, 4, 128, "ec4.25", 4, 1, 3), (1, 3, 128, "int4g32", 2, 3, 1)],
)  # fmt: skip
def test_rows_hold_whole_heads_and_groups(queries, heads, size, spec, parts, pieces, padding):
    rows = Rows.of(torch.Size((1, heads, queries, size)), flashcomm.codec(spec), parts)
    assert (rows.pieces, rows.padding) == (pieces, padding)
    x = torch.arange(float(heads * queries * size)).view(1, heads, queries, size)
    assert torch.equal(rows.join(rows.split(x)), x)
    codec = flashcomm.codec(spec).formats[0]
    assert torch.equal(rows.join(_arrived(rows.split(x), codec)), Rows(shape=x.shape).join(
        _arrived(Rows(shape=x.shape).split(x), codec)))  # fmt: skip


def everything(group, rank: int, world_size: int, dtypes=values.DTYPES):
    """Each kind of call gives every rank the bits of the simulation."""
    causal = torch.arange(37) <= torch.arange(37 - world_size * 2, 37)[:, None]
    # Rank 0 has no keys, unless it is alone.
    edges = [0, *(37 * i // world_size + i for i in range(world_size - 1)), 37]
    edges[1] = edges[1] if world_size == 1 else 0
    hidden = [causal[:, a:b] for a, b in pairwise(edges)]
    for dtype in dtypes:
        query, key, value = tensors(dtype, queries=2 * world_size)
        keys, own = shares(key, edges), shares(value, edges)
        mine, attend = (keys[rank], own[rank]), attention.scaled_dot_product_attention
        for spec in CODECS:
            for algorithm in ("auto",) if ":" in spec or dtype != torch.bfloat16 else ("one_step", "two_step"):
                want = attention.simulate(query, keys, own, spec, attn_masks=hidden, algorithm=algorithm)
                got = attend(query, *mine, spec, group, attn_mask=hidden[rank], algorithm=algorithm)
                assert promises.same(got, want), (spec, dtype, algorithm)
        part = slice(2 * rank, 2 * rank + 2)
        want = attention.simulate(query, keys, own, "int4g32", attn_masks=hidden, sharded=True)[:, :, part]
        got = attend(query[:, :, part], *mine, "int4g32", group, attn_mask=hidden[rank], sharded=True)
        assert promises.same(got, want), dtype
    # One token, whose heads are shared out.
    one = query[:1, :, :1]
    want = attention.simulate(one, [k[:1] for k in keys], [v[:1] for v in own], "int8g128")
    assert promises.same(attend(one, keys[rank][:1], own[rank][:1], "int8g128", group), want)
    out, lse = partial_attention(query, *mine, None, 0.25)
    garbage = out.masked_fill((lse == -math.inf)[..., None], math.nan)
    want = attention.simulate(query, keys, own, "int4g32", scale=0.25)
    assert promises.same(attention.merge(garbage, lse, "int4g32", group), want)
    none = query[:, :, :0]
    assert attend(none, *mine, "int8g128", group).shape == none.shape


def looped(world_size: int, function, **how):
    """Results of ``function(group, rank, world_size)`` on every rank of a loopback."""
    loop = Loopback(world_size, **how)
    return loop.run(lambda rank, _: function(loop.groups[rank], rank, world_size))


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_gets_the_bits_of_the_simulation(world_size, bulk):
    looped(world_size, everything, bulk=bulk)


def everything_on_ranks():
    everything(None, dist.get_rank(), dist.get_world_size(), (torch.bfloat16,))


def test_processes_get_the_bits_of_the_simulation():
    ranks.shared(3).run(everything_on_ranks)


def sent_bytes(group, rank, world_size):
    """Bytes that all ranks of the loopback have sent, by kind of call."""
    sent = []
    query, key, value = tensors(torch.bfloat16, heads=8, key_heads=2, queries=16, keys=8, size=128, batch=1)
    for sharded, algorithm in ((True, "auto"), (False, "two_step"), (False, "one_step")):
        before = group_of(group).ranks.tell(flashcomm.stats()["wire_bytes"])[0]
        part = query.chunk(world_size, 2)[rank] if sharded else query
        how = {"algorithm": algorithm, "sharded": sharded}
        attention.scaled_dot_product_attention(part, key, value, "int8g128", group, **how)
        group_of(group).ranks.tell("done")
        sent.append(flashcomm.stats()["wire_bytes"] - before)
        group_of(group).ranks.tell("counted")
    return sent


def test_bytes_are_those_of_the_formulas():
    count, others = 16 * 8 * 128, 3
    payload, weights = count * (1 + 4 / 128), 4 * 16 * 8
    # The sums of all four ranks.
    want = [others * (2 * payload + weights), others * (2 * payload + weights), 4 * others * (payload + weights)]
    assert looped(4, sent_bytes) == [want] * 4


def disagree(group, rank, world_size):
    query, key, value = tensors()
    attend = attention.scaled_dot_product_attention
    with pytest.raises(RanksDisagree, match="rank 0 calls op=attention.*shape=2x4x6x16; rank 1 calls"):
        attend(query[:, :, rank:], key, value, "int8g128", group)
    with pytest.raises(RanksDisagree, match="key_heads=2, scale=0.25, .*; rank 1 calls"):
        attend(query, key, value, "int8g128", group, scale=0.25 + rank)


def test_ranks_that_disagree_find_out():
    looped(2, disagree)


Q, K, V = tensors()
NEEDS_GRAD = Q.clone().requires_grad_()
REFUSED = {
    r"query must be bf16, fp16 or fp32, not torch.float64": (Q.double(), K, V),
    r"query must be \[batch, heads, tokens, head size\], not \[4, 6, 16\]": (Q[0], K, V),
    r"key must be a dense tensor, not list": (Q, [K], V),
    r"value is torch.float16 on cpu, but query torch.float32": (Q, K, V.half()),
    r"key and value must have one shape": (Q, K, V[:, :, 1:]),
    r"must agree in batch \(dimension 0\) and head size": (Q[:1], K, V),
    r"3 query heads do not divide evenly among 2 key heads": (Q[:, :3], K, V),
    r"flashcomm is for inference": (NEEDS_GRAD, K, V),
    r"attn_mask \[6, 36\] does not broadcast to \[2, 4, 6, 37\]": {"attn_mask": torch.ones(6, 36)},
    r"attn_mask must be bool .*not torch.int64": {"attn_mask": torch.ones(6, 37).long()},
    r"scale must be finite, not nan": {"scale": math.nan},
    r"unknown algorithm 'ring'. Allowed here: auto, one_step, two_step": {"algorithm": "ring"},
    r"one_step sends once, so it takes a single codec": {"algorithm": "one_step", "codec": "int4:int8"},
    r"sharded queries have one algorithm": {"algorithm": "one_step", "sharded": True},
    r"only all_reduce has levels": {"codec": "int8/int4"},
    r"unknown codec 'int9'": {"codec": "int9"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_arguments_are_errors_before_anything_is_sent(message):
    given = REFUSED[message]
    given = dict(zip(("query", "key", "value"), given, strict=True)) if isinstance(given, tuple) else given
    # This rank's peer never comes: whoever asked it for anything would not return.
    loop = Loopback(2)
    with pytest.raises(ValueError, match=message):
        attention.scaled_dot_product_attention(**{"query": Q, "key": K, "value": V, "group": loop.groups[0], **given})


def test_wrong_partial_results_are_errors():
    group = Loopback(2).groups[0]
    with pytest.raises(ValueError, match=r"lse must be torch.float32 \[2, 4, 6\] on cpu, not torch.float64"):
        attention.merge(Q, torch.zeros(2, 4, 6).double(), "int8g128", group)
    with pytest.raises(ValueError, match="5 queries do not split evenly over 2 ranks"):
        attention.merge(Q[:, :, :5], torch.zeros(2, 4, 5), "int8g128", group, sharded=True)
    with pytest.raises(ValueError, match="one key, value and mask per rank, not 1, 2 and 1"):
        attention.simulate(Q, [K], [V] * 2)
    with pytest.raises(ValueError, match="5 queries do not split evenly over 2 ranks"):
        attention.simulate(Q[:, :, :5], [K] * 2, [V] * 2, sharded=True)
