"""All-reduces in one launch, on real processes that map each other's memory, in Triton's interpreter."""

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
from flashcomm import codecs

pytest.importorskip("triton")

SIZE_BYTES = 1 << 18


def meet(folder, name, blocks=2, patience=1 << 30, size_bytes=SIZE_BYTES):
    """The memory of all ranks, files of `folder`, as this rank sees it."""
    from flashcomm.kernels import fused

    rank, size = dist.get_rank(), dist.get_world_size()
    memory = [
        torch.from_file(f"{folder}/{name}{r}", shared=True, size=size_bytes, dtype=torch.uint8) for r in range(size)
    ]
    dist.barrier()
    peers = fused.Peers(
        rank=rank,
        buffers=torch.tensor([part.data_ptr() for part in memory]),
        size_bytes=size_bytes,
        epochs=torch.zeros(blocks, dtype=torch.int32),
        lost=torch.zeros(1, dtype=torch.int32),
        patience=patience,
    )
    return peers, memory


def sums_are_those_of_the_simulation(folder):
    import warnings

    from flashcomm.kernels import fused

    warnings.simplefilter("ignore", RuntimeWarning)
    rank, size = dist.get_rank(), dist.get_world_size()
    peers, memory = meet(folder, "same")
    cases = [
        ("int4g128", (5, 512), torch.bfloat16),
        ("int2g32+spike:int8g128", (3, 2048), torch.float32),
        ("nvfp4", (7, 256), torch.float16),
        ("fp32:mxfp4", (2, 384), torch.bfloat16),
    ]
    for again in range(2):
        for spec, shape, dtype in cases:
            codec = codecs.parse(spec)
            for algorithm in ("two_step", *(["one_step"] if codec.steps[0] == codec.steps[1] else [])):
                xs = [promises.tensor(r, shape, dtype, seed=again) for r in range(size)]
                out = torch.empty_like(xs[rank])
                fused.all_reduce(xs[rank], codec, peers, out, algorithm)
                want = flashcomm.simulate.all_reduce(xs, spec, algorithm)
                assert promises.same(out, want), (spec, algorithm, again)
    del memory


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_sums_are_those_of_the_simulation(world_size, tmp_path):
    ranks.shared(world_size).run(sums_are_those_of_the_simulation, str(tmp_path))
