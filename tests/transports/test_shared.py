"""Shared memory on real ranks: when it is used, what it refuses, how it ends, and that it leaves nothing behind."""

import functools
import gc
import os
import signal
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import flashcomm
import promises
import ranks
import values
from calls import all_reduce_of_ones, check, failure, hear, meeting, new_group, tell
from events import asleep, dawdle, times_asleep, wait_for
from flashcomm.collectives.group import group_of
from flashcomm.errors import PeerLost, TimedOut, Unavailable
from flashcomm.transports.shared import prepare


def who_shares():
    group = new_group()
    check(all_reduce_of_ones(group))
    return meeting(group).shared, meeting(group).why_not.get("shared memory", "")


def memory_of(group):
    """The memory that the ranks share."""
    return meeting(group).lane.memories[0]


def one_rank_refuses():
    if dist.get_rank() == 1:
        os.environ["FLASHCOMM_SHARED_MEMORY"] = "0"
    try:
        return who_shares()
    finally:
        os.environ.pop("FLASHCOMM_SHARED_MEMORY", None)


def one_rank_cannot_open(allowed=0):
    """Rank 0's file is not to be seen on rank 1, as in another container, or from some time on."""
    group, real, tries = new_group(), os.open, []

    def refuse(path, *args):
        tries.append(str(path).startswith("/proc"))
        return real("/nowhere" if tries[-1] and sum(tries) > allowed else path, *args)

    if dist.get_rank() == 1:
        os.open = refuse
    try:
        check(all_reduce_of_ones(group))
        check(all_reduce_of_ones(group, async_op=True).wait())
        if allowed:
            # A prime number of values, which cannot be cut into shorter rows, so the memory must grow.
            message, _ = failure(lambda: all_reduce_of_ones(group, (600_011,), algorithm="one_step"), Unavailable)
            assert "a row of 2400044 bytes needs more shared memory: rank 1 cannot share memory with rank 0" in message
            # What fits goes on.
            check(all_reduce_of_ones(group))
            check(all_reduce_of_ones(group, async_op=True).wait())
        return meeting(group).shared, meeting(group).why_not.get("shared memory", "")
    finally:
        os.open = real


def one_rank_sees_another_process():
    """The number of rank 0's process is somebody else's here."""
    group, real = new_group(), os.pread
    if dist.get_rank() == 1:
        os.pread = lambda *args: b"another file"
    try:
        check(all_reduce_of_ones(group))
        return meeting(group).shared, meeting(group).why_not.get("shared memory", "")
    finally:
        os.pread = real


def test_ranks_of_a_host_share_memory():
    assert ranks.shared(3).run(who_shares) == [(True, "")] * 3


@pytest.mark.parametrize(
    "function, reason",
    [
        (one_rank_refuses, "rank 1: FLASHCOMM_SHARED_MEMORY=0"),
        (
            one_rank_cannot_open,
            "rank 1 cannot share memory with rank 0: [Errno 2] No such file or directory: '/nowhere'",
        ),
        (one_rank_sees_another_process, "rank 1 cannot share memory with rank 0: process "),
    ],
)
def test_if_one_rank_cannot_share_none_does_and_all_know_why(function, reason):
    answers = ranks.shared(3).run(function)
    assert len(set(answers)) == 1
    used, why = answers[0]
    assert not used
    assert why.startswith(reason)


def no_room_for_a_file():
    """One rank has no file descriptor left."""
    group, real = new_group(timeout_s=1), os.memfd_create

    def refuse(*args):
        raise OSError(24, "Too many open files")

    if dist.get_rank() == 0:
        os.memfd_create = refuse
    try:
        check(all_reduce_of_ones(group))
        return meeting(group).shared, meeting(group).why_not.get("shared memory", "")
    finally:
        os.memfd_create = real


def test_a_rank_that_cannot_create_a_file_is_a_reason_too():
    answers = ranks.shared(2).run(no_room_for_a_file)
    assert answers == [(False, "rank 0 cannot create memory: [Errno 24] Too many open files")] * 2


def test_memory_that_cannot_grow_is_an_error_and_stays():
    assert ranks.shared(2).run(one_rank_cannot_open, 1) == [(True, "")] * 2


def call_until_a_rank_dies(victim):
    rank = dist.get_rank()
    for _ in range(3):
        check(all_reduce_of_ones(None))
        check(all_reduce_of_ones(None, async_op=True).wait())
    assert meeting().shared
    processes = dict(enumerate(promises.everyone(os.getpid())))
    if rank == victim:
        hear("calls")
        del processes[victim]
        wait_for(lambda: all(map(asleep, processes.values())))
        os.kill(os.getpid(), signal.SIGKILL)
    tell("calls")
    calls = [lambda: all_reduce_of_ones(None), lambda: all_reduce_of_ones(None, async_op=True).wait()]
    # Who failed once finds out at once, and so does who calls with a shape that is new to the ranks.
    return [failure(call, PeerLost) for call in (*calls, *calls, lambda: all_reduce_of_ones(None, (3, 5)))]


def test_a_killed_rank_is_named_within_moments(fresh_ranks):
    group = fresh_ranks(3, timeout_s=60)
    group.start(call_until_a_rank_dies, 1)
    outcomes = [group.outcome(rank) for rank in range(3)]
    assert outcomes[1] is None
    for survivor in (0, 2):
        ok, failures = outcomes[survivor]
        assert ok, failures
        for message, _ in failures[:-1]:
            assert f"all_reduce over 3 ranks failed on rank {survivor}" in message
            assert f"rank 1 has ended while rank {survivor} waited for it in shared memory" in message
        (_, first), *later = failures
        # Of a timeout of 60 s; the cores may be busy with other tests.
        assert first < 10
        assert all(waited < 5 for _, waited in later)


def stall(timeout_s):
    """The last rank does not join before the others have given up."""
    group = new_group(timeout_s)
    for _ in range(3):
        check(all_reduce_of_ones(group))
    if dist.get_rank() == dist.get_world_size() - 1:
        hear("gave up", group)
        return None
    failed = [failure(lambda: all_reduce_of_ones(group), TimedOut) for _ in range(2)]
    tell("gave up", group)
    return failed


def test_a_stalled_rank_is_an_error_at_the_timeout_of_the_group():
    *waiting, _ = ranks.shared(3).run(stall, 1.0)
    for rank, ((message, first), (again, second)) in enumerate(waiting):
        assert f"rank 2 did not come within the group's timeout while rank {rank} waited for it" in message
        assert message == again
        assert 0.9 < first < 10
        assert second < 0.5
    # Other groups of the same ranks still work.
    assert ranks.shared(3).run(who_shares) == [(True, "")] * 3


def come_late(sleeps):
    """Waiting goes from spinning over yielding to naps and to sleep, and ends well in all of them."""
    group = new_group()
    check(all_reduce_of_ones(group))
    processes = promises.everyone(os.getpid())
    for late in range(dist.get_world_size()):
        if dist.get_rank() == late:
            least = {pid: times_asleep(pid) + sleeps for rank, pid in enumerate(processes) if rank != late}
            wait_for(lambda least=least: all(times_asleep(pid) >= times for pid, times in least.items()))
        check(all_reduce_of_ones(group))


# Naps last 50 us, and end after 2 ms: who slept a hundred times sleeps in `poll`.
@pytest.mark.parametrize("sleeps", [0, 10, 100])
def test_ranks_that_come_late_are_waited_for(sleeps):
    ranks.shared(3).run(come_late, sleeps)


def descriptors() -> list[str]:
    """What this process has of memory or processes to share: open descriptors and mappings."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    maps = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    return sorted(link for link in links + maps if any(name in link for name in ("memfd", "pidfd", "/dev/shm")))


def make_and_destroy(times):
    before = descriptors(), len(os.listdir("/proc/self/fd"))
    most = []
    for i in range(times):
        group = new_group()
        check(all_reduce_of_ones(group))
        check(all_reduce_of_ones(group, async_op=True).wait())
        if i % 5 == 0:
            # A prime number of values, which cannot be cut into shorter rows, so the memory grows.
            check(all_reduce_of_ones(group, (600_011,), algorithm="one_step"))
        most = max(most, descriptors(), key=len)
        dist.destroy_process_group(group)
        del group
        gc.collect()
    after = descriptors(), len(os.listdir("/proc/self/fd"))
    return before, most, after


def test_destroyed_groups_leave_no_descriptor_no_mapping_and_no_file():
    ranks.shared(2).run(make_and_destroy, 1)
    for before, most, after in ranks.shared(2).run(make_and_destroy, 20):
        # One memory, and a peer to watch. Neither has a name that could stay in /dev/shm.
        assert len(most) - len(before[0]) == 1 + 1
        assert not any(name.startswith("/dev/shm") for name in most)
        assert after == before


@pytest.fixture
def several_threads():
    """Ranks whose new groups use so many threads each."""
    used = []

    def use(world_size, threads):
        group = ranks.shared(world_size)
        group.run(torch.set_num_threads, threads)
        used.append(group)
        return group

    yield use
    for group in used:
        group.run(torch.set_num_threads, 1)


LARGE = (300, 4096)
"""2.4 MB of bf16: more than two threads' worth."""


def on_several_threads(threads):
    group, size, rank = new_group(), dist.get_world_size(), dist.get_rank()
    for dtype in values.DTYPES:
        for spec in ("int8g128", "int4g32:int8g128", "fp32"):
            xs = [promises.tensor(r, LARGE, dtype) for r in range(size)]
            for algorithm in promises.algorithms(spec):
                got = flashcomm.all_reduce(xs[rank], spec, group, algorithm=algorithm)
                assert promises.same(got, flashcomm.simulate.all_reduce(xs, spec, algorithm)), (spec, dtype, algorithm)
    assert memory_of(group).threads == threads
    gathered = flashcomm.all_gather(xs[rank], "fp32", group)
    assert promises.same(gathered, torch.cat(xs))
    part = LARGE[0] // size
    scattered = flashcomm.reduce_scatter(xs[rank][: part * size], "fp32", group)
    assert promises.same(scattered, flashcomm.simulate.all_reduce(xs, "fp32", "one_step")[rank * part :][:part])


@pytest.mark.parametrize("world_size, threads", [(2, 2), (3, 3)])
def test_several_threads_give_the_same_bits(several_threads, world_size, threads):
    several_threads(world_size, threads).run(on_several_threads, threads)


def threads_of_one_rank():
    if dist.get_rank() == 0:
        torch.set_num_threads(4)
    group = new_group()
    check(all_reduce_of_ones(group, (2048, 512)))
    torch.set_num_threads(1)
    return memory_of(group).threads


def test_all_use_as_many_threads_as_the_rank_that_has_fewest():
    assert ranks.shared(2).run(threads_of_one_rank) == [1, 1]


def overlapping():
    """On rank 0 an asynchronous call begins first, on rank 1 the synchronous one; both want all threads."""
    group = new_group(timeout_s=5)
    check(all_reduce_of_ones(group, LARGE, async_op=True).wait())
    for _ in range(3):
        begins = threading.Event()
        meeting(group).lane.thread.submit(begins.wait if dist.get_rank() == 1 else begins.set)
        work = all_reduce_of_ones(group, LARGE, async_op=True)
        if dist.get_rank() == 1:
            begins.set()
        assert begins.wait(30)
        check(all_reduce_of_ones(group, LARGE))
        check(work.wait())


def test_threads_of_synchronous_and_asynchronous_calls_do_not_wait_for_each_other(several_threads):
    several_threads(2, 2).run(overlapping)


def rows_that_are_long(asynchronous):
    """More payload to a row than half a region holds: the memory grows, once for each need."""
    group, rank, size = new_group(), dist.get_rank(), dist.get_world_size()
    sizes = []
    # An odd number of values has no groups to cut at; cast codecs have none anyway.
    for count, spec in ((1001, "int8g128"), (1_200_001, "int8g128"), (3_000_001, "int4g128"), (5, "fp32")):
        xs = [promises.tensor(r, (count,)) for r in range(size)]
        for algorithm in ("one_step", "two_step"):
            got = flashcomm.all_reduce(xs[rank], spec, group, algorithm=algorithm, async_op=asynchronous)
            got = got.wait() if asynchronous else got
            assert promises.same(got, flashcomm.simulate.all_reduce(xs, spec, algorithm))
        gathered = flashcomm.all_gather(xs[rank], spec, group, async_op=asynchronous)
        gathered = gathered.wait() if asynchronous else gathered
        assert len(gathered) == count * size
        sizes.append(memory_of(group).half_bytes)
    return sizes


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_that_do_not_fit_grow_the_memory(world_size, asynchronous):
    mib = 1 << 20
    assert (
        ranks.shared(world_size).run(rows_that_are_long, asynchronous)
        == [[mib, 2 * mib, 2 * mib, 2 * mib]] * world_size
    )


def grow_under_way(late):
    """An asynchronous call has begun on one rank, and not yet on the other, when the memory grows."""
    group = new_group(timeout_s=1)
    check(all_reduce_of_ones(group, async_op=True).wait())
    grows = threading.Event()

    def hold():
        grows.wait()
        hear("has begun", group)

    if dist.get_rank() == late:
        meeting(group).lane.thread.submit(hold)
    works = [all_reduce_of_ones(group, async_op=True) for _ in range(3)]
    if dist.get_rank() != late:
        tell("has begun", group)
    grows.set()
    check(all_reduce_of_ones(group, (3_000_001,), algorithm="one_step"))
    for work in works:
        check(work.wait())


def test_memory_grows_while_asynchronous_calls_are_under_way():
    ranks.shared(2).run(grow_under_way, 1)


def grow_under_way_over_levels():
    """The same for the memory inside of the hosts of a mesh, in which calls of the mesh's own thread run."""
    mesh, rank = DeviceMesh("cpu", [[0, 1], [2, 3]]), dist.get_rank()
    spec, small, large = "fp32/fp32", (64, 256), (1, 600_011)
    start = functools.partial(flashcomm.all_reduce, codec=spec, group=mesh, algorithm="hierarchical")
    check(start(torch.ones(small)))
    hold = threading.Event()
    if rank == 3:
        group_of(mesh).meet(torch.device("cpu")).lane.thread.submit(hold.wait, 10)
    works = [start(torch.ones(small), async_op=True) for _ in range(4)]
    hold.set()
    check(start(torch.ones(large)))
    for work in works:
        check(work.wait())


def test_memory_of_levels_grows_while_asynchronous_calls_are_under_way():
    ranks.shared(4).run(grow_under_way_over_levels)


def one_call_fails_and_the_group_goes():
    """An error must not keep alive what its callers had: the group, its threads, their tensors."""
    group = new_group(timeout_s=0.5)
    check(all_reduce_of_ones(group))
    if dist.get_rank() == 0:
        failure(functools.partial(all_reduce_of_ones, group), TimedOut)
    alive = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return alive() is None


def test_a_failed_call_keeps_nothing_alive():
    assert ranks.shared(2).run(one_call_fails_and_the_group_goes) == [True] * 2


def groups_go_without_the_collector():
    """What a group holds goes with it at once: servers may freeze or disable Python's garbage collector."""
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            group = new_group()
            check(all_reduce_of_ones(group))
            check(all_reduce_of_ones(group, async_op=True).wait())
            check(all_reduce_of_ones(group, codec="none", algorithm="plain"))
            dist.destroy_process_group(group)
            del group
        return len(os.listdir("/proc/self/fd")) - before
    finally:
        gc.enable()


def test_groups_go_without_the_garbage_collector():
    ranks.shared(2).run(groups_go_without_the_collector)
    assert ranks.shared(2).run(groups_go_without_the_collector) == [0, 0]


def messages_fail_and_memory_does_not():
    """Splits that do not fit end the messages of a lane; its memory was not in the middle of anything."""
    rank, group, x = dist.get_rank(), new_group(), torch.zeros(4, 8)
    check(all_reduce_of_ones(group))
    own = [[2, 2], [3, 1]][rank]
    failure(lambda: flashcomm.all_to_all(x, "fp32", group, input_split_sizes=own, output_split_sizes=own))
    check(all_reduce_of_ones(group))


def test_an_error_of_messages_does_not_end_the_memory():
    ranks.shared(2).run(messages_fail_and_memory_does_not)


VIEWS = {
    "transposed": lambda x: x.T,
    "every other column": lambda x: x[:, ::2],
    "every other row": lambda x: x[::2],
    "window": lambda x: x[5:60, 3:390],
    "expanded": lambda x: x[:1].expand(70, -1),
    "one column": lambda x: x[:, 7:8],
    "flipped dimensions": lambda x: x.view(8, 8, 400).permute(1, 0, 2),
    "one row": lambda x: x[9:10],
}


def any_strides():
    group, rank, size = new_group(), dist.get_rank(), dist.get_world_size()
    for name, view in VIEWS.items():
        for dtype in values.DTYPES:
            xs = [view(promises.tensor(r, (64, 400), dtype)) for r in range(size)]
            before = xs[rank].clone()
            for spec in ("int8g128", "bf16", "int5g100:int8g3"):
                for algorithm in promises.algorithms(spec):
                    got = flashcomm.all_reduce(xs[rank], spec, group, algorithm=algorithm)
                    want = flashcomm.simulate.all_reduce([x.contiguous() for x in xs], spec, algorithm)
                    assert promises.same(got, want), (name, dtype, spec, algorithm)
            assert promises.same(xs[rank], before)
            gathered = flashcomm.all_gather(xs[rank], "fp32", group)
            assert promises.same(gathered, torch.cat(xs)), (name, dtype)
    assert meeting(group).shared


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_strides_and_types(world_size):
    ranks.shared(world_size).run(any_strides)


def in_place():
    """The results over the values: for all_reduce all of them, else the part that is this rank's, as NCCL has it."""
    group, rank, size = new_group(), dist.get_rank(), dist.get_world_size()
    rows = 400
    xs = [promises.tensor(r, (rows * size, 1024)) for r in range(size)]
    total = flashcomm.simulate.all_reduce(xs, "fp32", "one_step")
    mine = slice(rank * rows, (rank + 1) * rows)
    for algorithm in ("one_step", "two_step"):
        x = xs[rank].clone()
        flashcomm.all_reduce(x, "fp32", group, algorithm=algorithm, out=x)
        assert promises.same(x, total)
    x = xs[rank].clone()
    flashcomm.reduce_scatter(x, "fp32", group, out=x[mine])
    assert promises.same(x[mine], total[mine])
    x = xs[rank].clone()
    flashcomm.all_gather(x[mine], "fp32", group, out=x)
    assert promises.same(x, torch.cat([xs[r][r * rows : (r + 1) * rows] for r in range(size)]))


@pytest.mark.parametrize("threads", [1, 2])
def test_results_may_lie_over_the_values(several_threads, threads):
    several_threads(3, threads).run(in_place)


def mixed(times):
    """Synchronous and asynchronous calls, waited for in any order."""
    group, rank, size = new_group(), dist.get_rank(), dist.get_world_size()
    xs = [[promises.tensor(r, (17 * (i + 1), 384), seed=i) for r in range(size)] for i in range(5)]
    want = [flashcomm.simulate.all_reduce(x, "int4g128", "two_step") for x in xs]
    works = []
    for i in range(times):
        works.append(
            (i % 5, flashcomm.all_reduce(xs[i % 5][rank], "int4g128", group, algorithm="two_step", async_op=True))
        )
        j = (3 * i + 1) % 5
        assert promises.same(flashcomm.all_reduce(xs[j][rank], "int4g128", group, algorithm="two_step"), want[j])
        if i % 3 == rank % 3:
            dawdle(300)
        while len(works) > 7:
            k, work = works.pop(len(works) // 2)
            assert promises.same(work.wait(), want[k])
    for k, work in works:
        assert promises.same(work.wait(), want[k])


@pytest.mark.parametrize("world_size", [2, 3])
def test_synchronous_and_asynchronous_calls_mix(world_size):
    ranks.shared(world_size).run(mixed, 60)


@pytest.mark.parametrize(
    "rows, cols, codec, least, most_bytes, expected",
    [
        (1, 1 << 20, "int8g128", 4, 1 << 20, (4, 1 << 18)),
        (8, 4096, "int8g128", 4, 1 << 20, (8, 4096)),
        (1, 4096, "int8g128", 3, 1 << 20, (4, 1024)),
        (1, 5, "fp32", 8, 1 << 20, (5, 1)),
        # A prime number of values.
        (1, 1_000_003, "fp32", 2, 1 << 19, (1, 1_000_003)),
        (1, 1_000_003, "int8g128", 2, 1 << 19, (1, 1_000_003)),
        (2, 128, "int8g128", 8, 1 << 20, (2, 128)),
    ],
)
def test_rows_are_cut_at_group_borders(rows, cols, codec, least, most_bytes, expected):
    assert prepare.shorten(rows, cols, flashcomm.codec(codec), least, most_bytes) == expected
