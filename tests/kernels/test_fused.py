"""All-reduces in one launch, on real processes that map each other's memory, in Triton's interpreter."""

import os

import pytest
import torch
import torch.distributed as dist

import flashcomm
import formats
import promises
import ranks
from events import dawdle
from flashcomm import codecs
from thorough import thorough

pytest.importorskip("triton")
import interpreter
from flashcomm.kernels import gpu

interpreter.hasten()

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="kernels are compiled for this GPU, and these ranks share CPU memory: set TRITON_INTERPRET=1",
)

SIZE_BYTES = 1 << 18


def meet(folder, name, blocks=2, patience=1 << 30, size_bytes=SIZE_BYTES):
    """The memory of all ranks, files of `folder`, as this rank sees it."""
    from flashcomm.transports.symmetric import launch as fused

    rank, size = dist.get_rank(), dist.get_world_size()
    memory = [
        torch.from_file(f"{folder}/{name}{r}", shared=True, size=size_bytes, dtype=torch.uint8) for r in range(size)
    ]
    dist.barrier()
    peers = fused.Peers(
        rank=rank,
        buffers=torch.tensor([part.data_ptr() for part in memory]),
        size_bytes=size_bytes,
        epochs=torch.zeros(2, blocks, dtype=torch.int32),
        lost=torch.zeros(1, dtype=torch.int32),
        patience=patience,
    )
    return peers, memory


def sums_are_those_of_the_simulation(folder):
    import warnings

    from flashcomm.transports.symmetric import launch as fused

    warnings.simplefilter("ignore", RuntimeWarning)
    rank, size = dist.get_rank(), dist.get_world_size()
    # One program of three ranks has flags that end between multiples of 16 bytes.
    peers, memory = meet(folder, "same", blocks=1 if size == 3 else 2)
    cases = [
        ("int4g128", (5, 512), torch.bfloat16),
        ("int2g32+spike:int8g128", (3, 2048), torch.float32),
        ("nvfp4", (4, 256), torch.float16),
        ("fp32:mxfp4", (2, 384), torch.bfloat16),
    ][: 2 if size > 3 else 4]
    for spec, shape, dtype in cases:
        codec = codecs.parse(spec)
        for algorithm in ("two_step", *(["one_step"] if codec.formats[0] == codec.formats[1] else [])):
            xs = [promises.tensor(r, shape, dtype) for r in range(size)]
            out = torch.empty_like(xs[rank])
            fused.all_reduce(xs[rank], codec, peers, out, algorithm)
            want = flashcomm.simulate.all_reduce(xs, spec, algorithm)
            assert promises.same(out, want), (spec, algorithm)
    del memory


@pytest.mark.parametrize("world_size", [thorough(2), 3, thorough(4)])
def test_sums_are_those_of_the_simulation(world_size, tmp_path):
    ranks.shared(world_size).run(sums_are_those_of_the_simulation, str(tmp_path))


def calls_without_end(folder, count):
    """Ranks that come late in turn, a memory that takes several launches, and inputs that change."""
    import random
    import warnings

    from flashcomm.transports.symmetric import launch as fused

    warnings.simplefilter("ignore", RuntimeWarning)
    rank, size = dist.get_rank(), dist.get_world_size()
    codec, delays = codecs.parse("int8g128"), random.Random(rank)
    # Room for four rows of the seven.
    room = fused.needed_bytes("two_step", 4, 128, codec, size)
    peers, memory = meet(folder, "end", blocks=2, size_bytes=8 * size * 2 + 2 * room + 64)
    x = torch.empty(7, 128)
    for call in range(count):
        x.copy_(promises.tensor(rank, x.shape, torch.float32, seed=call))
        dawdle(delays.choice((0, 0, 20_000)))
        algorithm = ("two_step", "one_step")[call % 2]
        fused.all_reduce(x, codec, peers, x, algorithm)
        xs = [promises.tensor(r, x.shape, torch.float32, seed=call) for r in range(size)]
        assert promises.same(x, flashcomm.simulate.all_reduce(xs, codec, algorithm)), call
    assert len(set(peers.epochs[0].tolist())) == 1
    assert peers.epochs[0, 0] > count, "one launch held all rows"
    del memory


def test_calls_follow_each_other_at_any_pace(tmp_path):
    ranks.shared(2).run(calls_without_end, str(tmp_path), 8)


def epochs_overflow(folder):
    import warnings

    from flashcomm.transports.symmetric import launch as fused

    warnings.simplefilter("ignore", RuntimeWarning)
    peers, memory = meet(folder, "over", blocks=1)
    rank, size = dist.get_rank(), dist.get_world_size()
    peers.epochs[0].fill_(2**31 - 2)
    for part in memory:
        part[: 8 * size].view(torch.int32).fill_(2**31 - 2)
    dist.barrier()
    for call in range(4):
        xs = [promises.tensor(r, (2, 128), torch.float32, seed=call) for r in range(size)]
        out = torch.empty_like(xs[0])
        fused.all_reduce(xs[rank], codecs.parse("int8g128"), peers, out, "two_step")
        assert promises.same(out, flashcomm.simulate.all_reduce(xs, "int8g128", "two_step"))
    assert peers.epochs[0, 0] < 0


def test_epochs_may_overflow(tmp_path):
    ranks.shared(2).run(epochs_overflow, str(tmp_path))


def one_rank_stays_away(folder):
    import warnings

    from flashcomm.transports.symmetric import launch as fused

    warnings.simplefilter("ignore", RuntimeWarning)
    peers, memory = meet(folder, "away", blocks=1, patience=50)
    message = ""
    if dist.get_rank() == 0:
        x = torch.ones(2, 128)
        fused.all_reduce(x, codecs.parse("int8g128"), peers, torch.empty_like(x), "two_step")
        with pytest.raises(RuntimeError) as raised:
            fused.all_reduce(x, codecs.parse("int8g128"), peers, torch.empty_like(x), "two_step")
        message = str(raised.value)
    dist.barrier()
    del memory
    return message


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_stays_away_is_an_error_of_the_next_call(world_size, tmp_path):
    """It names the one that was waited for, not one that was not there either when nobody waited any more."""
    message, *_ = ranks.shared(world_size).run(one_rank_stays_away, str(tmp_path))
    assert message == "rank 1 did not come while rank 0 waited for it in an earlier call"


@pytest.mark.parametrize(
    ("cols", "spec", "length"),
    [
        (4096, "int4g128", 2048),
        (5120, "int4g128", 1024),
        (2880, "int8g64", 960),
        (300, "int8g128", 300),
        (7, "fp32", 7),
    ],
)
def test_rows_are_cut_into_tiles(cols, spec, length):
    from flashcomm.transports.symmetric import launch as fused

    assert fused.row_length(cols, codecs.parse(spec)) == length


HIDDEN = (64, 96, 576, 768, 1024, 1536, 2048, 2560, 2880, 3072, 4096, 5120, 6144, 7168, 8192, 12288, 16384)


@pytest.mark.parametrize("spec", [*formats.SPECS, "int4g128:int8g128", "nvfp4:fp8g128", "bf16", "fp32:mxfp4"])
def test_a_tile_covers_its_row(spec):
    """A column beyond the tile would be neither sent nor written."""
    from flashcomm.transports.symmetric import launch as fused

    codec = codecs.parse(spec)
    if any(gpu.why_not(single) for single in codec.formats):
        pytest.skip("no kernel for it, so no launch")
    lengths = [length for cols in HIDDEN if (length := fused.row_length(cols, codec))]
    assert lengths
    assert all(fused.tile_of(codec, length) >= length for length in lengths)


def wide_rows(folder):
    """Rows for which the tile that suits the codec's kernels is too short."""
    import warnings

    from flashcomm.transports.symmetric import launch as fused

    warnings.simplefilter("ignore", RuntimeWarning)
    peers, memory = meet(folder, "wide", size_bytes=1 << 19)
    for spec, shape in (("nvfp4", (2, 4096)), ("int8g128", (2, 2880))):
        xs = [promises.tensor(rank, shape) for rank in range(dist.get_world_size())]
        out = torch.full_like(xs[0], 7.0)
        fused.all_reduce(xs[peers.rank], codecs.parse(spec), peers, out, "two_step")
        assert promises.same(out, flashcomm.simulate.all_reduce(xs, spec, "two_step")), spec
    del memory


def test_all_columns_of_wide_rows_are_summed(tmp_path):
    ranks.shared(2).run(wide_rows, str(tmp_path))


def a_replay_after_a_loss(folder):
    """A graph replays launches, and no host looks at what they found."""
    import warnings

    from flashcomm.transports.symmetric import launch as fused

    warnings.simplefilter("ignore", RuntimeWarning)
    peers, memory = meet(folder, "replay", blocks=1)
    if dist.get_rank() == 0:
        peers.lost[0] = 2
        x, check = torch.ones(2, 128), fused.check
        fused.check = lambda _: None
        try:
            fused.all_reduce(x, codecs.parse("int8g128"), peers, torch.empty_like(x), "two_step")
        finally:
            fused.check = check
        with pytest.raises(RuntimeError, match="rank 1 did not come"):
            fused.check(peers)
    dist.barrier()
    del memory


def test_a_replay_does_not_wait_for_a_rank_that_is_lost(tmp_path):
    """With the patience of minutes."""
    ranks.shared(2).run(a_replay_after_a_loss, str(tmp_path))


def a_launch_beside_another(folder):
    """As if a graph's replay, which no host sees, ran on another stream."""
    import warnings

    from flashcomm.errors import CollectiveError
    from flashcomm.transports.symmetric import launch as fused

    warnings.simplefilter("ignore", RuntimeWarning)
    peers, memory = meet(folder, "beside", blocks=2)
    x, codec = torch.ones(2, 128), codecs.parse("int8g128")
    fused.all_reduce(x, codec, peers, torch.empty_like(x), "two_step")
    fused.check(peers)
    assert peers.epochs.tolist() == [[1, 1], [0, 0]]
    peers.epochs[1, 0] = 1
    fused.all_reduce(x, codec, peers, torch.empty_like(x), "one_step")
    with pytest.raises(CollectiveError, match="two launches of rank . ran at the same time"):
        fused.check(peers)
    dist.barrier()
    del memory


def test_launches_that_run_at_the_same_time_are_an_error_of_the_next_call(tmp_path):
    ranks.shared(2).run(a_launch_beside_another, str(tmp_path))


def launches(folder) -> list[str]:
    """Devices that were made current for launches."""
    import warnings
    from contextlib import nullcontext

    from flashcomm.kernels.gpu import launch
    from flashcomm.transports.symmetric import launch as fused

    warnings.simplefilter("ignore", RuntimeWarning)
    peers, memory = meet(folder, "device", blocks=1)
    seen, kept = [], launch.on_device
    launch.on_device = gpu.on_device = lambda x: seen.append(str(x.device)) or nullcontext()
    try:
        x = torch.ones(2, 128)
        fused.all_reduce(x, codecs.parse("int8g128"), peers, torch.empty_like(x), "two_step")
        payload = torch.empty(2, 132, dtype=torch.uint8)
        gpu.encode(x, codecs.parse("int8g128"), payload)
        gpu.decode_sum_add_norm(
            payload[None], codecs.parse("int8g128"), x, torch.ones(128), 1e-6, torch.empty_like(x), torch.empty_like(x)
        )
    finally:
        launch.on_device = gpu.on_device = kept
    del memory
    return seen


def test_kernels_are_launched_on_the_device_of_their_tensors(tmp_path):
    assert ranks.shared(2).run(launches, str(tmp_path)) == [["cpu"] * 3] * 2


def test_rows_that_do_not_fit_into_a_tile_have_no_length():
    from flashcomm.transports.symmetric import launch as fused

    assert fused.row_length(20480, codecs.parse("nvfp4")) is None
