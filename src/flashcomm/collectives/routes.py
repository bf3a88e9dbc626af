"""Choose what runs a task: a memory of the lane that serves it, or else an algorithm over the lane's messages."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch

from flashcomm import kernels
from flashcomm.codecs import Levels
from flashcomm.collectives.algorithms import ALGORITHMS, all_to_all, broadcast, cut
from flashcomm.collectives.group import Group
from flashcomm.collectives.hierarchical import hierarchical, inside_tasks
from flashcomm.transports.base import OnRows, Run, Step, Task
from flashcomm.transports.lanes import Lane


def load(task: Task, lane: Lane):
    """Load what the task needs and may be missing on this rank alone, so that it fails before others wait for it."""
    kernels.load(task.codec, task.device.type)
    if any(single.varies for single in task.codec.formats):
        from flashcomm.transports import rows

        rows.load()
    for memory in lane.memories:
        memory.load(task)


def run_of(task: Task, group: Group) -> Run:
    """Make a task ready; all ranks call it together and get the same.

    Raises:
        Unavailable: shared memory cannot grow to the longest row; raised on all ranks.
    """
    lane = group.meet(task.device).lane
    if task.name != "hierarchical":
        return route(task, lane, lane.finish)
    inside, between = (level.meet(task.device).lane for level in group.levels(task.device))
    return _over_levels(task, inside, between, lane.finish)


def route(task: Task, lane: Lane, finish: Callable[[], object]) -> Run:
    """Make a task of one level ready; `finish` blocks until no call that uses the lane is under way."""
    for memory in lane.memories:
        if run := memory.prepare(task, finish):
            return run
    if task.splits:
        algorithm = partial(all_to_all, in_rows=task.splits[0], out_rows=task.splits[1])
    elif task.name == "broadcast":
        algorithm = partial(broadcast, root=task.root, pieces=task.pieces)
    elif task.sizes:
        algorithm = partial(ALGORITHMS[task.name], pieces=task.pieces, sizes=task.sizes)
    else:
        algorithm = partial(ALGORITHMS[task.name], pieces=task.pieces)

    def run_algorithm(x: torch.Tensor, out: torch.Tensor) -> int:
        return algorithm(x, out, task.codec, lane.messages)

    return OnRows(run_algorithm, (task.rows, task.cols), lane.messages.abandon)


def _over_levels(task: Task, inside: Lane, between: Lane, finish: Callable[[], object]) -> Run:
    assert isinstance(task.codec, Levels)
    ranks = inside.messages.ranks
    prepare = lru_cache(maxsize=64)(partial(route, lane=inside, finish=finish))
    if task.rows and task.cols:
        # Room in memory is made now, on the caller's thread, because all ranks make it together.
        hosts = between.messages.ranks.world_size
        each = ranks.world_size * hosts * task.pieces
        _, cols = cut(task.rows, task.cols, task.codec, each, task.device.type)
        parts = inside_tasks(task.codec, ranks.world_size, cols, task.dtype, task.device)
        for memory in inside.memories:
            ranks.each(Step.KERNELS, lambda: [memory.load(part) for part in parts])  # noqa: B023
        for part in parts:
            prepare(part)

    def run_levels(x: torch.Tensor, out: torch.Tensor) -> int:
        return hierarchical(x, out, task.codec, ranks, prepare, between.messages, task.pieces)

    def abandon(why: str):
        inside.abandon(why)
        between.abandon(why)

    return OnRows(run_levels, (task.rows, task.cols), abandon)
