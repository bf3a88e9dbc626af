"""Every algorithm over messages, on ranks that are threads: the bits of the simulation, the recorded bits, the bytes.

No processes: the transport is `loopback`, so that every codec, world size and way to cut a message costs milliseconds.
"""

import json
from functools import partial

import pytest
import torch

import flashcomm
import promises
import recorded
import values
from flashcomm import kernels
from flashcomm.codecs import Levels, parse
from flashcomm.collectives import algorithms
from flashcomm.collectives.hierarchical import hierarchical
from flashcomm.transports.base import OnRows, Run, Task
from loopback import Deadlock, Loopback
from thorough import thorough

RECORDED = json.loads(recorded.FILE.read_text())
BULK = pytest.mark.parametrize("bulk", [False, True], ids=["direct", "bulk"])


def all_reduce(loop: Loopback, xs, codecs, name: str, hosts: int = 0, pieces: int = 1) -> torch.Tensor:
    """The sum, which all ranks hold alike."""
    shape = xs[0].shape
    rows = [x.reshape(-1, shape[-1]) for x in xs]
    outs = [torch.empty_like(x) for x in rows]

    def run(rank, messages):
        return algorithms.ALGORITHMS[name](rows[rank], outs[rank], codecs[rank], messages, pieces=pieces)

    loop.run(run)
    assert all(promises.same(out, outs[0]) for out in outs), "ranks hold different bits"
    return outs[0].view(shape)


@pytest.mark.parametrize("spec", recorded.SPECS)
def test_payloads_are_those_that_were_recorded(spec):
    assert recorded.payloads(spec, kernels.encode) == RECORDED["payloads"][spec]


# The others' digests show that a change was meant; five sizes show that it is there.
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, thorough(8)])
@pytest.mark.parametrize("name", ["one_step", "two_step"])
def test_sums_are_those_that_were_recorded(name, world_size):
    """For every codec, dtype and shape; recorded before the transports had a seam."""
    loop = Loopback(world_size)
    wrong = []
    for spec in recorded.SPECS:
        if name not in recorded.algorithms(spec) or world_size not in recorded.worlds(spec):
            continue
        want = RECORDED["sums"][f"{spec} {name}"][recorded.WORLDS.index(world_size)]
        if world_size == 1:
            # One rank keeps its values.
            got = recorded.sums(lambda xs, *_: xs[0], spec, name, 1)
        else:
            got = recorded.sums(partial(all_reduce, loop), spec, name, world_size)
        wrong += [spec] * (got != want)
    assert not wrong


def over_levels(xs, codecs, name: str, hosts: int) -> torch.Tensor:
    """The hierarchical sum: a loopback inside of each host, and one between hosts for each place on a host."""
    size = len(xs) // hosts
    inside = [Loopback(size) for _ in range(hosts)]
    between = [Loopback(hosts) for _ in range(size)]
    rows = [x.reshape(-1, xs[0].shape[-1]) for x in xs]
    outs = [torch.empty_like(x) for x in rows]

    def run(rank, _):
        host, place = divmod(rank, size)
        messages = inside[host].messages[place]

        def prepare(task: Task) -> Run:
            algorithm = algorithms.ALGORITHMS[task.name]
            return OnRows(lambda x, out: algorithm(x, out, task.codec, messages), (task.rows, task.cols), str)

        exact = "bf16" if xs[0].dtype == torch.bfloat16 else "fp32"
        codec = codecs[rank] if isinstance(codecs[rank], Levels) else Levels(parse(exact), codecs[rank])
        return hierarchical(
            rows[rank], outs[rank], codec, messages.ranks, prepare, between[place].messages[host], pieces=2
        )

    Loopback(len(xs)).run(run)
    assert all(promises.same(out, outs[0]) for out in outs), "ranks hold different bits"
    return outs[0].view(xs[0].shape)


@pytest.mark.parametrize(("world_size", "hosts"), recorded.HOSTS)
@pytest.mark.parametrize("spec", recorded.LEVELS)
def test_sums_over_levels_are_those_that_were_recorded(spec, world_size, hosts):
    got = recorded.sums(over_levels, spec, "hierarchical", world_size, hosts)
    assert got == RECORDED["levels"][spec][recorded.HOSTS.index((world_size, hosts))]


@pytest.mark.parametrize("spec", promises.CODECS)
@pytest.mark.parametrize(
    ("world_size", "bulk"),
    [(2, False), (3, False), thorough(7, False), (3, True), thorough(4, True)],
    ids=lambda x: {False: "direct", True: "bulk"}.get(x),
)
def test_sums_are_those_of_the_simulation(world_size, spec, bulk):
    """Also where a rank has no rows, and for values that formats have got wrong before."""
    loop, codec = Loopback(world_size, bulk=bulk), parse(spec)
    for name in promises.algorithms(spec):
        for dtype in values.DTYPES:
            for shape in ((1, 1), (1, 300), (world_size - 1, 257), (2 * world_size + 1, 128)):
                xs = [promises.tensor(rank, shape, dtype) for rank in range(world_size)]
                got = all_reduce(loop, xs, [codec] * world_size, name)
                want = promises.simulated(world_size, spec, name, shape, dtype)
                assert promises.same(got, want), (name, dtype, shape)
    special = values.special(torch.bfloat16)
    for label, x in special.items():
        xs = [x.roll(rank, 0) for rank in range(world_size)]
        got = all_reduce(loop, xs, [codec] * world_size, "two_step")
        assert promises.same(got, flashcomm.simulate.all_reduce(xs, spec, "two_step")), label


@BULK
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bits_do_not_depend_on_pieces(world_size, bulk):
    loop = Loopback(world_size, bulk=bulk)
    for name in ("one_step", "two_step"):
        for spec in ("int4g128", "int2g32+spike"):
            for shape in ((37, 256), (1, 2048), (3, 100), (2, 128)):
                xs = [promises.tensor(rank, shape) for rank in range(world_size)]
                want = flashcomm.simulate.all_reduce(xs, spec, name)
                for pieces in (1, 2, 3, 8):
                    got = all_reduce(loop, xs, [parse(spec)] * world_size, name, pieces=pieces)
                    assert promises.same(got, want), (name, spec, shape, pieces)


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("two_step", ["encode", "decode_sum_encode", "decode"]),
        ("one_step", ["encode", "decode_sum"]),
        ("reduce_scatter", ["encode", "decode_sum"]),
        ("all_gather", ["encode", "decode"]),
    ],
)
def test_kernels_do_not_grow_with_ranks_over_a_backend(monkeypatch, name, want, world_size):
    """On GPUs each is a launch; also where stripes are uneven, and the last ranks have no rows."""
    loop, codec = Loopback(world_size, bulk=True), parse("int8g128")
    called: list[str] = []
    for verb in ("encode", "decode", "decode_sum", "decode_sum_encode"):

        def counted(*args, run=getattr(kernels, verb), verb=verb, **kwargs):
            called.append(verb)
            return run(*args, **kwargs)

        monkeypatch.setattr(algorithms.kernels, verb, counted)
    for rows in (world_size, 5 * world_size) if name == "reduce_scatter" else (world_size + 1, 37, 40):
        size = {"reduce_scatter": rows // world_size, "all_gather": rows * world_size}.get(name, rows)
        called.clear()
        loop.run(
            lambda rank, messages, rows=rows, size=size: algorithms.ALGORITHMS[name](
                promises.tensor(rank, (rows, 384)), torch.empty(size, 384, dtype=torch.bfloat16), codec, messages
            )
        )
        assert sorted(called) == sorted(want * world_size), rows


def test_a_piece_has_three_kernels_whatever_the_number_of_ranks(monkeypatch):
    """So that those of one piece run while another is on its way; stripes are uneven here."""
    called: list[str] = []
    for verb in ("encode", "decode", "decode_sum_encode"):

        def counted(*args, run=getattr(kernels, verb), verb=verb, **kwargs):
            called.append(verb)
            return run(*args, **kwargs)

        monkeypatch.setattr(algorithms.kernels, verb, counted)
    for world_size, rows in ((4, 37), (8, 90), (3, 9)):
        called.clear()
        xs = [promises.tensor(rank, (rows, 384)) for rank in range(world_size)]
        outs = all_reduce(Loopback(world_size, bulk=True), xs, [parse("int4g128")] * world_size, "two_step", pieces=3)
        assert sorted(called) == sorted(3 * world_size * ["encode", "decode_sum_encode", "decode"])
        assert promises.same(outs, flashcomm.simulate.all_reduce(xs, "int4g128", "two_step"))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_prompts_of_any_length_share_the_rows_of_a_gpu(world_size):
    """A length of rows is a constant of its kernels, and each takes a second to compile while a server waits."""
    for spec, cols in (("int8g128", 5120), ("int4g32", 4096), ("nvfp4", 2880), ("bf16", 896)):
        codec = parse(spec)
        for pieces in (1, 3):
            parts = world_size * pieces
            lengths = {algorithms.cut(rows, cols, codec, parts, "cuda")[1] for rows in range(1, 2049)}
            assert lengths == {cols}, spec


@BULK
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_halves_of_a_sum(world_size, bulk):
    """reduce_scatter into fp32, all_gather, in any number of pieces."""
    loop, codec = Loopback(world_size, bulk=bulk), parse("int4g32")
    xs = [promises.tensor(rank, (5 * world_size, 96)) for rank in range(world_size)]
    payloads = torch.stack([codec.encode(x) for x in xs])
    decoded = torch.stack([codec.decode(payload, 96, xs[0].dtype) for payload in payloads])
    total = flashcomm.codecs.decode_sum(payloads, codec, 96, torch.float32).unflatten(0, (world_size, 5))
    width = codec.payload_bytes(96)
    for pieces in (1, 3):
        gathered = [torch.empty(5 * world_size**2, 96, dtype=xs[0].dtype) for _ in xs]
        parts = [torch.empty(5, 96, dtype=torch.float32) for _ in xs]

        def gather(rank, messages, gathered=gathered, pieces=pieces):
            return algorithms.all_gather(xs[rank], gathered[rank], codec, messages, pieces=pieces)

        def scatter(rank, messages, parts=parts, pieces=pieces):
            return algorithms.reduce_scatter(xs[rank], parts[rank], codec, messages, pieces=pieces)

        assert loop.run(gather) == [(world_size - 1) * 5 * world_size * width] * world_size
        assert all(promises.same(one, decoded.flatten(0, 1)) for one in gathered)
        assert loop.run(scatter) == [(world_size - 1) * 5 * width] * world_size
        assert all(promises.same(part, total[rank]) for rank, part in enumerate(parts))


@BULK
@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_rows_to_every_rank_in_turn(world_size, bulk):
    """Uneven, and rank 0 sends itself nothing."""
    loop, codec, everyone = Loopback(world_size, bulk=bulk), parse("int8g128"), range(world_size)
    xs = [promises.tensor(rank, (sum(rank + other for other in everyone), 65)) for rank in everyone]
    decoded = [codec.decode(codec.encode(x), 65, x.dtype).split([r + o for o in everyone]) for r, x in enumerate(xs)]

    def run(rank, messages):
        rows = [rank + other for other in everyone]
        out = torch.empty(sum(rows), 65, dtype=xs[0].dtype)
        return out, algorithms.all_to_all(xs[rank], out, codec, messages, rows, rows)

    for rank, (out, sent) in enumerate(loop.run(run)):
        assert promises.same(out, torch.cat([decoded[other][rank] for other in everyone]))
        assert sent == (len(xs[rank]) - 2 * rank) * codec.payload_bytes(65)


def test_the_loopback_notices_another_length_and_ranks_that_wait_for_each_other():
    def another_length(rank, messages):
        if rank == 0:
            messages.link.send(torch.zeros(8, dtype=torch.uint8), 1)
        else:
            messages.link.receive(torch.zeros(4, dtype=torch.uint8), 0).wait()

    with pytest.raises(AssertionError, match="8 bytes where 4 were expected"):
        Loopback(2).run(another_length)
    with pytest.raises(Deadlock, match=r"ranks \[0, 2\] wait for each other"):
        Loopback(3).run(
            lambda rank, messages: rank == 1 or messages.link.receive(torch.zeros(1, dtype=torch.uint8), 1).wait()
        )
