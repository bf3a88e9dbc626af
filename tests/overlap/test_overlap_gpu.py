"""Prompts in parts on GPUs: the answers of unsplit ones, over NCCL and its streams."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("greenlet", reason="pip install greenlet")
import flashcomm
import promises
from flashcomm.demo import MODEL
from flashcomm.integrations.transformers import compressed
from flashcomm.overlap import prefill

pytestmark = pytest.mark.gpu


@torch.inference_mode()
def on_cuda():
    """Plain and compressed sums, eager attention: in parts within the noise of other matrix products."""
    from flashcomm.models.load import load_model

    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    model = load_model(MODEL, torch.float32)
    model.set_attn_implementation("eager")
    torch.backends.cuda.matmul.allow_tf32 = False
    ids = torch.randint(2, 4000, (2, 600), generator=torch.Generator().manual_seed(3)).cuda()
    for codec, algorithm in (("none", "plain"), ("fp32", "two_step")):
        with compressed(model, codec, algorithm=algorithm):
            want = model(ids, use_cache=False).logits
            for parts in (2, 3, "auto", "auto"):
                with prefill(model, parts):
                    got = model(ids, use_cache=False).logits
                assert all(promises.same(got.cpu(), theirs) for theirs in promises.everyone(got.cpu()))
                assert (got - want).abs().max() < 256 * torch.finfo(torch.float32).eps * want.abs().max()
    return flashcomm.stats()["prefills"]


@pytest.mark.parametrize("world_size", [2, 4])
def test_on_cuda(world_size, fresh_ranks):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"{world_size} ranks need as many GPUs, and there are {torch.cuda.device_count()}")
    counts = fresh_ranks(world_size, backend="nccl").run(on_cuda)
    assert counts == [counts[0]] * world_size
