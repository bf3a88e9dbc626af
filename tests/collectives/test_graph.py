"""torch.compile over calls of flashcomm: one node of the graph, the bits and the counts of the same call outside."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import calls
import flashcomm
import promises
import ranks
import values
from flashcomm.codecs import Affine, Features

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="torch's inductor needs a C++ compiler")
    ),
]


def compiled(function, backend="aot_eager", **options):
    # Workers of the compiler would outlive the test.
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def agrees(function, *args, backend="aot_eager"):
    """The graph gives the bits of the function, and both count the same."""
    counts, results = [], []
    for run in (function, compiled(function, backend)):
        flashcomm.reset_stats()
        results.append(run(*args))
        counts.append(flashcomm.stats())
    assert all(promises.same(a, b) for a, b in zip(*results, strict=True))
    assert counts[0] == counts[1]
    assert counts[0]["calls"]


def verbs(x, group, sizes):
    y = flashcomm.all_reduce(x * 2, "int4g128:int8g128", group, algorithm="two_step") + x
    parts = flashcomm.reduce_scatter(y.t(), "int8g128", group)
    rows = flashcomm.all_gather(parts, codec="int4g32", group=group)
    swapped = flashcomm.all_to_all(rows, "mxfp4", group)
    back = flashcomm.all_to_all(swapped, "none", input_split_sizes=sizes, output_split_sizes=sizes)
    payload = flashcomm.encode(back, "int2g32+spike")
    values = flashcomm.decode(payload, "int2g32+spike", cols=back.shape[1], dtype=x.dtype)
    into = torch.zeros_like(x)
    flashcomm.all_reduce(x, "none", group, out=into)
    return y, parts, rows, swapped, back, payload, values.relu() - 1, into


def every_verb(backend):
    rank = dist.get_rank()
    sizes = [64, 192] if rank == 0 else [192, 64]
    for dtype in values.DTYPES if backend == "aot_eager" else [torch.bfloat16]:
        agrees(verbs, promises.tensor(rank, (40, 256), dtype), dist.group.WORLD, sizes, backend=backend)


def a_layer_without_gradients():
    """A row-parallel linear, as models have it: parameters require gradients, the call does not allow any."""
    layer = torch.nn.Linear(64, 128)
    layer.weight.data = promises.tensor(dist.get_rank(), (128, 64), torch.float32)

    def forward(x):
        return [flashcomm.all_reduce(layer(x), "int8g128", algorithm="two_step").relu()]

    with torch.inference_mode():
        agrees(forward, torch.ones(3, 64))
    with torch.no_grad():
        agrees(forward, torch.ones(3, 64))
    with pytest.raises(RuntimeError, match="would cut the gradient: call it under torch.no_grad"):
        compiled(forward)(torch.ones(3, 64))


def lengths(backend):
    """One graph for all lengths of a prompt."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def forward(x):
        y = flashcomm.all_reduce(x + 1, "int8g128", algorithm="two_step")
        parts = flashcomm.reduce_scatter(flashcomm.all_gather(y, "int4g32"), "int4g32")
        return [parts * 2, flashcomm.decode(flashcomm.encode(y, "int4g32"), "int4g32", cols=128, dtype=y.dtype)]

    counter = CompileCounterWithBackend(backend)
    run = compiled(forward, counter, dynamic=True)
    for tokens in (2, 3, 17, 64, 1000):
        x = promises.tensor(dist.get_rank(), (tokens, 128))
        assert all(promises.same(a, b) for a, b in zip(run(x), forward(x), strict=True))
    assert counter.frame_count == 1
    assert counter.op_count == 7, "each call is one node"


def order(backend):
    """Calls run in the order of the program, those too whose result is needed late, or by nobody."""
    from flashcomm.collectives import graph as operators

    def forward(x):
        late = flashcomm.all_reduce(x, "int8g128", algorithm="one_step")
        flashcomm.all_gather(x, "int6g128")
        early = flashcomm.all_reduce(x.relu(), "int5g128", algorithm="one_step") * 2
        flashcomm.all_reduce(early.sin(), "int4g128", algorithm="one_step")
        return early.exp() + late

    seen, run = [], operators._run

    def noting(verb, x, codec, *args, **kwargs):
        seen.append(codec)
        return run(verb, x, codec, *args, **kwargs)

    operators._run = noting
    try:
        for _ in range(2):
            compiled(forward, backend)(promises.tensor(dist.get_rank(), (16, 128)))
    finally:
        operators._run = run
    return seen


def groups():
    """A group is a part of the graph: another one is another graph."""
    x, rank = promises.tensor(dist.get_rank(), (4, 128)), dist.get_rank()
    pair, alone = calls.new_group(), [dist.new_group([r]) for r in range(2)][rank]
    row, column = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [[0], [1]])

    def forward(x, group):
        return flashcomm.all_reduce(x, "int4g32", group, algorithm="two_step")

    total, run = forward(x, None), compiled(forward)
    assert not promises.same(total, x)
    for group, want in ((None, total), (pair, total), (alone, x), (row, total), (column, total), (pair, total)):
        assert promises.same(run(x, group), want)
    with pytest.raises(Exception, match="group must be a process group that this rank belongs to"):
        run(x, dist.GroupMember.NON_GROUP_MEMBER)


def levels():
    """A mesh with levels."""
    flashcomm.reset_stats()
    x = promises.tensor(dist.get_rank(), (64, 256))

    def forward(x, mesh):
        return flashcomm.all_reduce(x, "bf16/int4g128", mesh, algorithm="hierarchical")

    # The graph comes first, so it is what makes the groups of the levels.
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]])
    got = compiled(forward)(x, mesh)
    assert promises.same(got, forward(x, mesh))
    assert flashcomm.stats()["calls"] == {"all_reduce/hierarchical/bf16/int4g128": 2}
    with pytest.raises(Exception, match="a mesh of 3 dimensions, .* is no group"):
        compiled(forward)(x, DeviceMesh("cpu", [[[0, 1], [2, 3]]]))


class Mine(Affine):
    """A format that no name leads to."""

    def __str__(self) -> str:
        return "mine"


def codecs():
    """Codecs that cannot be parsed, and one that is assigned anew."""
    x = promises.tensor(dist.get_rank(), (40, 128))
    reach = 4 * torch.rand(3, 128, generator=torch.Generator().manual_seed(0))
    given = [Mine(4, False, 32), flashcomm.codec("int4g32")]
    given += [flashcomm.codec(s).bind(Features(reach), dist.get_rank()) for s in ("int4static", "int4g32+keep8")]
    given += [flashcomm.codec("int4static").bind(Features(2 * reach), dist.get_rank())]

    class Layer(torch.nn.Module):
        def forward(self, x):
            return flashcomm.all_reduce(x, self.codec, algorithm="two_step")

    layer, results = Layer(), []
    run = compiled(layer)
    for layer.codec in given:
        results.append(run(x))
        assert promises.same(results[-1], layer(x))
    assert len({bytes(r.view(torch.uint8).numpy()) for r in results}) == 4  # `Mine` is int4g32 by another name


def refusals():
    """What shapes and names tell is said when the graph is made, not on the first call."""
    x = promises.tensor(0, (3, 128))
    for call, message in (
        (lambda: flashcomm.all_reduce(x, "int9"), "unknown codec 'int9'"),
        (lambda: flashcomm.all_reduce(x, algorithm="three_step"), "unknown algorithm 'three_step'"),
        (lambda: flashcomm.all_reduce(x.int()), "compresses bf16, fp16 and fp32, not torch.int32"),
        (lambda: flashcomm.all_reduce(x, "int4static"), "needs to know the features of the model"),
        (lambda: flashcomm.all_reduce(x, Affine(4, False, 32)), "makes a codec of class Affine.*: give its spelling"),
        (lambda: flashcomm.encode(x, flashcomm.codec("int4g32")), "makes a codec of class Affine.*: give its spelling"),
        (lambda: flashcomm.all_reduce(x, async_op=True), "async_op_needs_a_graph_break"),
        (lambda: flashcomm.all_reduce(x, out=x[:2]), "refuse_out_unlike_the_result"),
        (lambda: flashcomm.reduce_scatter(x), r"splits dimension 0 over 2 ranks, which \[3, 128\] does not"),
        (lambda: flashcomm.all_gather(x, algorithm="two_step"), "only all_reduce can be two_step"),
        (lambda: flashcomm.all_gather(x, "bf16/int4g128"), "only all_reduce has levels"),
        (lambda: flashcomm.all_to_all(x, "int4g128:int8g128"), "all_to_all sends once"),
        (lambda: flashcomm.all_to_all(x), "3 rows do not split evenly over 2 ranks"),
        (lambda: flashcomm.encode(x[0], "int8g128"), "encode takes a .rows, cols. tensor"),
        (lambda: flashcomm.decode(x, "int8g128", cols=9, dtype=x.dtype), "9 values in int8g128 are rows of 13 bytes"),
    ):
        flashcomm.reset_stats()
        with pytest.raises(Exception, match=message):
            compiled(call)()
        assert not flashcomm.stats()["calls"]


def between_graphs():
    """Where the graph may break, an asynchronous call is made between two graphs, and errors are those of the call."""
    torch._dynamo.reset()

    def forward(x):
        return flashcomm.all_reduce(x + 1, "int4g128", algorithm="two_step", async_op=True).wait() * 2

    def refused(x, **options):
        return flashcomm.all_reduce(x + 1, "int4g128", **options)

    x = promises.tensor(dist.get_rank(), (40, 256))
    assert promises.same(torch.compile(forward, backend="aot_eager")(x), forward(x))
    run = torch.compile(refused, backend="aot_eager")
    with pytest.raises(ValueError, match=r"out must be torch.bfloat16 \[40, 256\] on cpu, not .* \[2, 256\]"):
        run(x, out=x[:2])
    with pytest.raises(ValueError, match="would cut the gradient"):
        run(x.clone().requires_grad_())


def operators():
    """Torch's own checks of an operator: schema, autograd, fake shapes, and tracing with shapes that vary."""
    import flashcomm.collectives.graph

    ops, x = torch.ops.flashcomm, promises.tensor(dist.get_rank(), (8, 256))
    samples = {
        ops.all_reduce: [(t, "int4g128", "", "two_step", False, False) for t in (x, x.t(), x[0], x[:, :0], x[0, 0])],
        ops.reduce_scatter: [
            *((t, "int8g128", "", None, "auto") for t in (x, x.t(), x[0], x[:0])),
            (x, "int8g128", "", [5, 3], "auto"),
        ],
        ops.all_gather: [
            *((t, "int8g128", "", None, "auto") for t in (x, x.t(), x[0], x[:0], x[0, 0])),
            (x, "int8g128", "", [8, 8], "auto"),
        ],
        ops.all_to_all: [(x, "int8g128", "", None, None, "auto"), (x, "int8g128", "", [4, 4], [4, 4], "auto")],
        ops.encode: [(x, "int4g128"), (x.t(), "int4g32"), (x[:0], "nvfp4")],
        ops.decode: [(flashcomm.encode(x, "int4g128"), "int4g128", 256, torch.float32)],
    }
    for op, arguments in samples.items():
        for sample in arguments:
            torch.library.opcheck(op.default, sample)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [every_verb, lengths], ids=lambda f: f.__name__)
def test_with(function, backend):
    ranks.shared(2).run(function, backend)


@pytest.mark.parametrize(
    "function",
    [a_layer_without_gradients, groups, codecs, refusals, between_graphs, operators],
    ids=lambda f: f.__name__,
)
def test_on_ranks(function):
    ranks.shared(2).run(function)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_call_is_dropped_or_overtaken(backend):
    wanted = ["int8g128", "int6g128", "int5g128", "int4g128"] * 2
    assert ranks.shared(2).run(order, backend) == [wanted, wanted]


def test_a_mesh_with_levels():
    ranks.shared(4).run(levels)


def test_the_compiler_is_loaded_by_those_who_compile():
    code = "import sys, flashcomm; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
