"""The same collectives on CUDA tensors: over gloo, and over NCCL where it accepts the ranks that there are GPUs for."""

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
import values

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
