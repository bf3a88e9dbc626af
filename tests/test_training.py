"""Gradients through the collectives: exact transposes in fp32, and promises that hold backwards."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
import values
from flashcomm import training


def whole(shape, seed: int = 0, alike: bool = False) -> torch.Tensor:
    """Whole numbers, which add up exactly; another on each rank unless `alike`."""
    generator = torch.Generator().manual_seed(100 * seed + (0 if alike else 1 + dist.get_rank()))
    return torch.randint(-9, 10, shape, generator=generator).float()


def total(x: torch.Tensor) -> float:
    return sum(promises.everyone(x.sum().item()))


def is_transpose(function, x: torch.Tensor, weight: torch.Tensor, x_alike: bool = False, y_alike: bool = False) -> bool:
    """Whether <weight, A x> = <A' weight, x>, in sums over ranks; over one rank where all hold the same."""
    x.requires_grad_()
    y = function(x)
    y.backward(weight)
    there, back = total(weight * y.detach()), total(x.grad * x.detach())
    return there / (dist.get_world_size() if y_alike else 1) == back / (dist.get_world_size() if x_alike else 1)


def transposes():
    size, rank = dist.get_world_size(), dist.get_rank()
    for shape in ((2 * size, 3, 5), (size, 4), (size,)):
        part = (shape[0] // size, *shape[1:])
        for codec in ("fp32", "none"):
            same, own = whole(shape, 1, alike=True), whole(shape, 1)
            all_reduce, all_gather = (
                partial(training.all_reduce, codec=codec),
                partial(training.all_gather, codec=codec),
            )
            assert is_transpose(partial(all_reduce, sum_gradients=True), whole(shape), own)
            assert is_transpose(all_reduce, whole(shape), same, y_alike=True)
            assert is_transpose(partial(training.copy, codec=codec), whole(shape, alike=True), own, x_alike=True)
            assert is_transpose(all_gather, whole(part), own)
            assert is_transpose(partial(all_gather, sum_gradients=False), whole(part), same, y_alike=True)
            assert is_transpose(partial(training.reduce_scatter, codec=codec), whole(shape), whole(part, 1))
            if len(shape) > 1:
                assert is_transpose(partial(training.all_to_all, codec=codec), whole(shape), own)
    # The check is one: a gradient that should have been summed, and was not.
    assert not is_transpose(partial(training.all_reduce, codec="fp32"), whole((4, 8)), whole((4, 8), 1))
    # Rank r sends r rows to each of the others, and one to itself.
    to = [1 if peer == rank else rank for peer in range(size)]
    come = [1 if peer == rank else peer for peer in range(size)]
    exchange = partial(training.all_to_all, codec="fp32", input_split_sizes=to, output_split_sizes=come)
    assert is_transpose(exchange, whole((sum(to), 2, 4)), whole((sum(come), 2, 4), 1))
    x = whole((), 3).requires_grad_()
    training.all_gather(x, "fp32").sum().backward()
    assert x.grad.item() == size


def splits_of_one_side():
    """One side names its equal parts, the other leaves them out."""
    size = dist.get_world_size()
    equal = {"output_split_sizes": [2] * size}, {"input_split_sizes": [2] * size}
    for splits in equal:
        exchange = partial(training.all_to_all, codec="fp32", **splits)
        assert is_transpose(exchange, whole((2 * size, 4)), whole((2 * size, 4), 1))


def gradients_of_gradients():
    """The gradient of sum(s**3), s = x_0 + x_1, is 3 s**2; that of |3 s**2|**2 / 2 over R ranks is R 18 s**3."""
    x = whole((2, 4)).requires_grad_()
    y = training.all_reduce(x, "fp32")
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2 / 2).sum(), x)
    # The second pass goes through the transpose's transpose, which sums.
    assert torch.equal(second, 18 * dist.get_world_size() * y.detach() ** 3)


class Mlp(torch.nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.up, self.down = (
            torch.nn.Parameter(torch.randint(-2, 3, shape, generator=generator).float())
            for shape in ((96, 64), (64, 96))
        )

    def forward(self, x):
        return torch.relu(x @ self.up.T) @ self.down.T


def sharded(mlp: Mlp) -> tuple[torch.Tensor, torch.Tensor]:
    size, rank = dist.get_world_size(), dist.get_rank()
    return tuple(
        weight.detach().chunk(size, dim)[rank].clone().requires_grad_() for weight, dim in ((mlp.up, 0), (mlp.down, 1))
    )


def tensor_and_sequence_parallel():
    """The gradients of an MLP over ranks are the rows and columns of those of one process, exactly."""
    size, rank = dist.get_world_size(), dist.get_rank()
    mlp, x = Mlp(), whole((2 * size, 3, 64), alike=True).requires_grad_()
    mlp(x).square().sum().backward()
    want = mlp.up.grad.chunk(size)[rank], mlp.down.grad.chunk(size, 1)[rank]

    up, down = sharded(mlp)
    mine = x.detach().clone().requires_grad_()
    y = training.all_reduce(torch.relu(training.copy(mine, "fp32") @ up.T) @ down.T, "fp32")
    y.square().sum().backward()
    assert all(map(promises.same, (up.grad, down.grad, mine.grad), (*want, x.grad)))

    up, down = sharded(mlp)
    mine = x.detach().chunk(size)[rank].clone().requires_grad_()
    y = training.reduce_scatter(torch.relu(training.all_gather(mine, "fp32") @ up.T) @ down.T, "fp32")
    y.square().sum().backward()
    assert all(map(promises.same, (up.grad, down.grad, mine.grad), (*want, x.grad.chunk(size)[rank])))


def gradient(x: torch.Tensor, spec, group=None, algorithm: str = "auto") -> torch.Tensor:
    """The all-reduce of a backward pass."""
    leaf = torch.zeros_like(x, requires_grad=True)
    training.copy(leaf, spec, group, algorithm=algorithm).backward(x)
    return leaf.grad


def in_backward(promise, codecs: tuple[str, ...]) -> list[str]:
    promises.CODECS, everything = codecs, promises.CODECS
    try:
        return promise(promises.Member(function=gradient))
    finally:
        promises.CODECS = everything


def bounds():
    """Gradients of gathers, scatters and exchanges are within the half steps of those who sent them."""
    size, rank = dist.get_world_size(), dist.get_rank()
    sent = [promises.tensor(r, (4 * size, 256), torch.float32, seed=7) for r in range(size)]
    for spec in ("int4g32", "fp8g128+taco", "ec6"):
        codec = flashcomm.codec(spec)
        allowed = [values.allowed_error(codec.step(x), x, torch.float32) for x in sent]

        x = torch.zeros(4, 256, requires_grad=True)
        training.all_gather(x, "fp32", backward=spec).backward(sent[rank])
        exact = sum(one.double() for one in sent).chunk(size)[rank]
        limit = sum(allowed).chunk(size)[rank] + 2**-22 * sum(one.double().abs() for one in sent).chunk(size)[rank]
        assert ((x.grad - exact).abs() <= limit).all(), spec
        assert not torch.equal(x.grad, exact.float())

        x = torch.zeros(4 * size * size, 256, requires_grad=True)
        training.reduce_scatter(x, "fp32", backward=spec).backward(sent[rank])
        assert ((x.grad - torch.cat(sent)).abs() <= torch.cat(allowed)).all(), spec
        assert all(promises.same(x.grad, theirs) for theirs in promises.everyone(x.grad))

        x = torch.zeros(4 * size, 256, requires_grad=True)
        training.all_to_all(x, "fp32", backward=spec).backward(sent[rank])
        exact, limit = (torch.cat([one.chunk(size)[rank] for one in all_of]) for all_of in (sent, allowed))
        assert ((x.grad - exact).abs() <= limit).all(), spec


def each_direction_has_its_codec():
    x = torch.ones(dist.get_world_size(), 128, requires_grad=True)
    flashcomm.reset_stats()
    training.all_reduce(x, "int8g128", sum_gradients=True, backward="fp32", algorithm="two_step").sum().backward()
    training.reduce_scatter(x, "int4g32", backward="int5g128").sum().backward()
    assert flashcomm.stats()["calls"] == {
        "all_reduce/two_step/int8g128": 1,
        "all_reduce/two_step/fp32": 1,
        "reduce_scatter/one_step/int4g32": 1,
        "all_gather/one_step/int5g128": 1,
    }


def what_is_refused():
    """Before any communication, also of what only the backward pass would do."""
    x = torch.ones(4, 128, requires_grad=True)
    flashcomm.reset_stats()
    with pytest.raises(ValueError, match="flashcomm.training"):
        flashcomm.all_reduce(x)
    with pytest.raises(ValueError, match="unknown codec 'int9'"):
        training.all_reduce(x, "fp32", sum_gradients=True, backward="int9")
    with pytest.raises(ValueError, match="only all_reduce has levels"):
        training.all_gather(x, "fp32", backward="fp32/int4")
    with pytest.raises(ValueError, match=r"int4g128\+keep64 needs to know the features"):
        training.copy(x, "int4+keep64")
    with pytest.raises(ValueError, match="takes a single codec, not the pair"):
        training.all_to_all(x, "fp32", backward="fp32:int4")
    with pytest.raises(ValueError, match="only all_reduce can be two_step"):
        training.reduce_scatter(x, "fp32", algorithm="two_step")
    with pytest.raises(ValueError, match="compresses bf16, fp16 and fp32, not torch.float64"):
        training.copy(x.detach().double().requires_grad_())
    assert flashcomm.stats()["calls"] == {}


def without_gradients():
    """No graph and no check of it: the plain verbs."""
    x = promises.tensor(dist.get_rank(), (4, 128), torch.float32)
    y = training.all_reduce(x, "int8g128", algorithm="two_step")
    assert not y.requires_grad
    assert promises.same(y, flashcomm.all_reduce(x, "int8g128", algorithm="two_step"))
    with torch.no_grad():
        assert training.copy(x.requires_grad_(), "int8g128").grad_fn is None


def in_a_compiled_model():
    """The graph is broken, and the gradients are those of eager mode."""
    weight = whole((64, 64), alike=True)

    def layer(x):
        return training.all_reduce(torch.relu(training.copy(x, "int8g128") @ weight), "int4g32", algorithm="two_step")

    grads = []
    for function in (layer, torch.compile(layer, backend="eager")):
        x = whole((2, 64), alike=True).requires_grad_()
        function(x).square().sum().backward()
        grads.append(x.grad)
    assert promises.same(*grads)


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_are_transposes(size):
    ranks.shared(size).run(transposes)


@pytest.mark.parametrize(
    "function",
    [
        splits_of_one_side,
        gradients_of_gradients,
        tensor_and_sequence_parallel,
        bounds,
        each_direction_has_its_codec,
        what_is_refused,
        without_gradients,
        in_a_compiled_model,
    ],
    ids=lambda f: f.__name__,
)
def test_on_ranks(function):
    ranks.shared(2).run(function)


@pytest.mark.parametrize(
    "promise", [promises.same_bits, promises.bounded_error, promises.fp32_sums], ids=lambda f: f.__name__
)
def test_promise_in_the_backward_pass(promise):
    codecs = "int8g128", "fp8g128+taco", "ec6", "int4g32+sr:int8g128"
    assert ranks.shared(2).run(in_backward, promise, codecs) == [[]] * 2
