"""Hosts, meshes and levels: arithmetic on the numbers of ranks, and the process groups that follow from it."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed import device_mesh


def num_hosts(hosts: Sequence[int]) -> int:
    """Number of hosts that can be a level, from the host of each rank; 0 if they cannot.

    >>> num_hosts([0, 0, 1, 1]), num_hosts([0, 1, 1])
    (2, 0)
    """
    members = [[rank for rank, theirs in enumerate(hosts) if theirs == host] for host in dict.fromkeys(hosts)]
    return len(members) if len({len(ranks) for ranks in members}) == 1 and _ascends(members) else 0


def process_group(group: Any) -> "dist.ProcessGroup | device_mesh.DeviceMesh":
    """The process group that a caller means, or a mesh that has two levels.

    Raises:
        ValueError: torch.distributed is not initialised, this rank is not in `group`, or the mesh is not a group.
    """
    world = dist.group.WORLD
    if world is None:
        raise ValueError(
            "torch.distributed has no process group yet: call torch.distributed.init_process_group() first, "
            "for example in a script started by torchrun"
        )
    if group is None or isinstance(group, dist.ProcessGroup):
        return world if group is None else group
    if not isinstance(group, device_mesh.DeviceMesh):
        raise ValueError(f"group must be a process group that this rank belongs to, or a DeviceMesh, not {group!r}")
    if group.ndim not in (1, 2):
        raise ValueError(
            f"a mesh of {group.ndim} dimensions, {list(group.shape)}, is no group: give one of 2, hosts and the ranks "
            "of each, or of 1. Of a larger mesh take a part by the names of its dimensions, such as "
            "mesh['host', 'rank']"
        )
    if group.get_coordinate() is None:
        raise ValueError(
            f"group must be a mesh that this rank belongs to: rank {dist.get_rank()} is not in {group.mesh.tolist()}"
        )
    if group.ndim == 1 or 1 in group.shape:
        # One row or one column is all ranks, without levels.
        return group.get_group(0 if group.ndim == 1 or group.shape[1] == 1 else 1)
    return group


def all_ranks(
    rows: list[list[int]], between: dist.ProcessGroup, inside: dist.ProcessGroup
) -> tuple[dist.ProcessGroup, tuple[int, ...]]:
    """The group of all ranks of a mesh, and the host of each.

    Args:
        rows: the ranks of each host.
        between: the group of dimension 0, as this rank has it.
        inside: the group of dimension 1.

    Raises:
        ValueError: ranks that do not ascend along both dimensions, or groups that are not those of the mesh.
    """
    if not _ascends(rows):
        tidy = sorted(map(sorted, rows))
        advice = f"{tidy} has the same hosts" if _ascends(tidy) else "Start the ranks of a host one after the other"
        raise ValueError(
            f"the ranks of a mesh must ascend along both dimensions, as torch numbers those of its groups: not {rows}. "
            + advice
        )
    mine = next(row for row in rows if dist.get_rank() in row)
    if dist.get_process_group_ranks(inside) != mine:
        raise ValueError(
            f"the group of dimension 1 must have the ranks {mine} as the mesh {rows} says, not "
            f"{dist.get_process_group_ranks(inside)}: let DeviceMesh or init_device_mesh make its groups"
        )
    members, backend = sorted(itertools.chain(*rows)), dist.get_backend(inside)
    group, whole = dist.group.WORLD, len(members) == dist.get_world_size()
    if not whole or dist.get_backend(group) != backend:
        _even_out(inside, between)
        group = _new_group(members, backend)
    assert isinstance(group, dist.ProcessGroup)
    host_of = {rank: host for host, ranks in enumerate(rows) for rank in ranks}
    return group, tuple(host_of[rank] for rank in members)


def new_levels(group: dist.ProcessGroup, hosts: Sequence[int]) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """New groups: the ranks of this rank's host, and the ranks with the same place on every host."""
    rank, global_ranks = dist.get_rank(group), dist.get_process_group_ranks(group)
    place = [hosts[:other].count(host) for other, host in enumerate(hosts)]
    _even_out(group)
    groups = []
    for labels in (hosts, place):
        members = [global_ranks[other] for other in range(len(hosts)) if labels[other] == labels[rank]]
        groups.append(_new_group(members, dist.get_backend(group)))
    return groups[0], groups[1]


def _ascends(rows: Sequence[Sequence[int]]) -> bool:
    """Whether ranks ascend along rows and columns.

    torch numbers the ranks of a group in ascending order, so only then is a row's i-th rank in the i-th column's group,
    and the i-th rank of a column in the i-th row's.
    """
    return all(list(line) == sorted(line) for line in (*rows, *zip(*rows, strict=True)))


def _new_group(members: Sequence[int], backend: str) -> dist.ProcessGroup:
    """Make a group without the rest of the world.

    From torch 2.14 on, its count of groups is in the names of such groups, and they add to it. So a rank that makes one
    would wait under another name than the rest in the next group of the whole world. Here names have numbers of their
    own, and the count stays.
    """
    world = dist.distributed_c10d._world
    count, world.group_count = world.group_count, next(_numbers)
    try:
        group = dist.new_group(list(members), backend=backend, use_local_synchronization=True)
    finally:
        world.group_count = count
    assert isinstance(group, dist.ProcessGroup)
    return group


_numbers = itertools.count(1 << 40)
"""Numbers of the next groups of `_new_group`, far beyond torch's."""


def _even_out(*groups: dist.ProcessGroup):
    """Let all ranks name the next group of `_new_group` alike.

    Before 2.14 torch names it by its ranks and by the number of groups that a rank is in, so a rank in more of them
    would wait for another name. Over a mesh's row and then its column the largest number reaches all of its ranks.
    """
    global _numbers
    names = dist.distributed_c10d._world.pg_names
    most, number = len(names), next(_numbers)
    for group in groups:
        counts: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(counts, (most, number), group=group)
        most, number = (max(column) for column in zip(*counts, strict=True))
    while len(names) < most:
        _new_group([dist.get_rank()], "gloo")
    _numbers = itertools.count(number + most)
