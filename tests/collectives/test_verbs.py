"""reduce_scatter, all_gather, all_to_all, asynchronous calls, out=, and the errors of all four verbs."""

import threading
import warnings

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
import values
from calls import hear, meeting, tell
from flashcomm import kernels
from flashcomm.codecs import Codec
from flashcomm.collectives.call import _contract, _without_rows
from flashcomm.collectives.group import group_of
from flashcomm.collectives.rules import ALL_GATHER, ALL_REDUCE
from flashcomm.errors import RanksDisagree
from loopback import Loopback
from thorough import thorough


def decoded(x, spec):
    codec = flashcomm.codec(spec)
    return kernels.decode(kernels.encode(x, codec), codec, cols=x.shape[-1], dtype=x.dtype)


def reduce_scatter_on_ranks():
    size, rank = dist.get_world_size(), dist.get_rank()
    for dtype in values.DTYPES:
        for shape in ((2 * size, 130), (size, 3, 40), (0, 8)):
            for spec in ("int8g128", "int4g32:int8g128"):
                first = flashcomm.codec(spec).formats[0]
                xs = [promises.tensor(r, shape, dtype) for r in range(size)]
                rows = [x.reshape(-1, shape[-1]) for x in xs]
                payloads = torch.stack([kernels.encode(r, first) for r in rows])
                total = kernels.decode_sum(payloads, first, cols=shape[-1], dtype=dtype).view(shape)
                part = shape[0] // size
                got = flashcomm.reduce_scatter(xs[rank], spec)
                want = (total if size > 1 else xs[0])[rank * part : (rank + 1) * part]
                assert promises.same(got, want), (spec, dtype, shape)
    flat = flashcomm.reduce_scatter(torch.arange(6.0 * size), "fp32", algorithm="one_step")
    assert promises.same(flat, size * torch.arange(6.0 * rank, 6.0 * (rank + 1)))
    plain = flashcomm.reduce_scatter(torch.ones(2 * size, 5), "none")
    assert promises.same(plain, torch.full((2, 5), float(size)))


def all_gather_on_ranks():
    size, rank = dist.get_world_size(), dist.get_rank()
    for dtype in values.DTYPES:
        for shape in ((3, 130), (2, 3, 40), (5,), (0, 8), ()):
            for spec in ("int8g128", "int4g32:int8g128"):
                second = str(flashcomm.codec(spec).formats[1])
                parts = [promises.tensor(r, shape, dtype) for r in range(size)]
                if size > 1:
                    flat = [p.reshape(-1, shape[-1] if shape else 1) for p in parts]
                    parts = [
                        decoded(f, second).view(shape) if f.numel() else p for f, p in zip(flat, parts, strict=True)
                    ]
                want = torch.cat([p.reshape(1) if not shape else p for p in parts])
                got = flashcomm.all_gather(promises.tensor(rank, shape, dtype), spec)
                assert promises.same(got, want), (spec, dtype, shape)


def all_to_all_on_ranks():
    size, rank = dist.get_world_size(), dist.get_rank()
    # Rank i sends i + j rows to rank j: uneven, and rank 0 sends itself nothing.
    in_rows, out_rows = [rank + j for j in range(size)], [j + rank for j in range(size)]
    for spec in ("int8g128", "int4g32", "none"):
        for dtype in values.DTYPES:
            rows = {r: promises.tensor(r, (sum(r + j for j in range(size)), 2, 65), dtype) for r in range(size)}
            got = flashcomm.all_to_all(rows[rank], spec, output_split_sizes=out_rows, input_split_sizes=in_rows)
            parts = []
            for sender in range(size):
                start = sum(sender + j for j in range(rank))
                parts.append(rows[sender][start : start + sender + rank])
            want = torch.cat(parts)
            if spec != "none" and size > 1 and want.numel():
                want = decoded(want.reshape(-1, 65), spec).view(want.shape)
            assert promises.same(got, want), (spec, dtype)
    # Rank 0 gets everything, the others nothing.
    to_first = [3 if peer == 0 else 0 for peer in range(size)]
    from_each = [3] * size if rank == 0 else [0] * size
    sizes = {"input_split_sizes": to_first, "output_split_sizes": from_each}
    got = flashcomm.all_to_all(torch.full((3, 4), float(rank)), "fp32", **sizes)
    assert got.shape == (sum(from_each), 4)
    assert got.unique().tolist() == (list(range(size)) if rank == 0 else [])
    empty = flashcomm.all_to_all(torch.zeros(size, 0), "int8g128")
    assert empty.shape == (size, 0)
    even = flashcomm.all_to_all(torch.full((size, 4), float(rank)), "fp32")
    assert promises.same(even, torch.arange(float(size))[:, None].expand(size, 4))


def asynchronous_on_ranks():
    size, rank = dist.get_world_size(), dist.get_rank()
    xs = [promises.tensor(rank, (40, 256), seed=i) for i in range(6)]
    expected = [flashcomm.all_reduce(x, "int4g128", algorithm="two_step") for x in xs]
    works = []
    for x in xs:
        works.append(flashcomm.all_reduce(x, "int4g128", algorithm="two_step", async_op=True))
        dist.barrier()
    for work, want in zip(reversed(works), reversed(expected), strict=True):
        assert promises.same(work.wait(), want)
        assert work.is_completed()
    plain = flashcomm.all_reduce(xs[0], "none", async_op=True)
    assert promises.same(plain.wait(), flashcomm.all_reduce(xs[0], "none"))
    gathered = flashcomm.all_gather(xs[0], "int8g128", async_op=True)
    scattered = flashcomm.reduce_scatter(xs[0].repeat(size, 1), "int8g128", async_op=True)
    swapped = flashcomm.all_to_all(xs[0].repeat(size, 1), "int8g128", async_op=True)
    assert promises.same(swapped.wait(), flashcomm.all_to_all(xs[0].repeat(size, 1), "int8g128"))
    assert promises.same(scattered.wait(), flashcomm.reduce_scatter(xs[0].repeat(size, 1), "int8g128"))
    assert promises.same(gathered.wait(), flashcomm.all_gather(xs[0], "int8g128"))


def out_on_ranks():
    rank = dist.get_rank()
    for algorithm in ("one_step", "two_step", "plain"):
        x = promises.tensor(rank, (6, 64))
        want = flashcomm.all_reduce(x, "int8g128", algorithm=algorithm)
        into = torch.zeros_like(x)
        assert flashcomm.all_reduce(x, "int8g128", algorithm=algorithm, out=into) is into
        assert promises.same(into, want)
        wide = torch.zeros(6, 70, dtype=x.dtype)
        flashcomm.all_reduce(x, "int8g128", algorithm=algorithm, out=wide[:, 3:67])
        assert promises.same(wide[:, 3:67], want)
        assert not wide[:, :3].any()
        assert not wide[:, 67:].any()
        flashcomm.all_reduce(x, "int8g128", algorithm=algorithm, out=x)
        assert promises.same(x, want)


def buffers_on_ranks():
    x = promises.tensor(dist.get_rank(), (64, 512))
    out = torch.empty_like(x)
    buffers = meeting().lane.messages.buffers
    flashcomm.all_reduce(x, "int8g128", algorithm="two_step", out=out)
    held = {name: buffer.data_ptr() for name, buffer in buffers._held.items()}
    for rows in (64, 3, 17, 64):
        flashcomm.all_reduce(x[:rows], "int8g128", algorithm="two_step", out=out[:rows])
    return held == {name: buffer.data_ptr() for name, buffer in buffers._held.items()}


def modes_on_ranks():
    """Buffers made in inference mode serve later calls outside of it, and the other way round."""
    x = promises.tensor(dist.get_rank(), (8, 128))
    group = dist.new_group(list(range(dist.get_world_size())))
    with torch.inference_mode():
        first = flashcomm.all_reduce(x, "bf16", group, algorithm="two_step").clone()
    with torch.no_grad():
        second = flashcomm.all_reduce(x, "bf16", group, algorithm="two_step")
    with torch.inference_mode():
        third = flashcomm.all_reduce(x.clone(), "bf16", group, algorithm="two_step", async_op=True).wait()
    assert promises.same(first, second)
    assert promises.same(first, third)


def subgroup_on_ranks():
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    x = promises.tensor(rank, (5, 100))
    got = flashcomm.all_reduce(x, "int4g32", group=pairs[rank // 2], algorithm="two_step")
    members = [promises.tensor(r, (5, 100)) for r in (rank // 2 * 2, rank // 2 * 2 + 1)]
    assert promises.same(got, flashcomm.simulate.all_reduce(members, "int4g32", "two_step"))
    with pytest.raises(ValueError, match="a process group that this rank belongs to"):
        flashcomm.all_reduce(x, "int4g32", group=pairs[1 - rank // 2])


def nested(x):
    """A nested tensor whose layout says that it is strided."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([x, x[:2]], layout=torch.strided)


def pending_views_on_ranks():
    """Views whose values are not those in memory: the sums are those of their copies."""
    size, rank = dist.get_world_size(), dist.get_rank()
    x = promises.tensor(rank, (4 * size, 64), torch.float32)
    imaginary = torch.complex(x, x + 1).conj().imag
    for view in (torch._neg_view(x), imaginary, torch._neg_view(x)[:, ::2], torch._neg_view(x.bfloat16())):
        assert view.is_neg()
        copy = view.clone()
        for spec in ("int8g128", "bf16", "none"):
            for verb in (flashcomm.all_reduce, flashcomm.reduce_scatter, flashcomm.all_gather, flashcomm.all_to_all):
                assert promises.same(verb(view, spec), verb(copy, spec)), (verb, spec)
            later = flashcomm.all_reduce(view, spec, async_op=True)
            assert promises.same(later.wait(), flashcomm.all_reduce(copy, spec))
        assert promises.same(kernels.encode(view, "int8g128"), kernels.encode(copy, "int8g128"))
    conjugate = torch.complex(x, x + 1).conj()
    for verb in (flashcomm.all_reduce, flashcomm.all_gather, flashcomm.all_to_all):
        got, want = (verb(c, "none") for c in (conjugate, conjugate.resolve_conj()))
        assert promises.same(torch.view_as_real(got), torch.view_as_real(want))


def strange_outs_on_ranks():
    """Memory may be interleaved, if only each element has its own."""
    x = promises.tensor(dist.get_rank(), (3, 2), torch.float32)
    want = flashcomm.all_reduce(x, "int8g128", algorithm="two_step")
    for out in (torch.zeros(2, 3).t(), torch.zeros(8).as_strided((3, 2), (2, 3)), torch.zeros(6, 4)[::2, 1:3]):
        assert promises.same(flashcomm.all_reduce(x, "int8g128", algorithm="two_step", out=out), want)
    assert flashcomm.all_reduce(x[:0], "int8g128", out=x[:1].expand(0, 2)).shape == (0, 2)


ERRORS = [
    (lambda x: flashcomm.all_reduce(x, "int9"), "unknown codec 'int9'"),
    (lambda x: flashcomm.all_reduce(x.int(), "int8"), "compresses bf16, fp16 and fp32, not torch.int32"),
    (lambda x: flashcomm.all_reduce([1.0], "int8"), "x must be a dense tensor, not list"),
    (lambda x: flashcomm.all_reduce(x.to_sparse(), "int8"), "x must be a dense tensor, not torch.sparse_coo"),
    (lambda x: flashcomm.all_reduce(nested(x), "int8"), "x must be a dense tensor, not a nested one"),
    (lambda x: flashcomm.all_reduce(x, "int8", out=nested(x)), "out must be a dense tensor, not a nested one"),
    (
        lambda x: flashcomm.all_reduce(x.to(torch.complex64), "int8"),
        r"not torch.complex64. Use codec='none' for other types, or pass torch.view_as_real\(x\).flatten\(-2\)",
    ),
    (lambda x: flashcomm.all_gather(x.to(torch.complex64), "int8"), "not torch.complex64. Use codec='none'"),
    (lambda x: flashcomm.all_reduce(x, "int8", out=torch._neg_view(x)), "out is a view with a pending negation"),
    (
        lambda x: flashcomm.all_reduce(x.to(torch.complex64), "none", out=x.to(torch.complex64).conj()),
        "out is a view with a pending conjugation",
    ),
    (
        lambda x: flashcomm.all_reduce(x, "int8", algorithm="two_step", out=x[:1].clone().expand(4, 6)),
        r"some of \[4, 6\] with strides \[0, 1\] share theirs: give a tensor that is not expanded",
    ),
    (
        lambda x: flashcomm.all_gather(x, "none", out=torch.zeros(20, dtype=x.dtype).as_strided((8, 6), (2, 1))),
        r"some of \[8, 6\] with strides \[2, 1\] share theirs",
    ),
    (lambda x: flashcomm.all_reduce(x, "int8", algorithm="ring"), "unknown algorithm 'ring'. Allowed: auto, one_step"),
    (lambda x: flashcomm.all_reduce(x, "none", algorithm="two_step"), "codec 'none' is the plain collective"),
    (lambda x: flashcomm.all_reduce(x, "int4:int8", algorithm="one_step"), "one_step sends once"),
    (lambda x: flashcomm.all_reduce(x, "int8", out=torch.zeros(3)), r"out must be torch.bfloat16 \[4, 6\]"),
    (lambda x: flashcomm.all_reduce(x.clone().requires_grad_(), "int8"), "for inference"),
    (lambda x: flashcomm.all_reduce(x, "int8", group="tp"), "a process group that this rank belongs to"),
    (lambda x: flashcomm.reduce_scatter(x[:3], "int8"), "splits dimension 0 over 2 ranks"),
    (lambda x: flashcomm.reduce_scatter(x, "int8", algorithm="two_step"), "only all_reduce can be two_step"),
    (lambda x: flashcomm.all_to_all(x[0], "int8"), "at least 2 dimensions"),
    (lambda x: flashcomm.all_to_all(x, "int4:int8"), "a single codec, not the pair"),
    (lambda x: flashcomm.all_to_all(x[:3], "int8"), "3 rows do not split evenly over 2 ranks"),
    (lambda x: flashcomm.all_to_all(x, "int8", input_split_sizes=[1, 1], output_split_sizes=[1, 1]), "add up to 4"),
    (
        lambda x: flashcomm.all_to_all(x, "int8", input_split_sizes=[4], output_split_sizes=[2, 2]),
        "must be 2 non-negative",
    ),
]


class Own(Codec):
    """A format without a kernel: fp32 under another name."""

    def __str__(self):
        return "own"

    def payload_bytes(self, cols, dtype=torch.bfloat16):
        return 4 * cols

    def encode(self, x):
        return x.float().view(torch.uint8)

    def decode(self, payload, cols, dtype):
        return payload.contiguous().view(torch.float32).to(dtype)

    def step(self, x):
        return torch.zeros_like(x)


def a_codec_of_ones_own_on_ranks():
    """It works everywhere at once, at the speed of torch, which is counted, and which strict refuses."""
    size, rank = dist.get_world_size(), dist.get_rank()
    xs = [promises.tensor(r, (5, 64)) for r in range(size)]
    flashcomm.reset_stats()
    for algorithm in ("one_step", "two_step"):
        total = flashcomm.all_reduce(xs[rank], Own(), algorithm=algorithm)
        assert promises.same(total, flashcomm.all_reduce(xs[rank], "fp32", algorithm=algorithm))
    if size > 1:
        assert flashcomm.stats()["slow_kernels"] == {"no CPU kernel for own": 2}
        with pytest.raises(RuntimeError, match="strict: .* would run own without a kernel: no CPU kernel for own"):
            flashcomm.all_reduce(xs[rank], Own(), algorithm="two_step", strict=True)


def errors_on_ranks():
    x = promises.tensor(dist.get_rank(), (4, 6))
    for call, message in ERRORS:
        with pytest.raises(ValueError, match=message):
            call(x)
    with pytest.raises(
        RuntimeError,
        match=r"strict: all_reduce of \[4, 6\] .* would run uncompressed: compression does not pay in shared memory",
    ):
        flashcomm.all_reduce(x, "int8", strict=True)
    flashcomm.all_reduce(x, "int8", algorithm="two_step", strict=True)


@pytest.mark.parametrize(
    "function",
    [
        reduce_scatter_on_ranks,
        all_gather_on_ranks,
        all_to_all_on_ranks,
        asynchronous_on_ranks,
        out_on_ranks,
        modes_on_ranks,
        pending_views_on_ranks,
        strange_outs_on_ranks,
        a_codec_of_ones_own_on_ranks,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("by", ranks.WAYS)
@pytest.mark.parametrize("world_size", [1, thorough(2), 3, thorough(4)])
def test_on_ranks(function, world_size, by):
    ranks.shared(world_size, by=by).run(function)


def test_wrong_arguments_are_refused_before_any_communication():
    ranks.shared(2).run(errors_on_ranks)


def test_a_subgroup_is_a_world_of_its_own():
    ranks.shared(4).run(subgroup_on_ranks)


def test_buffers_are_reused():
    assert ranks.shared(3).run(buffers_on_ranks) == [True] * 3


def test_without_a_process_group_the_error_says_what_to_do():
    with pytest.raises(ValueError, match="init_process_group"):
        flashcomm.all_reduce(torch.zeros(4), "int8g128")


def disagree(case):
    rank = dist.get_rank()
    x = torch.zeros(8, 128, dtype=torch.bfloat16)
    calls = {
        "codec": lambda: flashcomm.all_reduce(x, "int8g128" if rank else "int4g128", algorithm="two_step"),
        "codec of auto": lambda: flashcomm.all_reduce(x, "int8g128" if rank else "int4g128"),
        "dtype": lambda: flashcomm.all_reduce(x.float() if rank else x, "int8g128", algorithm="two_step"),
        "shape": lambda: flashcomm.all_reduce(x[: 8 - rank], "int8g128", algorithm="two_step"),
        "algorithm": lambda: flashcomm.all_reduce(x, "int8g128", algorithm="two_step" if rank else "one_step"),
        "op": lambda: flashcomm.all_gather(x) if rank else flashcomm.reduce_scatter(x),
    }
    try:
        calls[case]()
    except RanksDisagree as error:
        message = str(error)
    else:
        message = "nothing was raised"
    # The group is still usable.
    total = flashcomm.all_reduce(torch.ones(2, 128), "int8g128", algorithm="two_step")
    return message, total.unique().item()


@pytest.mark.parametrize("case", ["codec", "codec of auto", "dtype", "shape", "algorithm", "op"])
def test_ranks_that_disagree_all_raise_and_name_both_sides(case):
    for message, total in ranks.shared(2).run(disagree, case):
        assert "ranks disagree about this collective: rank 0 calls op=" in message
        assert "; rank 1 calls op=" in message
        assert total == 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_gpu_compares_calls_once_whatever_their_rows(device):
    """A comparison makes the host wait for a GPU, for which another device than the CPU stands here."""
    loop = Loopback(2)

    def run(rank, _):
        group, compared = group_of(loop.groups[rank]), []
        gather = group.backend.all_gather
        group.backend.all_gather = lambda x, out: (compared.append(1), gather(x, out))
        for rows in (1, 7, 300):
            for verb, strict in ((ALL_REDUCE, ""), (ALL_GATHER, ""), (ALL_REDUCE, ", strict=yes")):
                x = torch.empty(rows, 128, dtype=torch.bfloat16, device=device)
                contract = _contract(verb, "two_step", flashcomm.codec("int8g128"), x) + strict
                known_as = _without_rows(contract, verb, x)
                assert verb.name in known_as
                assert known_as.endswith(strict)
                group.agree(contract, torch.device("cpu"), known_as=known_as)
        return len(compared)

    assert loop.run(run) == [9 if device == "cpu" else 3] * 2


def test_the_first_of_such_calls_is_compared_with_its_rows():
    loop = Loopback(2)

    def run(rank, _):
        with pytest.raises(RanksDisagree, match="rank 0 calls shape=3x128; rank 1 calls shape=4x128"):
            group_of(loop.groups[rank]).agree(f"shape={3 + rank}x128", torch.device("cpu"), known_as="shape=*x128")

    loop.run(run)


def stall():
    """Rank 1 does not join an asynchronous call before rank 0 has given up."""
    import time

    x = torch.ones(64, 1024)
    if dist.get_rank() == 1:
        hear("gave up")
        return None
    start = time.monotonic()
    work = flashcomm.all_reduce(x, "fp32", algorithm="two_step", async_op=True)
    with pytest.raises(RuntimeError, match="all_reduce over 2 ranks failed on rank 0"):
        work.wait()
    waited = time.monotonic() - start
    tell("gave up")
    return waited


def agree_then_stall():
    flashcomm.all_reduce(torch.ones(64, 1024), "fp32", algorithm="two_step")
    return stall()


def test_an_asynchronous_call_keeps_the_timeout_of_its_group(fresh_ranks):
    waited = fresh_ranks(2, timeout_s=2).run(agree_then_stall)[0]
    assert 1.5 < waited < 10


def call_until_a_rank_dies(victim):
    import os
    import signal

    rank = dist.get_rank()
    x = torch.ones(64, 1024)
    for _ in range(3):
        flashcomm.all_reduce(x, "int8g128", algorithm="two_step")
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    flashcomm.all_reduce(x, "int8g128", algorithm="two_step")


def test_a_dead_rank_is_an_error_within_the_timeout(fresh_ranks):
    import time

    group = fresh_ranks(3, timeout_s=5)
    start = time.monotonic()
    group.start(call_until_a_rank_dies, 1)
    outcomes = [group.outcome(rank) for rank in range(3)]
    assert time.monotonic() - start < 30
    assert outcomes[1] is None
    for survivor in (0, 2):
        ok, message = outcomes[survivor]
        assert not ok
        assert f"all_reduce over 3 ranks failed on rank {survivor}" in message
        assert "A peer that is gone, or that does not join within the group's timeout" in message


def mixed_on_ranks():
    """Some ranks start a call asynchronously, others not; the order in which they start decides."""
    size, rank = dist.get_world_size(), dist.get_rank()
    verbs = (flashcomm.all_reduce, flashcomm.reduce_scatter, flashcomm.all_gather, flashcomm.all_to_all)
    for spec in ("int4g128", "none"):
        works, wanted = [], []
        for number in range(12):
            x = promises.tensor(rank, (4 * size, 256 + 128 * number), seed=number)
            verb = verbs[number % 4]
            kwargs = {"algorithm": "two_step"} if number % 4 == 0 and spec != "none" else {}
            wanted.append(verb(x, spec, **kwargs))
            got = verb(x, spec, async_op=(number // 4 + rank) % 2 == 0, **kwargs)
            works.append(got)
        for got, want in zip(reversed(works), reversed(wanted), strict=True):
            assert promises.same(got if isinstance(got, torch.Tensor) else got.wait(), want)


@pytest.mark.parametrize("by", ranks.WAYS)
@pytest.mark.parametrize("world_size", [thorough(2), 3])
def test_ranks_may_differ_in_whether_a_call_is_asynchronous(world_size, by):
    ranks.shared(world_size, by=by).run(mixed_on_ranks)


def a_callback_that_waits_for_another_sum():
    x, done, event = promises.tensor(dist.get_rank(), (8, 256)), [], threading.Event()
    work = flashcomm.all_reduce(x, "int4g128", algorithm="two_step", async_op=True)

    def another():
        done.append(flashcomm.all_reduce(x, "int4g128", algorithm="two_step", async_op=True).wait())
        event.set()

    work.add_done_callback(another)
    assert event.wait(30)
    assert promises.same(done[0], work.wait())


@pytest.mark.parametrize("by", ranks.WAYS)
def test_a_callback_may_wait_for_another_sum(by):
    ranks.shared(2, by=by).run(a_callback_that_waits_for_another_sum)
