"""The same collectives on CUDA tensors: over gloo, and over NCCL where it accepts the ranks that there are GPUs for.

NCCL before 2.30 refuses several ranks on one GPU; there the transport of its route runs between ranks of one process.
"""

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
import values
from events import dawdle
from flashcomm.collectives.algorithms import ALGORITHMS

pytestmark = pytest.mark.gpu


def on_cuda():
    """Every algorithm's bits on CUDA are those of the CPU simulation; asynchronous calls run on a side stream."""
    size, rank = dist.get_world_size(), dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    for spec in promises.CODECS:
        for algorithm in promises.algorithms(spec):
            for dtype in values.DTYPES:
                xs = [promises.tensor(r, (9, 300), dtype) for r in range(size)]
                want = xs[0] if size == 1 else flashcomm.simulate.all_reduce(xs, spec, algorithm)
                x = xs[rank].to(device)
                got = flashcomm.all_reduce(x, spec, algorithm=algorithm)
                assert promises.same(got.cpu(), want), (spec, algorithm, dtype)
                work = flashcomm.all_reduce(x, spec, algorithm=algorithm, async_op=True)
                assert promises.same(work.wait().cpu(), want), (spec, algorithm, dtype, "async")
    x = promises.tensor(rank, (size * 2, 256)).to(device)
    parts = [promises.tensor(r, (size * 2, 256)) for r in range(size)]
    if size > 1:
        codec = flashcomm.codec("int8g128")
        decoded = torch.cat([codec.decode(codec.encode(p), 256, p.dtype) for p in parts])
        assert promises.same(flashcomm.all_gather(x).cpu(), decoded)
    scattered = flashcomm.reduce_scatter(x, "fp32")
    total = sum(p.float() for p in parts).bfloat16()
    assert promises.same(scattered.cpu(), total[2 * rank : 2 * rank + 2])
    flashcomm.all_to_all(x, "int4g32")
    return torch.cuda.get_device_name(device)


def starts():
    x = torch.ones(4, device="cuda")
    dist.all_reduce(x)
    torch.cuda.synchronize()
    return x[0].item()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_on_cuda(backend, world_size, fresh_ranks):
    group = fresh_ranks(world_size, backend=backend)
    try:
        group.run(starts)
    except ranks.RankFailed as error:
        pytest.skip(
            f"{backend} does not serve {world_size} ranks on {torch.cuda.device_count()} GPU: {str(error)[-200:]}"
        )
    group.run(on_cuda)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_transport_of_nccls_route_on_one_gpu(world_size):
    sums_over_bulk_operations("cuda", world_size)


def sums_over_bulk_operations(device, world_size):
    """Every algorithm's bits, in one piece and in several, with kernels of `device`."""
    from loopback import Loopback

    for spec in promises.CODECS:
        codec = flashcomm.codec(spec)
        for algorithm in promises.algorithms(spec):
            xs = [promises.tensor(r, (9, 300)) for r in range(world_size)]
            want = flashcomm.simulate.all_reduce(xs, spec, algorithm)
            for pieces in (1, 3):

                def summed(rank, messages, xs=xs, algorithm=algorithm, codec=codec, pieces=pieces):
                    x = xs[rank].to(device)
                    out = torch.empty_like(x)
                    ALGORITHMS[algorithm](x, out, codec, messages, pieces)
                    return out.cpu()

                for got in Loopback(world_size, bulk=True).run(summed):
                    assert promises.same(got, want), (spec, algorithm, pieces)


def in_one_launch():
    """The simulation's bits in one launch, eager and in a graph whose inputs change, each rank at its own pace."""
    import random

    from flashcomm.collectives.group import group_of

    size, rank = dist.get_world_size(), dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    met = group_of(None).meet(device)
    if met.carrier != "symmetric memory":
        return met.why_not["symmetric memory"]
    for spec in ("int8g128", "int4g128", "int4g32", "mxfp4", "int2g32+spike", "nvfp4", "int4g128:int8g128"):
        for algorithm in promises.algorithms(spec):
            for shape in ((1, 4096), (33, 4096), (7, 384)):
                xs = [promises.tensor(r, shape) for r in range(size)]
                got = flashcomm.all_reduce(xs[rank].to(device), spec, algorithm=algorithm)
                want = flashcomm.simulate.all_reduce(xs, spec, algorithm)
                assert promises.same(got.cpu(), want), (spec, algorithm, shape)
    x = torch.zeros(16, 4096, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        flashcomm.all_reduce(x, "int4g128", algorithm="two_step")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashcomm.all_reduce(x, "int4g128", algorithm="two_step")
    delays = random.Random(rank)
    for replay in range(100):
        xs = [promises.tensor(r, x.shape, seed=replay) for r in range(size)]
        x.copy_(xs[rank])
        dawdle(delays.choice((0, 0, 1000)))
        graph.replay()
        assert promises.same(out.cpu(), flashcomm.simulate.all_reduce(xs, "int4g128", "two_step")), replay
    return ""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_in_one_launch(world_size, fresh_ranks):
    env = {"FLASHCOMM_FUSED": "1", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    refusals = set(fresh_ranks(world_size, env=env).run(in_one_launch))
    if refusals != {""}:
        pytest.skip(f"no symmetric memory for {world_size} ranks: {refusals}")
