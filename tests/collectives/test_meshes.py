"""Levels that a DeviceMesh gives: the bits that one process predicts, whichever ranks are declared to be a host."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import flashcomm
import promises
import ranks
import values
from flashcomm.collectives.group import group_of
from flashcomm.collectives.topology import num_hosts
from thorough import thorough

INTERLEAVED = [[0, 2], [1, 3]]


def levels_of_a_mesh(rows):
    """Every rank runs this; those outside of the mesh only help to make it."""
    mesh, rank, hosts = DeviceMesh("cpu", rows), dist.get_rank(), len(rows)
    order = [r for row in rows for r in row]
    if rank not in order:
        with pytest.raises(ValueError, match=rf"a mesh that this rank belongs to: rank {rank} is not in \[\["):
            flashcomm.all_reduce(torch.ones(4), "bf16/int4g128", mesh, algorithm="hierarchical")
        return None
    if rank == order[0]:
        # Ranks may be in different numbers of groups, by which torch names new ones. torch 2.14 counts this one for
        # those of the whole world, too, which could make no more: the next tests would wait for ever.
        world = dist.distributed_c10d._world
        count = world.group_count
        dist.new_group([rank], use_local_synchronization=True)
        world.group_count = count
    for spec in ("bf16/int4g128", "int8g128/int4g128:int8g128", "fp32/mxfp4"):
        for shape in ((64, 1024), (3, 300), (7,)):
            for dtype in values.DTYPES:
                xs = {r: promises.tensor(r, shape, dtype) for r in order}
                want = flashcomm.simulate.all_reduce([xs[r] for r in order], spec, "hierarchical", hosts=hosts)
                got = flashcomm.all_reduce(xs[rank], spec, mesh, algorithm="hierarchical")
                later = flashcomm.all_reduce(xs[rank], spec, mesh, algorithm="hierarchical", async_op=True)
                assert promises.same(got, want), (spec, shape, dtype)
                assert promises.same(later.wait(), want), (spec, shape, dtype)
    # What a rank sends between hosts is its share, and auto knows the levels.
    flashcomm.reset_stats()
    flashcomm.all_reduce(torch.zeros(96, 1024), "int4g128", mesh)
    row = flashcomm.codec("int4g128").payload_bytes(1024, torch.float32)
    assert flashcomm.stats()["wire_bytes"] == 2 * (hosts - 1) * 96 * row // hosts // len(rows[0])
    assert flashcomm.stats()["calls"] == {"all_reduce/hierarchical/fp32/int4g128": 1}
    assert list(flashcomm.stats()["reasons"].values()) == [{"fewest bytes between hosts": 1}]
    home = group_of(mesh)
    return home.ranks.rank, list(home.meet(torch.device("cpu")).hosts)


def verbs_over_a_mesh(rows):
    mesh, size, rank = DeviceMesh("cpu", rows), dist.get_world_size(), dist.get_rank()
    x = promises.tensor(rank, (2 * size, 256))
    for verb, options in (
        (flashcomm.all_reduce, {"algorithm": "one_step"}),
        (flashcomm.all_reduce, {"algorithm": "two_step"}),
        (flashcomm.all_reduce, {"algorithm": "plain"}),
        (flashcomm.reduce_scatter, {}),
        (flashcomm.all_gather, {}),
        (flashcomm.all_to_all, {}),
    ):
        want = verb(x, "int8g128", **options)
        assert promises.same(verb(x, "int8g128", mesh, **options), want)
        assert promises.same(verb(x, "int8g128", mesh, async_op=True, **options).wait(), want)


def one_dimension():
    size, rank = dist.get_world_size(), dist.get_rank()
    line = init_device_mesh("cpu", (size,))
    assert group_of(line) is group_of(line.get_group())
    # A row or a column has no levels; its ranks find out by themselves what they share.
    row, column = init_device_mesh("cpu", (1, size)), init_device_mesh("cpu", (size, 1))
    assert group_of(row) is group_of(row.get_group(1))
    assert group_of(column) is group_of(column.get_group(0))
    x = promises.tensor(rank, (5, 256))
    want = flashcomm.all_reduce(x, "int8g128", algorithm="two_step")
    for mesh in (line, row, column):
        assert promises.same(flashcomm.all_reduce(x, "int8g128", mesh, algorithm="two_step"), want)
        with pytest.raises(ValueError, match="this group of 4 has one host. Use two_step, or say what is a host with"):
            flashcomm.all_reduce(x, "int8g128", mesh, algorithm="hierarchical")
    # A dimension of a larger mesh is a mesh of one.
    part = init_device_mesh("cpu", (2, 2), mesh_dim_names=("host", "rank"))["rank"]
    pair = [promises.tensor(r, (5, 256)) for r in (rank // 2 * 2, rank // 2 * 2 + 1)]
    got = flashcomm.all_reduce(x, "int8g128", part, algorithm="one_step")
    assert promises.same(got, flashcomm.simulate.all_reduce(pair, "int8g128", "one_step"))


def refusals():
    x = torch.ones(4, 128)
    cube = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("a", "b", "c"))
    for mesh, message in (
        (cube, r"a mesh of 3 dimensions, \[2, 2, 1\], is no group: give one of 2, .* mesh\['host', 'rank'\]"),
        (
            DeviceMesh("cpu", [[1, 0], [3, 2]]),
            r"not \[\[1, 0\], \[3, 2\]\]\. \[\[0, 1\], \[2, 3\]\] has the same hosts",
        ),
        (
            DeviceMesh("cpu", [[0, 1], [3, 2]]),
            r"must ascend along both dimensions.* \[\[0, 1\], \[2, 3\]\] has the same",
        ),
        (DeviceMesh("cpu", [[0, 3], [1, 2]]), r"not \[\[0, 3\], \[1, 2\]\]\. Start the ranks of a host one after"),
    ):
        for verb in (flashcomm.all_reduce, flashcomm.reduce_scatter, flashcomm.all_gather, flashcomm.all_to_all):
            with pytest.raises(ValueError, match=message):
                verb(x, "int8g128", mesh)
    rows = init_device_mesh("cpu", (2, 2))
    swapped = DeviceMesh.from_group(
        [rows.get_group(1), rows.get_group(0)], "cpu", torch.arange(4).view(2, 2), mesh_dim_names=("host", "rank")
    )
    with pytest.raises(ValueError, match="the group of dimension 1 must have the ranks"):
        flashcomm.all_reduce(x, "int8g128", swapped)
    # A part of two dimensions is a mesh with levels; it is a new object for every call, with the same state.
    states = {id(group_of(cube["a", "b"])) for _ in range(3)}
    assert len(states) == 1
    groups = dist.distributed_c10d._world.group_count
    for _ in range(3):
        flashcomm.all_reduce(x, "int8g128", cube["a", "b"], algorithm="hierarchical")
    assert dist.distributed_c10d._world.group_count == groups


def lanes_at_the_same_time():
    """Two meshes and the default group have a thread each, over the same group of processes."""
    size, rank = dist.get_world_size(), dist.get_rank()
    groups = [None, DeviceMesh("cpu", [[0, 1], [2, 3]]), DeviceMesh("cpu", INTERLEAVED)]
    for algorithm in ("two_step", "one_step"):
        works = []
        for seed in range(12):
            x = promises.tensor(rank, (40, 256), seed=seed)
            works.append(flashcomm.all_reduce(x, "int4g128", groups[seed % 3], algorithm=algorithm, async_op=True))
        for seed, work in enumerate(works):
            xs = [promises.tensor(r, (40, 256), seed=seed) for r in range(size)]
            assert promises.same(work.wait(), flashcomm.simulate.all_reduce(xs, "int4g128", algorithm))


@pytest.mark.parametrize("by", ranks.WAYS)
@pytest.mark.parametrize("rows", [thorough([[0, 1], [2, 3]]), INTERLEAVED], ids=str)
def test_given_levels_give_the_bits_that_one_process_predicts(rows, by):
    host_of = {r: host for host, row in enumerate(rows) for r in row}
    results = ranks.shared(4, by=by).run(levels_of_a_mesh, rows)
    assert results == [(rank, [host_of[r] for r in range(4)]) for rank in range(4)]


@pytest.mark.parametrize("rows", [[[0, 2], [3, 5]], [[0, 2], [1, 4], [3, 5]]], ids=str)
def test_a_mesh_may_be_a_part_of_the_world_and_have_three_hosts(rows):
    results = ranks.shared(6).run(levels_of_a_mesh, rows)
    members = sorted(r for row in rows for r in row)
    assert [r and r[0] for r in results] == [members.index(r) if r in members else None for r in range(6)]


def groups_made_later(rows):
    """The groups of a part of the world, made for its levels, leave those that the whole world makes later alone."""
    mesh, rank = DeviceMesh("cpu", rows), dist.get_rank()
    for _ in range(2):
        if any(rank in row for row in rows):
            flashcomm.all_reduce(torch.ones(4), "bf16/int4g128", mesh, algorithm="hierarchical")
        later, total = dist.new_group(), torch.ones(1)
        dist.all_reduce(total, group=later)
        assert total.item() == dist.get_world_size()
        mesh = DeviceMesh("cpu", rows)


def test_the_world_makes_groups_after_a_part_of_it_has():
    ranks.shared(6).run(groups_made_later, [[0, 2], [3, 5]])


@pytest.mark.parametrize("rows", [[[0, 1], [2, 3]], INTERLEAVED], ids=str)
def test_all_verbs_see_the_ranks_of_a_mesh_in_ascending_order(rows):
    ranks.shared(4).run(verbs_over_a_mesh, rows)


def test_a_mesh_of_one_dimension_is_its_group():
    ranks.shared(4).run(one_dimension)


def test_meshes_that_are_no_group_are_refused():
    ranks.shared(4).run(refusals)


@pytest.mark.parametrize("by", ["memory", "connections", thorough("gloo")])
def test_meshes_and_the_default_group_do_not_take_each_others_messages(by):
    ranks.shared(4, by=by).run(lanes_at_the_same_time)


def test_hosts_are_a_level_only_where_their_ranks_follow_each_other_alike():
    assert num_hosts([0, 0, 1, 1]) == 2
    assert num_hosts([0, 1, 0, 1]) == 2
    assert num_hosts([0, 0, 1]) == 0
    # The second rank of host 1 is before that of host 0, so torch would number the two of them the other way round.
    assert num_hosts([0, 1, 1, 0]) == 0
