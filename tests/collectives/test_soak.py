"""Many collectives in a row, of all kinds and sizes, with ranks that dawdle: every result checked, nothing grows.

A thousand by default on each world; ``FLASHCOMM_SOAK=100000 pytest -s tests/collectives/test_soak.py`` for more.
"""

import os
import random
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
from calls import meeting
from events import dawdle
from flashcomm import kernels
from thorough import thorough

COUNT = int(os.environ.get("FLASHCOMM_SOAK", "500"))
VARIANTS = 3
"""Tensors for each case, so that what is left from an earlier call is not the right result by chance."""


@dataclass(frozen=True)
class Case:
    """One collective; `weight` says how often it is called."""

    weight: int
    verb: str
    codec: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    algorithm: str = "auto"

    def values(self, rank: int, variant: int) -> torch.Tensor:
        x = promises.tensor(rank, self.shape, torch.float32, seed=variant)
        # The order of a plain sum is the backend's: whole numbers, and no negative zeros, have the same sum in any.
        return (x.mul(3).round() + 0.0 if self.plain else x).to(self.dtype)

    @property
    def plain(self) -> bool:
        return self.codec == "none" or (self.verb == "all_reduce" and self.algorithm == "auto")

    def expected(self, xs: list[torch.Tensor], rank: int) -> torch.Tensor:
        """What `rank` must get."""
        if self.verb == "all_reduce":
            if self.plain:
                return torch.stack(xs).float().sum(0).to(self.dtype)
            return flashcomm.simulate.all_reduce(xs, self.codec, self.algorithm)
        rows = self.shape[0] // len(xs)
        mine = slice(rank * rows, (rank + 1) * rows)
        if self.verb == "reduce_scatter":
            return flashcomm.simulate.all_reduce(xs, self.codec, "one_step")[mine]
        codec = flashcomm.codec(self.codec)
        parts = [
            kernels.decode(kernels.encode(x.view(-1, x.shape[-1]), codec), codec, cols=x.shape[-1], dtype=x.dtype)
            for x in xs
        ]
        return torch.cat(parts if self.verb == "all_gather" else [part[mine] for part in parts]).view(
            -1, *xs[0].shape[1:]
        )

    def call(self, x: torch.Tensor, group, async_op: bool):
        algorithm = {"algorithm": self.algorithm} if self.verb == "all_reduce" else {}
        return getattr(flashcomm, self.verb)(x, self.codec, group, async_op=async_op, **algorithm)


FP16, FP32 = torch.float16, torch.float32
CASES = [
    Case(20, "all_reduce", "int8g128", (1, 128), algorithm="two_step"),
    Case(20, "all_reduce", "int4g32", (6, 256), algorithm="one_step"),
    Case(20, "all_reduce", "fp32", (7,), FP32, "one_step"),
    Case(20, "all_reduce", "int4g128:int8g128", (5, 300), FP16, "two_step"),
    Case(20, "all_reduce", "int8g128", (3, 4096), algorithm="two_step"),
    Case(10, "all_reduce", "bf16", (48, 2048), algorithm="one_step"),
    Case(10, "all_reduce", "nvfp4", (48, 2048), FP32, "two_step"),
    Case(4, "all_reduce", "int8g128", (301, 4096), algorithm="two_step"),
    Case(2, "all_reduce", "int4g128", (768, 2048), FP32, "one_step"),
    # A row that must grow the memory.
    Case(1, "all_reduce", "fp32", (300_007,), algorithm="two_step"),
    Case(20, "reduce_scatter", "int8g128", (6, 384)),
    Case(10, "reduce_scatter", "int4g32", (60, 1000), FP32),
    Case(20, "all_gather", "int8g128", (2, 130)),
    Case(10, "all_gather", "fp32", (40, 1024), FP16),
    Case(2, "all_gather", "int8g128", (150, 4096)),
    Case(5, "all_to_all", "int8g128", (12, 256)),
    Case(5, "all_reduce", "int8g128", (4, 64)),
    Case(5, "all_reduce", "none", (6, 100), FP32),
]


def resources() -> tuple[int, int, int]:
    """(resident bytes, open descriptors, threads) of this process."""
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def new_group(messages: bool) -> dist.ProcessGroup:
    """All ranks, which share memory or send messages."""
    group = dist.new_group(list(range(dist.get_world_size())))
    if messages:
        os.environ["FLASHCOMM_SHARED_MEMORY"] = "0"
    try:
        flashcomm.all_reduce(torch.ones(2, 64), "fp32", group, algorithm="two_step")
    finally:
        os.environ.pop("FLASHCOMM_SHARED_MEMORY", None)
    assert meeting(group).shared != messages
    return group


def soak(count: int, seed: int) -> tuple[float, list[tuple[int, int, int]]]:
    """Seconds, and resources after everything ran once and after every tenth of the calls."""
    rank, size = dist.get_rank(), dist.get_world_size()
    groups = [new_group(messages=False), new_group(messages=True)]
    ready = {}
    for case in CASES:
        for variant in range(VARIANTS):
            xs = [case.values(r, variant) for r in range(size)]
            ready[case, variant] = xs[rank], case.expected(xs, rank)
    pending = []

    def start(case: Case, variant: int, group, async_op: bool):
        x, expected = ready[case, variant]
        pending.append((case.call(x, group, async_op), expected, case))
        if not async_op:
            finish(-1)

    def finish(i: int):
        result, expected, case = pending.pop(i)
        result = result if isinstance(result, torch.Tensor) else result.wait()
        assert promises.same(result, expected), case

    for case, variant in ready:
        for group in groups:
            for async_op in (True, False):
                start(case, variant, group, async_op)
        while pending:
            finish(0)
    # All ranks draw the same calls, and each its own delays and order of waiting.
    calls, own = random.Random(seed), random.Random(seed * 1000 + rank)
    seen = [resources()]
    begin = time.perf_counter()
    for i in range(count):
        (case,) = calls.choices(CASES, [case.weight for case in CASES])
        variant, group = calls.randrange(VARIANTS), groups[calls.random() < 0.05]
        async_op = calls.random() < 0.4
        if own.random() < 0.02:
            dawdle(own.choice([10, 100, 1000, 3000]))
        start(case, variant, group, async_op)
        while len(pending) > own.randrange(8):
            finish(own.randrange(len(pending)))
        if (i + 1) % max(1, count // 10) == 0:
            while pending:
                finish(0)
            seen.append(resources())
    while pending:
        finish(0)
    seconds = time.perf_counter() - begin
    for group in groups:
        dist.destroy_process_group(group)
    return seconds, seen


@pytest.mark.timeout(300 + COUNT // 20)
@pytest.mark.parametrize("world_size, threads", [thorough(2, 2), (3, 1)])
def test_many_collectives(world_size, threads):
    group = ranks.shared(world_size)
    group.run(torch.set_num_threads, threads)
    try:
        results = group.run(soak, COUNT, world_size)
    finally:
        group.run(torch.set_num_threads, 1)
    for rank, (seconds, seen) in enumerate(results):
        resident = " ".join(f"{bytes / 2**20:.0f}" for bytes, _, _ in seen)
        print(f"rank {rank} of {world_size}: {COUNT} collectives in {seconds:.1f} s, resident MiB: {resident}")
        # Fewer is fine: what earlier tests left may be collected meanwhile.
        for kind in (1, 2):
            assert max(counts[kind] for counts in seen) == seen[0][kind], seen
        # The first tenth still finds free memory between what the warm-up left.
        assert max(seen[2:])[0] - seen[1][0] < 16 * 2**20, seen
