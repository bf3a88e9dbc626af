"""Threads that flush subnormal numbers to zero get and send the same bits as those that do not."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

import flashcomm
import formats
import promises
import ranks
from calls import new_group
from flashcomm import codecs, kernels, subnormals
from flashcomm.codecs.registry import ALL
from flashcomm.kernels import eager, verbs
from thorough import thorough


@contextlib.contextmanager
def flushing():
    assert torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def small(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """fp32 around the smallest normal number, in some rows with larger ones beside."""
    x = promises.tensor(seed, (rows, cols), torch.float32) * 2.0**-127
    x[::3, ::17] *= 1e3
    x[1::3] *= 2.0**-18
    return x


def inputs(rows: int = 6, cols: int = 320) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each dtype, the messages of two ranks."""
    pair = [small(rows, cols, rank) for rank in range(2)]
    halves = [x * 2.0**112 for x in pair]
    return [tuple(x.to(dtype) for x in pair) for dtype in (torch.float32, torch.bfloat16)] + [
        tuple(x.half() for x in halves)
    ]


def figures(spec: str, messages) -> list[torch.Tensor]:
    """Everything that the verbs of the codecs make of messages."""
    cols, found = messages[0][0].shape[1], []
    features = codecs.Features(torch.stack([x[0].abs() for x in (*messages[0], messages[0][0])]))
    for xs in messages:
        mine = [flashcomm.codec(spec).bind(features, rank) for rank in range(2)]
        payloads = torch.stack([kernels.encode(x, codec) for x, codec in zip(xs, mine, strict=True)])
        first, second = mine[0].formats
        found += [
            payloads,
            kernels.decode_sum(payloads, first, cols=cols, dtype=xs[0].dtype),
            kernels.decode_sum_encode(payloads, first, second, cols=cols),
            kernels.decode(payloads[0], first, cols=cols, dtype=torch.float32),
        ]
    return found


@pytest.mark.parametrize("by", ["kernels", "specification"])
@pytest.mark.parametrize("spec", ["bf16", "fp32", *formats.SPECS])
def test_codecs_keep_subnormal_numbers(spec, by, monkeypatch):
    if by == "specification":
        for module in (eager, verbs):
            monkeypatch.setattr(module, "implementation", lambda *_: None)
    messages = inputs()
    want = figures(spec, messages)
    with flushing():
        got = figures(spec, messages)
        assert subnormals.flushed(), "the caller's setting is lost"
    assert all(promises.same(a, b) for a, b in zip(got, want, strict=True))


def test_the_check_of_subnormal_numbers_can_fail():
    x = small(6, 320)
    want = codecs.parse("fp32").decode(codecs.parse("fp32").encode(x), 320, torch.float32) + x
    with flushing():
        got = codecs.parse("fp32").decode(codecs.parse("fp32").encode(x), 320, torch.float32) + x
    assert not promises.same(got, want)


@pytest.mark.parametrize("by", ["kernels", "specification"])
def test_worker_threads_keep_them_too(by, monkeypatch):
    """Those of a large message, which start from a thread that flushes and inherit that."""
    if by == "specification":
        for module in (eager, verbs):
            monkeypatch.setattr(module, "implementation", lambda *_: None)
    messages = inputs(1024, 320)
    want = figures("int8g128", messages)
    from flashcomm.kernels import cpu

    cpu.pool.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with flushing():
            got = figures("int8g128", messages)
            assert torch.get_num_threads() == 2
            cpu.pool(2).shutdown()
    finally:
        torch.set_num_threads(threads)
        cpu.pool.cache_clear()
    assert all(promises.same(a, b) for a, b in zip(got, want, strict=True))


def test_another_thread_of_the_program_flushes_alone():
    with ThreadPoolExecutor(1) as one:
        assert one.submit(torch.set_flush_denormal, True).result()
        assert one.submit(subnormals.flushed).result()
        assert not subnormals.flushed()
        messages = inputs()
        want = figures("int4g32", messages)
        assert all(
            promises.same(a, b) for a, b in zip(one.submit(figures, "int4g32", messages).result(), want, strict=True)
        )


def sums_of_subnormal_numbers(flush: bool) -> list[torch.Tensor]:
    """Everything that a rank gets from ranks that have never met, the last of which may flush."""
    size, rank = dist.get_world_size(), dist.get_rank()
    x, group, results = small(8 * size, 320, rank), new_group(), []
    with flushing() if flush and rank == size - 1 else contextlib.nullcontext():
        for message in (x, x.bfloat16()):
            for spec in ("fp32", "bf16", *(spec for spec in ALL if not flashcomm.codec(spec).unbound)):
                for algorithm in ("one_step", "two_step"):
                    results.append(flashcomm.all_reduce(message, spec, group, algorithm=algorithm))
            later = flashcomm.all_reduce(message, "int8g128", group, algorithm="two_step", async_op=True)
            results += [
                later.wait(),
                flashcomm.all_reduce(message, "int8g128", group),
                flashcomm.reduce_scatter(message, "int8g128", group),
                flashcomm.all_gather(message, "int8g128", group),
                flashcomm.all_to_all(message, "int8g128", group),
            ]
    return results


def one_rank_flushes() -> int:
    """Number of results that a rank which flushes changes."""
    pairs = zip(sums_of_subnormal_numbers(False), sums_of_subnormal_numbers(True), strict=True)
    return sum(not promises.same(a, b) for a, b in pairs)


@pytest.mark.parametrize("by", ["memory", thorough("connections"), thorough("gloo")])
def test_a_rank_that_flushes_gets_and_sends_the_same_bits(by):
    assert ranks.shared(2, by=by).run(one_rank_flushes) == [0, 0]
