"""Two levels of links: real hosts in a lab, the bits that one process predicts, the bytes that the formula says."""

import itertools
import socket
import subprocess

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import values
from flashcomm.collectives.group import group_of
from flashcomm.collectives.routes import run_of
from flashcomm.lab import hosts as lab
from flashcomm.lab import launch
from flashcomm.transports.base import Task

needs_lab = pytest.mark.skipif(bool(lab.unavailable()), reason=f"no lab on this machine: {lab.unavailable()}")


def hierarchical_on_ranks() -> list[str]:
    torch.set_num_threads(1)
    bad, size, rank = [], dist.get_world_size(), dist.get_rank()
    hosts, dtypes = size // 2, itertools.cycle(values.DTYPES)
    for spec in (
        "int4g128",
        "int8g128/int4g128:int8g128",
        "bf16/lossless",
        "fp32/mxfp4",
        "bf16:int8g128/int2g32+spike",
    ):
        for shape in ((64, 1024), (3, 300), (7,), (5, 128), (0, 128), ()):
            dtype = next(dtypes)
            xs = [promises.tensor(r, shape, dtype) for r in range(size)]
            got = flashcomm.all_reduce(xs[rank], spec, algorithm="hierarchical")
            later = flashcomm.all_reduce(xs[rank], spec, algorithm="hierarchical", async_op=True).wait()
            if not xs[0].numel():
                continue
            want = flashcomm.simulate.all_reduce(xs, spec, "hierarchical", hosts=hosts)
            if not (promises.same(got, want) and promises.same(later, want)):
                bad.append(f"{spec} {list(shape)} {dtype}: not the bits that one process predicts")
            if not all(promises.same(got, theirs) for theirs in promises.everyone(got)):
                bad.append(f"{spec} {list(shape)} {dtype}: ranks hold different bits")
    # Between hosts a rank sends its share of the message: all of it to the one other host, or two parts to each other.
    x = torch.zeros(96, 1024, dtype=torch.bfloat16)
    flashcomm.reset_stats()
    flashcomm.all_reduce(x, "int4g128", algorithm="hierarchical")
    row = flashcomm.codec("int4g128").payload_bytes(1024)
    expected = 2 * (hosts - 1) * 96 * row // hosts // (size // hosts)
    if flashcomm.stats()["wire_bytes"] != expected:
        bad.append(f"sent {flashcomm.stats()['wire_bytes']} bytes between hosts instead of {expected}")
    if flashcomm.stats()["calls"] != {"all_reduce/hierarchical/bf16/int4g128": 1}:
        bad.append(f"stats: {flashcomm.stats()}")
    return bad


def more_than_the_kernel_keeps() -> bool:
    torch.set_num_threads(1)
    between = group_of(None).levels(torch.device("cpu"))[1]
    for line in between.meet(torch.device("cpu")).lane.messages.link._sockets.values():
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    # Sums of small numbers, which are exact in any order.
    x = torch.full((4096, 1024), 1.0 + dist.get_rank())
    right = True
    for codec in ("fp32/fp32", "fp32/fp32:fp32") * 3:
        out = torch.empty_like(x)
        task = Task(
            name="hierarchical",
            codec=flashcomm.codec(codec),
            rows=x.shape[0],
            cols=x.shape[1],
            dtype=x.dtype,
            out_dtype=x.dtype,
            device=x.device,
            pieces=12,
        )
        run_of(task, group_of(None))(x, out)
        right = right and out.unique().tolist() == [10.0]
    return right


def bytes_between_hosts() -> int:
    torch.set_num_threads(1)
    x = torch.ones(256, 4096, dtype=torch.bfloat16)
    flashcomm.all_reduce(x, "int4g128", algorithm="hierarchical")
    dist.barrier()
    before = lab.interface_bytes()
    for _ in range(4):
        flashcomm.all_reduce(x, "int4g128", algorithm="hierarchical")
    dist.barrier()
    return (lab.interface_bytes() - before) // 4


def on_hosts(ranks: int, *functions) -> dict:
    """Each rank's result of each function, on hosts of two ranks; a launch takes longer than all of them."""
    with lab.Lab(ranks=ranks, rate="500mbit", ranks_per_host=2) as hosts:
        results = launch.run(one_after_the_other, functions, ranks=ranks, lab=hosts, timeout_s=20)
    return dict(zip(functions, zip(*results, strict=True), strict=True))


def one_after_the_other(*functions) -> list:
    return [function() for function in functions]


@pytest.fixture(scope="module")
def four() -> dict:
    return on_hosts(4, hierarchical_on_ranks, more_than_the_kernel_keeps, bytes_between_hosts)


@needs_lab
def test_levels_give_the_bits_that_one_process_predicts(four):
    assert list(four[hierarchical_on_ranks]) == [[]] * 4


@pytest.mark.thorough
@needs_lab
def test_three_hosts_give_the_bits_that_one_process_predicts():
    assert list(on_hosts(6, hierarchical_on_ranks)[hierarchical_on_ranks]) == [[]] * 6


@needs_lab
def test_ranks_that_wait_for_each_other_do_so_in_no_circle(four):
    """Ranks of a host wait for each other in memory while messages larger than the kernel's buffers are to leave."""
    assert list(four[more_than_the_kernel_keeps]) == [True] * 4


@needs_lab
def test_the_interface_carries_what_the_formula_says(four):
    payload = 256 * flashcomm.codec("int4g128").payload_bytes(4096)
    for sent in four[bytes_between_hosts]:
        # Headers and acknowledgements take some percent; without levels the host would send twice as much.
        assert payload <= sent <= 1.1 * payload


@needs_lab
def test_nothing_is_left_of_the_labs():
    assert "flashcomm-" not in subprocess.run(("ip", "netns", "list"), capture_output=True, text=True).stdout
