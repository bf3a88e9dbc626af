"""Choose what runs a task: a memory of the lane that serves it, or else an algorithm over the lane's messages."""

from functools import lru_cache, partial

import torch

from flashcomm.codecs import Levels
from flashcomm.collectives.algorithms import ALGORITHMS, all_to_all, cut
from flashcomm.collectives.group import Group
from flashcomm.collectives.hierarchical import hierarchical, inside_tasks
from flashcomm.transports.base import OnRows, Run, Task
from flashcomm.transports.lanes import Lane


def runs(task: Task, group: Group) -> tuple[Run, Run]:
    """Make a task ready for synchronous and for asynchronous calls; all ranks call it together and get the same.

    Raises:
        Unavailable: shared memory cannot grow to the longest row; raised on all ranks.
    """
    lanes = group.meet(task.device).lanes
    if task.name == "hierarchical":
        inside, between = (level.meet(task.device).lanes for level in group.levels())
        run, later = (_over_levels(task, *pair) for pair in zip(inside, between, strict=True))
    else:
        run = route(task, lanes[0])
        later = run if lanes[1] is lanes[0] else route(task, lanes[1])
    return run, later


def route(task: Task, lane: Lane) -> Run:
    """Make a task of one level ready on one lane."""
    for memory in lane.memories:
        if run := memory.prepare(task):
            return run
    if task.splits:
        algorithm = partial(all_to_all, in_rows=task.splits[0], out_rows=task.splits[1])
    else:
        algorithm = partial(ALGORITHMS[task.name], pieces=task.pieces)

    def run_algorithm(x: torch.Tensor, out: torch.Tensor) -> int:
        return algorithm(x, out, task.codec, lane.messages)

    return OnRows(run_algorithm, (task.rows, task.cols), lane.abandon)


def _over_levels(task: Task, inside: Lane, between: Lane) -> Run:
    assert isinstance(task.codec, Levels)
    ranks = inside.messages.ranks
    prepare = lru_cache(maxsize=64)(partial(route, lane=inside))
    if task.rows and task.cols:
        # Room in memory is made now, on the caller's thread, because all ranks make it together.
        hosts = between.messages.ranks.world_size
        _, cols = cut(task.rows, task.cols, task.codec, ranks.world_size * hosts * task.pieces)
        for part in inside_tasks(task.codec, ranks.world_size, cols, task.dtype, task.device):
            prepare(part)

    def run_levels(x: torch.Tensor, out: torch.Tensor) -> int:
        return hierarchical(x, out, task.codec, ranks, prepare, between.messages, task.pieces)

    def abandon(why: str):
        inside.abandon(why)
        between.abandon(why)

    return OnRows(run_levels, (task.rows, task.cols), abandon)
