"""Memory of large results: used again when nobody holds it, and never before."""

import gc
import io
import os
import pickle
import random
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import flashcomm
import ranks
from calls import check, new_group
from flashcomm.transports import pages
from flashcomm.transports.buffers import Buffers


@pytest.fixture(autouse=True)
def _empty_pool(monkeypatch):
    monkeypatch.setattr(pages, "_idle", [])


def page_faults_of_sums(times, bytes_each):
    group = new_group()
    x = torch.ones(bytes_each // 4096, 1024)
    check(flashcomm.all_reduce(x, "fp32", group, algorithm="two_step"))
    check(flashcomm.all_gather(x, "fp32", group)[:1] * 2)
    del group
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        flashcomm.all_reduce(x, "fp32", algorithm="two_step")
        flashcomm.all_reduce(x, "fp32", algorithm="two_step", async_op=True).wait()
        flashcomm.all_gather(x, "fp32")
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_large_results_cost_no_page_faults():
    size = 40 << 20
    for faults in ranks.shared(2).run(page_faults_of_sums, 2, size):
        # Two results of this size, and one of twice as much, each time.
        assert faults < 2 * 4 * size // 4096 / 10, faults


def test_memory_is_used_again_once_nobody_holds_it():
    first = pages.empty(torch.Size([5000]), torch.float32)
    address = first.data_ptr()
    view = first[10:20].view(2, 5)
    del first
    second = pages.empty(torch.Size([5000]), torch.float32)
    assert second.data_ptr() != address
    del view
    assert pages.empty(torch.Size([2, 2500]), torch.float32).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8])
def test_tensors_are_like_those_of_torch(dtype):
    for shape in ([8192], [3, 5000], [2, 1, 7, 1000]):
        x = pages.empty(torch.Size(shape), dtype)
        assert x.shape == torch.Size(shape)
        assert (x.dtype, x.device.type, x.is_contiguous()) == (dtype, "cpu", True)
        assert not x._is_view()
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
        assert x.data_ptr() % pages.HUGE_BYTES == 0
        x.fill_(1)
        assert torch.equal(pickle.loads(pickle.dumps(x)), torch.ones(shape, dtype=dtype))


def test_inference_mode_and_default_devices_do_not_matter():
    with torch.inference_mode():
        assert pages.empty(torch.Size([5000]), torch.float32).is_inference()
    x = pages.empty(torch.Size([5000]), torch.float32)
    assert not x.is_inference()
    with torch.device("meta"):
        assert pages.empty(torch.Size([5000]), torch.float32).device.type == "cpu"
    weight = torch.ones(5000, requires_grad=True)
    x.fill_(2).mul_(weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.unique().tolist() == [2.0]


def test_the_pool_is_bounded(monkeypatch):
    monkeypatch.setattr(pages, "MOST_IDLE_BYTES", 8 << 20)
    held = [pages.empty(torch.Size([2 << 20]), torch.uint8) for _ in range(10)]
    assert len({x.data_ptr() for x in held}) == 10
    last = held[-1].data_ptr()
    while held:
        held.pop(0)
    assert sum(block.size for block in pages._idle) == 8 << 20
    assert pages.empty(torch.Size([2 << 20]), torch.uint8).data_ptr() == last
    # Larger than all that may wait.
    pages.empty(torch.Size([32 << 20]), torch.uint8)
    assert pages._idle == []


def _lazily_free(address: int) -> int:
    """KiB of the mapping at an address that the operating system may take back."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, stop = (int(edge, 16) for edge in first.split("-"))
            inside = start <= address < stop
        elif inside and first == "LazyFree:":
            return int(rest[0])
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not pages._huge(), reason="this operating system gives no huge pages")
def test_only_what_waits_beyond_64_mib_may_be_taken_back(monkeypatch):
    monkeypatch.setattr(pages, "KEPT_BYTES", 4 << 20)
    held = [pages.empty(torch.Size([4 << 20]), torch.uint8).fill_(1) for _ in range(2)]
    addresses = [x.data_ptr() for x in held]
    held.pop(0)
    assert _lazily_free(addresses[0]) == 0
    held.pop(0)
    assert _lazily_free(addresses[1]) > 0


def test_where_memory_is_short_torch_says_so(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pages.mmap, "mmap", refuse)
    x = pages.empty(torch.Size([5000]), torch.float32)
    assert x.untyped_storage().resizable()


def test_large_buffers_lie_in_huge_pages():
    buffers, cpu = Buffers(), torch.device("cpu")
    assert buffers.take("large", cpu, 3, 1 << 20).data_ptr() % pages.HUGE_BYTES == 0
    assert buffers.take("small", cpu, 3, 10).untyped_storage().resizable()


def test_only_large_results_on_cpus_are_ours():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert pages.is_large(torch.Size([1, 1 << 20]), torch.float32, cpu)
    assert not pages.is_large(torch.Size([1, 1 << 20]), torch.bfloat16, cpu)
    assert not pages.is_large(torch.Size([1, 1 << 20]), torch.float32, meta)


def test_a_child_has_memory_of_its_own():
    x = pages.empty(torch.Size([5000]), torch.float32).fill_(1)
    child = os.fork()
    if not child:
        x.fill_(2)
        os._exit(0)
    os.waitpid(child, 0)
    assert x.unique().tolist() == [1.0]


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, held):
        ctx.save_for_backward(held)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0], None


def _graph(x):
    """Held by a graph of autograd alone."""
    weight = torch.zeros(x.shape, requires_grad=True)
    y = _Saved.apply(weight, x)

    def values():
        return torch.autograd.grad(y, weight, torch.zeros_like(y), retain_graph=True)[0]

    return values


def _storage(x):
    storage, shape = x.untyped_storage(), x.shape
    return lambda: torch.empty(0).set_(storage, 0, shape)


def _array(x):
    array = x.numpy()
    return lambda: torch.from_numpy(array)


def _part_of_an_array(x):
    array = np.asarray(x)[::7]
    return lambda: torch.from_numpy(array.copy())


def _bytes(x):
    window = memoryview(x.numpy())
    return lambda: torch.from_numpy(np.asarray(window))


def _capsule(x):
    y = torch.from_dlpack(torch.utils.dlpack.to_dlpack(x))
    return lambda: y


def _moved_to_shared_memory(x):
    view = x[::3]
    x.share_memory_()
    return lambda: view


def _file(x):
    file = io.BytesIO()
    torch.save(x, file)
    return lambda: torch.load(io.BytesIO(file.getvalue()))


HOLDERS = {
    "itself": lambda x: lambda: x,
    "view": lambda x: (lambda y: lambda: y)(x[3:-5].view(-1)),
    "transposed": lambda x: (lambda y: lambda: y)(x.view(2, -1).T),
    "other type": lambda x: (lambda y: lambda: y.view(torch.float32))(x.view(torch.int32)),
    "detached": lambda x: (lambda y: lambda: y)(x.requires_grad_().detach()),
    "alias": lambda x: (lambda y: lambda: y)(torch.ops.aten.alias(x)),
    "parameter": lambda x: (lambda y: lambda: y.detach())(torch.nn.Parameter(x)),
    "graph": _graph,
    "storage": _storage,
    "array": _array,
    "part of an array": _part_of_an_array,
    "bytes": _bytes,
    "capsule": _capsule,
    "shared": _moved_to_shared_memory,
    "file": _file,
}


@pytest.mark.parametrize("how", HOLDERS)
def test_what_holds_a_result_keeps_its_values(how):
    held = HOLDERS[how](pages.empty(torch.Size([8192]), torch.float32).fill_(7))
    gc.collect()
    others = [pages.empty(torch.Size([8192]), torch.float32).fill_(9) for _ in range(3)]
    assert held().unique().tolist() == [7.0]
    assert all(other.unique().tolist() == [9.0] for other in others)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_that_is_held_is_ever_overwritten(monkeypatch, seed):
    """Results of any sizes, held in any way and given up in any order by any thread, with a pool that is too small."""
    monkeypatch.setattr(pages, "MOST_IDLE_BYTES", 6 << 20)
    choose = random.Random(seed)
    held: list = []
    used, again = set(), 0
    with ThreadPoolExecutor(1) as other:
        for number in range(150):
            shape = torch.Size([choose.choice([4096, 6000, 300_000, 900_000])])
            x = pages.empty(shape, torch.float32)
            again += x.data_ptr() in used
            used.add(x.data_ptr())
            with torch.no_grad():
                x.fill_(number)
            how = choose.choice([name for name in HOLDERS if name != "file"])
            held.append((number, HOLDERS[how](x)))
            del x
            while len(held) > 6 or (held and choose.random() < 0.4):
                value, values = held.pop(choose.randrange(len(held)))
                assert values().unique().tolist() == [value], how
                if choose.random() < 0.5:
                    # Another thread is the last to hold it.
                    other.submit(values).result()
                else:
                    # A cycle, which only a garbage collection finds.
                    cycle = [values]
                    cycle.append(cycle)
                    del cycle
                del values
    assert again > 20


def sums_at_once(seed, times):
    """Two threads make large results at the same time, and keep some of them."""
    rank, size, failures = dist.get_rank(), dist.get_world_size(), []

    def make(group, number):
        kept = []
        for i in range(times):
            value = number * times + i + 1
            x = torch.full((2048, 1024), float(value))
            y = flashcomm.all_reduce(x, "fp32", group, algorithm="two_step", async_op=bool(i % 2))
            kept.append((value, y.wait() if i % 2 else y))
            if i % 3 == rank % 3:
                kept.pop(len(kept) // 2)
            failures.extend(v for v, y in kept if not (y == size * v).all())

    groups = [new_group() for _ in range(2)]
    for group in groups:
        flashcomm.all_reduce(torch.ones(2048, 1024), "fp32", group, algorithm="two_step", async_op=True).wait()
    threads = [threading.Thread(target=make, args=(group, number)) for number, group in enumerate(groups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_threads_do_not_get_the_same_memory():
    assert ranks.shared(2).run(sums_at_once, 0, 12) == [[], []]
