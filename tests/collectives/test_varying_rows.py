"""Rows that vary in length: the bits of codec ``bf16``, over every kind of messages, in the bytes that they use."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
import values
from calls import failure, meeting, new_group
from flashcomm.codecs import Levels, parse
from flashcomm.codecs.base import canonical_nan
from flashcomm.collectives import algorithms
from flashcomm.collectives.group import group_of
from flashcomm.collectives.hierarchical import hierarchical
from flashcomm.errors import RanksDisagree
from flashcomm.planner import Algorithm, Cost, LinkCosts
from flashcomm.transports.base import OnRows
from loopback import Link, Loopback

LOSSLESS, BF16 = parse("lossless"), parse("bf16")
VERBS = ["one_step", "two_step", "reduce_scatter", "all_gather", "all_to_all"]


def inputs(world_size: int, cols: int = 96, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Rows of every kind for each rank: zeros and short ones, noise that does not shrink, NaN and Inf."""
    xs = []
    for rank in range(world_size):
        x = promises.tensor(rank, (4 * world_size + 4, cols)) * 10.0 ** promises.tensor(rank, (1,), seed=1)
        x[rank + 1 :: 5] = 0
        x[3 * world_size + 1] = values.every_pattern(torch.bfloat16).flatten()[7 : 65536 : 65536 // cols][:cols]
        xs.append(x[: 4 * world_size].to(dtype))
    return xs


def call(verb: str, x: torch.Tensor, codec, messages, pieces: int) -> tuple[torch.Tensor, int]:
    """The result of a verb on this rank, and the bytes that it sent."""
    count, rank = messages.ranks.world_size, messages.ranks.rank
    if verb == "all_to_all":
        going = [1 + (rank + other) % 3 for other in range(count)]
        coming = [1 + (rank + other) % 3 for other in range(count)]
        out = torch.empty(sum(coming), x.shape[1], dtype=x.dtype)
        return out, algorithms.all_to_all(x[: sum(going)].contiguous(), out, codec, messages, going, coming)
    shape = {"reduce_scatter": len(x) // count, "all_gather": count * len(x)}.get(verb, len(x))
    out = torch.empty(shape, x.shape[1], dtype=x.dtype)
    return out, algorithms.ALGORITHMS[verb](x, out, codec, messages, pieces=pieces)


@pytest.mark.parametrize("how", ["link", "link without lengths", "bulk"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_bits_of_bf16_in_fewer_bytes(world_size, how, monkeypatch):
    monkeypatch.setattr(Link, "tells_lengths", how == "link")
    loop = Loopback(world_size, bulk=how == "bulk")
    for dtype in values.DTYPES:
        xs = inputs(world_size, dtype=dtype)
        for verb in VERBS:
            for pieces in (1, 3):
                both = [
                    loop.run(lambda r, m, c=c, v=verb, p=pieces, xs=xs: call(v, xs[r], c, m, p))
                    for c in (LOSSLESS, BF16)
                ]
                for (got, sent), (want, plain) in zip(*both, strict=True):
                    # Gathered NaNs keep their bits, which a cast does not.
                    assert promises.same(canonical_nan(got), want), (dtype, verb, pieces)
                    if world_size > 1:
                        assert sent < plain if how == "link" else sent > plain, (dtype, verb, pieces)


def test_the_bytes_are_those_that_rows_use():
    x = inputs(2)
    want = int(LOSSLESS.lengths(LOSSLESS.encode(x[0])).sum())
    assert Loopback(2).run(lambda r, m: call("all_gather", x[0], LOSSLESS, m, 2)[1]) == [want, want]


@pytest.mark.parametrize("spec", ["lossless/lossless", "lossless/int4g32", "int8g32/lossless", "bf16/lossless:int8g32"])
@pytest.mark.parametrize(("size", "hosts"), [(2, 2), (2, 3)])
def test_levels(spec, size, hosts):
    """As with bf16 in the place of lossless."""
    xs = inputs(size * hosts, cols=64)

    def total(codec) -> torch.Tensor:
        inside = [Loopback(size) for _ in range(hosts)]
        between = [Loopback(hosts) for _ in range(size)]
        outs = [torch.empty_like(x) for x in xs]

        def run(rank, _):
            host, place = divmod(rank, size)
            messages = inside[host].messages[place]

            def prepare(task):
                algorithm = algorithms.ALGORITHMS[task.name]
                return OnRows(lambda x, out: algorithm(x, out, task.codec, messages), (task.rows, task.cols), str)

            to_hosts = between[place].messages[host]
            return hierarchical(xs[rank], outs[rank], codec, messages.ranks, prepare, to_hosts, pieces=2)

        Loopback(len(xs)).run(run)
        assert all(promises.same(out, outs[0]) for out in outs)
        return outs[0]

    codec, exact = parse(spec), parse(spec.replace("lossless", "bf16"))
    assert isinstance(codec, Levels)
    assert promises.same(total(codec), total(exact))


def sums_on_ranks() -> tuple[list[str], dict[str, int]]:
    """What is not as with bf16, and the bytes that each codec sent for one message."""
    bad, group, sent = [], new_group(), {}
    me, count = dist.get_rank(), dist.get_world_size()
    for dtype in values.DTYPES:
        x = inputs(count, dtype=dtype)[me]
        for name in ("one_step", "two_step"):
            got, want = (flashcomm.all_reduce(x, c, group, algorithm=name) for c in ("lossless", "bf16"))
            later = flashcomm.all_reduce(x, "lossless", group, algorithm=name, async_op=True).wait()
            if not (promises.same(got, want) and promises.same(later, want)):
                bad.append(f"{name} {dtype}")
        for verb in (flashcomm.reduce_scatter, flashcomm.all_gather, flashcomm.all_to_all):
            got, want = (verb(x, codec, group) for codec in ("lossless", "bf16"))
            if not promises.same(canonical_nan(got), want):
                bad.append(f"{verb.__name__} {dtype}")
    for codec in ("lossless", "bf16"):
        flashcomm.reset_stats()
        flashcomm.all_reduce(promises.tensor(me, (256, 1024)), codec, group, algorithm="two_step")
        sent[codec] = flashcomm.stats()["wire_bytes"]
    return bad, sent


@pytest.mark.parametrize("by", ["memory", "connections", "gloo"])
def test_real_ranks(by):
    for bad, sent in ranks.shared(3, by=by).run(sums_on_ranks):
        assert not bad
        bits = 16 * sent["lossless"] / sent["bf16"]
        # In shared memory nothing is sent, and a row lies at its bound.
        assert 11 < bits < 11.6 if by == "connections" else bits > 16 or by == "memory"


def a_broken_peer() -> list[str]:
    """Rank 0 sends what is no rows, and what is longer than them; rank 1 expects rows."""
    errors = []
    for message in (torch.full((50,), 255, dtype=torch.uint8), torch.zeros(1000, dtype=torch.uint8)):
        group = new_group()
        messages = meeting(group).lane.messages
        if messages.ranks.rank == 0:
            messages.link.send(message, 1).wait()
            errors.append("")
        else:
            gather = messages.gather([2, 0], 100, 1, torch.device("cpu"), varies=True)
            errors.append(failure(lambda g=gather: g.wait(g.pieces[0]), RanksDisagree)[0])
    return errors


def test_a_message_that_is_no_rows_is_an_error_and_no_crash():
    _, (no_rows, too_long) = ranks.shared(2, by="connections").run(a_broken_peer)
    assert "rank 0 sends 50 bytes that are not 2 rows of at most 100 bytes" in no_rows
    assert "rank 0 sends 1000 bytes where 200 at most were expected" in too_long


def test_auto_sends_bf16_without_loss_where_that_was_measured_to_win_and_says_so():
    loop, xs = Loopback(3), inputs(3)
    points = [(size, 16.0, size * 1e-6) for size in (1024, 1 << 20)]
    slow, fast = Cost.measured(points), Cost.measured([(size, bits, s / 2) for size, bits, s in points])
    two_step = Algorithm(name="two_step")
    costs = LinkCosts(name="here", plain=slow, uncompressed={two_step: slow}, lossless={two_step: fast})
    for process_group in loop.groups:
        group = group_of(process_group)
        group.facts = replace(group.facts, hosts=3, costs=costs)
    flashcomm.reset_stats()
    outs = loop.run(lambda rank, _: flashcomm.all_reduce(xs[rank], "bf16", loop.groups[rank]))
    want = flashcomm.simulate.all_reduce(xs, "bf16", "two_step")
    assert all(promises.same(out, want) for out in outs)
    seen = flashcomm.stats()
    reason = "measured to win from 1 KiB on; lossless for the bits of bf16"
    assert seen["reasons"] == {"all_reduce/two_step/lossless": {reason: 3}}
    assert seen["wire_bytes"] < seen["plain_bytes"]
