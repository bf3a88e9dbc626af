"""reduce_scatter and all_gather with other than equal parts, as ranks with different numbers of tokens need them."""

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
import values
from flashcomm import kernels
from flashcomm.errors import RanksDisagree
from thorough import thorough

SPECS = ("int8g128", "int4g32+hadamard", "lossless", "ec5", "fp32", "none")


def sizes_of(world_size: int) -> list[list[int]]:
    """No rows on the first rank, on the last, on all but one; and one long part, which travels in pieces."""
    return [
        [3 * rank for rank in range(world_size)],
        [5 * (world_size - 1 - rank) for rank in range(world_size)],
        [7 if rank == world_size // 2 else 0 for rank in range(world_size)],
        [600 if rank == 0 else 1 for rank in range(world_size)],
    ]


def decoded(x: torch.Tensor, spec: str) -> torch.Tensor:
    codec = flashcomm.codec(spec)
    return kernels.decode(kernels.encode(x, codec), codec, cols=x.shape[-1], dtype=x.dtype)


def summed(parts: list[torch.Tensor], spec: str) -> torch.Tensor:
    return flashcomm.simulate.all_reduce(parts, spec, "one_step")


def on_ranks(dtypes: tuple[torch.dtype, ...] = values.DTYPES):
    size, rank = dist.get_world_size(), dist.get_rank()
    for dtype in dtypes:
        for spec in SPECS:
            if spec == "lossless" and dtype != torch.bfloat16:
                continue
            for sizes in sizes_of(size):
                edges = [sum(sizes[:r]) for r in range(size + 1)]
                mine = promises.tensor(rank, (sizes[rank], 256), dtype)
                got = flashcomm.all_gather(mine, spec, output_split_sizes=sizes)
                everyone = torch.cat([promises.tensor(r, (n, 256), dtype) for r, n in enumerate(sizes)])
                compressed = size > 1 and spec != "none"
                assert promises.same(got, decoded(everyone, spec) if compressed else everyone), (spec, dtype, sizes)

                # Small whole numbers without -0, whose plain sum is exact in any order.
                parts = [promises.tensor(r, (edges[-1], 256), dtype).mul(4).round() + 0 for r in range(size)]
                got = flashcomm.reduce_scatter(parts[rank], spec, input_split_sizes=sizes)
                total = summed(parts, spec) if compressed else torch.stack(parts).float().sum(0).to(dtype)
                want = total[edges[rank] : edges[rank + 1]]
                assert promises.same(got, want), (spec, dtype, sizes)


@pytest.mark.parametrize("by", ranks.WAYS)
@pytest.mark.parametrize("world_size", [1, thorough(2), 3])
def test_on_ranks(world_size, by):
    dtypes = values.DTYPES if world_size == 3 and by == "connections" else (torch.bfloat16,)
    ranks.shared(world_size, by=by).run(on_ranks, dtypes)


def shapes_on_ranks() -> dict:
    """Three dimensions, a caller's result, a handle, and what is counted."""
    rank, sizes = dist.get_rank(), [1, 3]
    x = promises.tensor(rank, (sizes[rank], 2, 40))
    flashcomm.reset_stats()
    got = flashcomm.all_gather(x, "int8g128", output_split_sizes=sizes)
    stats = flashcomm.stats()
    assert got.shape == (4, 2, 40)
    out = torch.empty_like(got)
    assert flashcomm.all_gather(x, "int8g128", output_split_sizes=sizes, out=out) is out
    assert promises.same(out, got)
    work = flashcomm.all_gather(x, "int8g128", output_split_sizes=sizes, async_op=True)
    assert promises.same(work.wait(), got)
    part = flashcomm.reduce_scatter(got, "fp32", input_split_sizes=sizes)
    assert promises.same(
        part, (2 * got.float()).to(got.dtype)[:1] if rank == 0 else (2 * got.float()).to(got.dtype)[1:]
    )
    return stats


def test_shapes_and_counts():
    first, second = ranks.shared(2, by="connections").run(shapes_on_ranks)
    row_bytes = flashcomm.codec("int8g128").payload_bytes(40)
    assert first["calls"] == second["calls"] == {"all_gather/one_step/int8g128": 1}
    assert (first["wire_bytes"], second["wire_bytes"]) == (2 * row_bytes, 6 * row_bytes)
    assert (first["plain_bytes"], second["plain_bytes"]) == (2 * 40 * 2, 6 * 40 * 2)


def refused_on_ranks() -> str:
    rank, x = dist.get_rank(), torch.ones(4, 8)
    calls = [
        (lambda: flashcomm.all_gather(x, output_split_sizes=[4]), r"must be 2 non-negative numbers of rows, not \[4\]"),
        (lambda: flashcomm.all_gather(x, output_split_sizes=[5, 5]), r"gives rank \d other than its 4 rows"),
        (lambda: flashcomm.all_gather(torch.ones(4), output_split_sizes=[4, 4]), "at least 2 dimensions"),
        (lambda: flashcomm.reduce_scatter(x, input_split_sizes=[1, 2]), "that add up to 4"),
        (lambda: flashcomm.reduce_scatter(torch.ones(()), input_split_sizes=[1, 0]), "at least 2 dimensions"),
        (lambda: flashcomm.reduce_scatter(x, input_split_sizes=[5, -1]), "non-negative"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    # Ranks that differ about the parts would write over each other's.
    sizes = [1, 3] if rank else [3, 1]
    with pytest.raises(RanksDisagree) as raised:
        flashcomm.reduce_scatter(x, "int8g128", input_split_sizes=sizes)
    # The group is still usable, equal parts are the same as none, and many ranks' sizes are compared by their digest.
    even = flashcomm.reduce_scatter(x, "fp32", input_split_sizes=[2, 2])
    assert promises.same(even, flashcomm.reduce_scatter(x, "fp32"))
    return str(raised.value)


def test_wrong_sizes_are_refused_and_different_ones_found():
    for message in ranks.shared(2, by="connections").run(refused_on_ranks):
        assert "rank 0 calls op=reduce_scatter" in message
        assert "shape=3+1x8" in message
        assert "shape=1+3x8" in message


def test_sizes_of_many_ranks_are_compared_by_their_digest():
    from flashcomm.collectives.call import _contract
    from flashcomm.collectives.rules import ALL_GATHER

    codec, x = flashcomm.codec("int8g128"), torch.ones(4, 8)
    found = {_contract(ALL_GATHER, "one_step", codec, x, [1000 + r for r in range(128)] + [n]) for n in (0, 1)}
    assert len(found) == 2
    assert all(len(text) < 200 for text in found)


def a_graph_on_ranks() -> bool:
    rank, sizes = dist.get_rank(), [1, 3]

    @torch.compile(fullgraph=True, backend="eager")
    def program(x):
        everyone = flashcomm.all_gather(x, "int8g128", output_split_sizes=sizes)
        return flashcomm.reduce_scatter(everyone, "int8g128", input_split_sizes=sizes)

    x = promises.tensor(rank, (sizes[rank], 64))
    everyone = flashcomm.all_gather(x, "int8g128", output_split_sizes=sizes)
    return promises.same(program(x), flashcomm.reduce_scatter(everyone, "int8g128", input_split_sizes=sizes))


def test_in_a_compiled_graph():
    assert ranks.shared(2, by="connections").run(a_graph_on_ranks) == [True, True]
