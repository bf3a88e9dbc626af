"""DTensor's tensor and sequence parallelism with compressed collectives, against torch's own classes."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, parallel

import flashcomm
import promises
import ranks
from flashcomm.integrations import dtensor
from flashcomm.integrations.dtensor import ColwiseParallel, PrepareModuleInput, RowwiseParallel, redistribute


class Block(torch.nn.Module):
    """Two linears with biases, which must be added once; of whole numbers, which add up alike in any order."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(256, 512)
        self.down = torch.nn.Linear(512, 256)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randint(-3, 4, parameter.shape, generator=generator).float()

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole(tokens=5) -> torch.Tensor:
    return torch.randint(-4, 5, (3, tokens, 256), generator=torch.Generator().manual_seed(1)).float()


@torch.no_grad()
def tensor_parallel():
    """Values as they are give torch's own bits; codecs give those that one process predicts."""
    plain = parallel.parallelize_module(
        Block(), mesh(), {"up": parallel.ColwiseParallel(), "down": parallel.RowwiseParallel()}
    )
    want = plain(whole())
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(codec="fp32", algorithm="two_step")}
    exact = parallel.parallelize_module(Block(), mesh(), plan)(whole())
    assert type(exact) is torch.Tensor
    assert promises.same(exact, want)
    flashcomm.reset_stats()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(codec="int8g128", algorithm="one_step")}
    lossy = parallel.parallelize_module(Block(), mesh(), plan)(whole())
    assert flashcomm.stats()["calls"] == {"all_reduce/one_step/int8g128": 1}
    assert not torch.equal(lossy, want)
    partial = DTensor.from_local(promises.tensor(dist.get_rank(), (3, 5, 256)), mesh(), [Partial()])
    xs = [promises.tensor(rank, (3, 5, 256)) for rank in range(2)]
    got = redistribute(partial, (Replicate(),), "int4g32", "two_step")
    assert promises.same(got.to_local(), flashcomm.simulate.all_reduce(xs, "int4g32", "two_step"))


@torch.no_grad()
def sequence_parallel(tokens, dim):
    """Reduce-scatter after the row-wise linear, all-gather before the column-wise one; shards need not be equal."""

    def run(up, down):
        x = distribute_tensor(whole(tokens), mesh(), [Shard(dim)])
        block = parallel.parallelize_module(Block(), mesh(), {"up": up, "down": down})
        return block(x)

    shard = {"output_layouts": Shard(dim), "use_local_output": False}
    # Without torch's own classes, which cannot do this before torch 2.13.
    want = distribute_tensor(Block()(whole(tokens)), mesh(), [Shard(dim)])
    flashcomm.reset_stats()
    got = run(ColwiseParallel(codec="fp32", input_layouts=Shard(dim)), RowwiseParallel(codec="fp32", **shard))
    assert flashcomm.stats()["calls"] == {"all_gather/one_step/fp32": 1, "reduce_scatter/one_step/fp32": 1}
    assert (got.shape, got.placements) == (want.shape, want.placements)
    assert promises.same(got.to_local(), want.to_local())
    lossy = run(ColwiseParallel(codec="int8g128", input_layouts=Shard(dim)), RowwiseParallel(codec="int4g32", **shard))
    assert not torch.equal(lossy.to_local(), want.to_local()) or not lossy.to_local().numel()
    everyone = redistribute(lossy, (Replicate(),), "int5g128").to_local()
    assert everyone.shape == (3, tokens, 256)
    assert all(promises.same(everyone, theirs) for theirs in promises.everyone(everyone))


def gradients_of(up, down, x: torch.Tensor) -> list[torch.Tensor]:
    """This rank's parts of the gradients of a block's parameters, and those of its input."""
    block = parallel.parallelize_module(Block(), mesh(), {"up": up, "down": down})
    x.requires_grad_()
    y = block(x)
    (y.square() / 2).sum().backward()
    return [gradient.to_local() for gradient in (block.up.weight.grad, block.down.weight.grad)] + [x.grad]


def is_close(ours, theirs) -> bool:
    """Sums of whole numbers beyond 2**24, which differ in their last bits."""
    return all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(ours, theirs, strict=True))


def training(tokens, dim):
    """Gradients in fp32 are those of one process, also where shards are uneven; codecs act where they were asked."""
    want, x = Block(), whole(tokens).requires_grad_()
    (want(x).square() / 2).sum().backward()
    rank, shard = dist.get_rank(), Shard(dim)
    up, down = want.up.weight.grad.chunk(2)[rank], want.down.weight.grad.chunk(2, 1)[rank]

    fp32 = {"codec": "fp32", "gradients": "fp32"}
    flashcomm.reset_stats()
    got = gradients_of(ColwiseParallel(**fp32), RowwiseParallel(**fp32), whole(tokens))
    assert sum(flashcomm.stats()["calls"].values()) == 2, flashcomm.stats()
    assert is_close(got, [up, down, x.grad])

    for given, codecs in (
        (fp32, {"fp32": 2}),
        ({"codec": "fp32", "gradients": "int8g128"}, {"fp32": 1, "int8g128": 1}),
    ):
        flashcomm.reset_stats()
        part = distribute_tensor(whole(tokens), mesh(), [shard])
        styles = ColwiseParallel(**given, input_layouts=shard), RowwiseParallel(**given, output_layouts=shard)
        *ours, mine = gradients_of(*styles, part)
        assert flashcomm.stats()["calls"] == {
            f"{verb}/one_step/{codec}": calls
            for verb in ("all_gather", "reduce_scatter")
            for codec, calls in codecs.items()
        }, flashcomm.stats()
        assert is_close([*ours, mine.full_tensor()], [up, down, x.grad]) == (given is fp32)


@torch.no_grad()
def shared_input():
    """Several column-wise linears have one input, which is gathered once."""
    plan = {
        "": PrepareModuleInput(codec="fp32", input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(codec="fp32"),
    }
    block = Block()
    prepare = plan.pop("")
    parallel.parallelize_module(block, mesh(), plan)
    parallel.parallelize_module(block, mesh(), prepare)
    flashcomm.reset_stats()
    got = block(whole(6).chunk(2, 1)[dist.get_rank()])
    assert flashcomm.stats()["calls"]["all_gather/one_step/fp32"] == 1
    want = parallel.parallelize_module(
        Block(), mesh(), {"up": parallel.ColwiseParallel(), "down": parallel.RowwiseParallel()}
    )(whole(6))
    assert promises.same(got, want)


@torch.no_grad()
def what_stays_plain():
    """Layouts that codecs cannot serve are torch's, and counted."""
    rank = dist.get_rank()
    flashcomm.reset_stats()
    x = DTensor.from_local(torch.ones(4, 6), mesh(), [Shard(-1)])
    assert redistribute(x, (Replicate(),), "int4").to_local().shape == (4, 12)
    x = DTensor.from_local(torch.full((2, 3), rank + 1), mesh(), [Partial()])
    assert redistribute(x, (Replicate(),), "int4").to_local().unique().tolist() == [3]
    x = DTensor.from_local(torch.full((2, 3), rank + 1.0), mesh(), [Partial("max")])
    assert redistribute(x, (Replicate(),), "int4").to_local().unique().tolist() == [2]
    embedding = torch.nn.Embedding(8, 16)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.nn.init.normal_(embedding.weight)
    weight = embedding.weight.detach().clone()
    parallel.parallelize_module(embedding, mesh(), RowwiseParallel(codec="int4", input_layouts=Replicate()))
    assert torch.equal(embedding(torch.arange(8)), weight)
    stats = flashcomm.stats()
    assert stats["calls"] == {}
    reasons = list(stats["plain"])
    assert reasons[:3] == [
        "shards of the last dimension",
        "dtype torch.int64",
        f"the layout {Partial('max')} is no plain sum",
    ]
    assert len(reasons) == 4
    assert "is no plain sum" in reasons[3]
    # Nothing moves, so nothing is counted.
    y = distribute_tensor(torch.ones(4, 6), mesh(), [Replicate()])
    assert redistribute(y, (Shard(0),), "int4").to_local().shape == (2, 6)
    assert redistribute(y, y.placements, "int4") is y
    assert flashcomm.stats()["plain"] == stats["plain"]


def refusals():
    with pytest.raises(ValueError, match="unknown codec 'int9'"):
        RowwiseParallel(codec="int9")
    with pytest.raises(ValueError, match=r"int4g128\+keep64 needs a calibration, which these classes cannot bind"):
        ColwiseParallel(codec="int4+keep64")
    block = parallel.parallelize_module(Block(), mesh(), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    with pytest.raises(ValueError, match="flashcomm is for inference and would cut the gradient"):
        block(whole())
    partial = DTensor.from_local(torch.ones(4, 128), mesh(), [Partial()])
    with torch.no_grad(), pytest.raises(ValueError, match="only all_reduce can be two_step"):
        redistribute(partial, (Shard(0),), "int4", "two_step")


@pytest.mark.parametrize(
    "function", [tensor_parallel, shared_input, what_stays_plain, refusals], ids=lambda f: f.__name__
)
def test_on_ranks(function):
    ranks.shared(2).run(function)


@pytest.mark.parametrize("dim", [0, 1, -2])
def test_sequence_parallel(dim):
    # Shards of 3 and 2, of 2 and 1, and one that is empty.
    for tokens in (5, 1):
        ranks.shared(2).run(sequence_parallel, tokens, dim)


def test_training():
    # Shards of 3 and 2, and one that is empty.
    for tokens, dim in ((5, 1), (1, -2)):
        ranks.shared(2).run(training, tokens, dim)


def test_the_classes_are_those_of_torch():
    for name in ("RowwiseParallel", "ColwiseParallel", "PrepareModuleInput"):
        assert issubclass(getattr(dtensor, name), getattr(parallel, name))
