"""Gradients through the backend "flashcomm": torch's own tensor parallel styles."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import parallel

import flashcomm
import promises
import ranks

TWO_STEP = "all_reduce/two_step/int8g128"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    policy = tmp_path_factory.mktemp("policy") / "policy.toml"
    policy.write_text('codec = "int8g128"\nmin_bytes = 0\nalgorithm = "two_step"\n')
    one = ranks.Ranks(2, timeout_s=60, backend="flashcomm", env={"FLASHCOMM_POLICY": str(policy)})
    yield one
    one.close()


def tensor_parallel():
    """Torch's styles learn as in one process, but for the codec; parameters of all ranks stay equal."""

    def trained(over_ranks: bool) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        first, up, down = torch.nn.Linear(64, 64), torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
        block = torch.nn.Sequential(first, up, torch.nn.GELU(), down)
        if over_ranks:
            styles = {"1": parallel.ColwiseParallel(), "3": parallel.RowwiseParallel()}
            parallel.parallelize_module(block, init_device_mesh("cpu", (2,)), styles)
        optimizer, losses = torch.optim.SGD(block.parameters(), 2.0), []
        for _ in range(20):
            x = torch.randn(64, 64)
            loss = torch.nn.functional.mse_loss(block(x), x.flip(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, first.weight.detach()

    flashcomm.reset_stats()
    losses, weight = trained(over_ranks=True)
    assert flashcomm.stats()["calls"] == {TWO_STEP: 40}
    assert all(promises.same(weight, theirs) for theirs in promises.everyone(weight))
    plain, exact = trained(over_ranks=False)
    assert not torch.equal(weight, exact)
    assert plain[-1] < 0.8 * plain[0]
    assert abs(losses[-1] - plain[-1]) < 0.01 * plain[-1]


def test_tensor_parallel(pair):
    pair.run(tensor_parallel)
