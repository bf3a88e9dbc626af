"""DistributedDataParallel on the backend "flashcomm": torch's own hooks, uneven batches, mixed ways to wait."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

import flashcomm
import promises
import ranks

TWO_STEP = "all_reduce/two_step/int8g128"
SHAPE = (64, 256)


@pytest.fixture(scope="module", params=["memory", "connections"])
def pair(request, tmp_path_factory):
    policy = tmp_path_factory.mktemp("policy") / "policy.toml"
    policy.write_text('codec = "int8g128"\nmin_bytes = 0\nalgorithm = "two_step"\n')
    env = {"FLASHCOMM_POLICY": str(policy), **ranks.WAYS[request.param]}
    one = ranks.Ranks(2, timeout_s=20, backend="flashcomm", env=env)
    yield one
    one.close()


def total(seed: int) -> torch.Tensor:
    xs = [promises.tensor(rank, SHAPE, torch.float32, seed) for rank in range(2)]
    return flashcomm.simulate.all_reduce(xs, "int8g128", "two_step")


def one_waits_and_the_other_has_a_handle():
    """Both call the same collective; `join` below relies on it."""
    flashcomm.reset_stats()
    rank = dist.get_rank()
    for seed, asynchronous in enumerate((None, 0, 1, 0)):
        x = promises.tensor(rank, SHAPE, torch.float32, seed)
        work = dist.all_reduce(x, async_op=rank == asynchronous)
        if work:
            work.wait()
        assert promises.same(x, total(seed)), asynchronous
    assert flashcomm.stats()["calls"] == {TWO_STEP: 4}


def a_callback_waits_for_the_next_sum():
    """A chain of futures, each of which starts a sum when the one before is there, and waits for it."""
    first, second = (promises.tensor(dist.get_rank(), SHAPE, torch.float32, seed) for seed in range(2))

    def then(future):
        assert promises.same(future.value()[0], total(0))
        return dist.all_reduce(second, async_op=True).get_future().wait()[0]

    assert promises.same(dist.all_reduce(first, async_op=True).get_future().then(then).wait(), total(1))


def train(hook: str, batches: int = 4) -> list[torch.Tensor]:
    """The parameters after `batches` batches of random values, which differ between ranks."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 4))
    model = torch.nn.parallel.DistributedDataParallel(module)
    if hook == "powerSGD":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif hook == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    values = torch.Generator().manual_seed(1 + dist.get_rank())
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    flashcomm.reset_stats()
    with model.join():
        for _ in range(batches):
            optimizer.zero_grad()
            model(torch.randn(8, 64, generator=values)).sum().backward()
            optimizer.step()
    after = [parameter.detach() for parameter in module.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert flashcomm.stats()["calls"][TWO_STEP] >= batches
    return after


def hooks(hook: str):
    for parameter in train(hook):
        assert all(promises.same(parameter, theirs) for theirs in promises.everyone(parameter))


def more_batches_on_a_rank():
    """Who has no more batches answers the sums of who still trains, until nobody does."""
    for parameter in train("", batches=3 + 2 * dist.get_rank()):
        assert all(promises.same(parameter, theirs) for theirs in promises.everyone(parameter))


@pytest.mark.parametrize(
    "function",
    [one_waits_and_the_other_has_a_handle, a_callback_waits_for_the_next_sum, more_batches_on_a_rank],
    ids=lambda f: f.__name__,
)
def test_on_ranks(pair, function):
    pair.run(function)


@pytest.mark.parametrize("hook", ["powerSGD", "fp16"])
def test_hooks_of_torch_train_the_same_model_on_all_ranks(pair, hook):
    pair.run(hooks, hook)
