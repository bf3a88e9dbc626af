"""Links between GPUs, and the facts that a group learns for CUDA tensors; the GPUs themselves are made up."""

import logging

import pytest
import torch
import torch.distributed as dist

import ranks
from calls import new_group
from flashcomm import codecs, planner
from flashcomm.collectives.group import group_of
from flashcomm.errors import RanksDisagree
from flashcomm.integrations.sums import Sums
from flashcomm.planner.choose import GPU_COMPRESSED_BYTES
from flashcomm.policy import Policy
from flashcomm.transports import gpus, lanes
from flashcomm.transports.bulk import Bulk

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("nvlinks", "peers", "links"),
    [
        ([[0, 4, 0], [4, 0, 0], [0, 0, 0]], {2}, [gpus.NVLINK, gpus.NVLINK, gpus.PEER]),
        (None, {1}, [gpus.NVLINK, gpus.PEER, gpus.HOST]),
    ],
)
def test_links_of_a_gpu(nvlinks, peers, links, monkeypatch):
    monkeypatch.setattr(gpus, "_nvlinks", lambda: nvlinks)
    monkeypatch.setattr(gpus, "name_of", lambda device: f"gpu {device.index}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda mine, other: other in peers)
    assert gpus.reach(torch.device("cuda", 0)) == {f"gpu {n}": link for n, link in enumerate(links)}
    assert gpus.reach(CPU) == {}


def test_the_slowest_link_counts_and_one_that_is_not_known_is_not_guessed():
    def slowest(*links):
        return gpus.slowest("aa", ["x", "y"], [dict(zip("xy", pair, strict=True)) for pair in links])

    assert slowest((gpus.NVLINK, gpus.NVLINK), (gpus.HOST, gpus.NVLINK)) == gpus.HOST
    assert gpus.slowest("aa", ["x", ""], [{"x": gpus.NVLINK}, {}]) == ""
    assert gpus.slowest("ab", ["", ""], [{}, {}]) == gpus.NETWORK


@pytest.mark.parametrize(
    ("link", "gate"),
    [
        (gpus.NVLINK, 8 * MIB),
        (gpus.PEER, 256 << 10),
        (gpus.HOST, 256 << 10),
        (gpus.NETWORK, 64 << 10),
        ("", 8 * MIB),
    ],
)
def test_auto_compresses_from_a_size_that_suits_the_link(link, gate):
    facts, codec = planner.Facts(ranks=4, device="cuda", link=link), codecs.parse("int4g128")
    assert not planner.choose(gate, facts, codec).declined
    below = planner.choose(gate - 1, facts, codec)
    assert (below.algorithm, below.declined) == ("plain", True)
    assert below.reason.endswith(f" over {link or 'a link that is not known'}")


def test_messages_over_pcie_through_the_host_travel_in_pieces():
    """Three kernels of one piece run while another is on its way; over NVLink there is nothing to wait for."""
    codec = codecs.parse("int8g128")
    pieces = {
        link: planner.choose(
            256 * MIB, planner.Facts(ranks=4, device="cuda", link=link), codec, algorithm="two_step"
        ).pieces
        for link in (gpus.NVLINK, gpus.PEER, gpus.HOST)
    }
    assert pieces[gpus.HOST] > 1
    assert {pieces[gpus.NVLINK], pieces[gpus.PEER]} == {1}


def met_as_if_on_gpus(one_host):
    """Meet for CUDA tensors, with made-up GPUs on one host or on one for each rank; the facts of both devices."""
    size, rank = dist.get_world_size(), dist.get_rank()
    home, real = group_of(new_group()), (gpus.name_of, gpus.reach, lanes._site, gpus.kind_of)
    gpus.name_of = lambda device: f"{rank}" if device.type == "cuda" else ""
    gpus.reach = lambda device: {f"{r}": gpus.NVLINK for r in range(size)} if device.type == "cuda" else {}
    gpus.kind_of = lambda device: "NVIDIA L4" if device.type == "cuda" else ""
    if not one_host:
        lanes._site = lambda device: real[2](device)._replace(host=f"host {rank}")
    try:
        on_cpu = home.meet(CPU) and home.facts
        meeting = home.meet(CUDA)
    finally:
        gpus.name_of, gpus.reach, lanes._site, gpus.kind_of = real
    assert isinstance(meeting.lane.messages, Bulk)
    # Over gloo its collectives would leave in another order than the caller's own.
    assert meeting.lane.thread is None
    return on_cpu, home.facts, home.facts_for(CUDA), home.name_for(CUDA)


def test_cuda_tensors_have_facts_of_their_own():
    for on_cpu, after, facts, name in ranks.shared(2).run(met_as_if_on_gpus, True):
        # A host may have GPUs with and without NVLink between them.
        assert name.endswith(" with NVIDIA L4, over NVLink")
        assert on_cpu == after
        assert (after.shared, after.device, after.link) == (True, "cpu", "")
        assert (facts.shared, facts.device, facts.link, facts.hosts) == (False, "cuda", gpus.NVLINK, 1)
        assert planner.choose(16 * MIB, facts, codecs.parse("int4g128")).algorithm == "one_step"


def test_ranks_of_cuda_tensors_learn_their_hosts():
    for _, _, facts, name in ranks.shared(2).run(met_as_if_on_gpus, False):
        assert (facts.hosts, facts.link) == (2, gpus.NETWORK)
        # The format for the link between hosts, not the one inside.
        assert str(planner.choose(8 * MIB, facts, codecs.parse("bf16/int4g128")).codec) == "int4g128"
        # Measured costs are kept by ranks, hosts and GPUs.
        assert (name.count("1 on "), name.count(" with NVIDIA L4")) == (2, 2)
        assert name.endswith(", over network")


def met_on_different_devices():
    group = new_group(timeout_s=5)
    with pytest.raises(RanksDisagree) as raised:
        group_of(group).meet(CUDA if dist.get_rank() else CPU)
    return str(raised.value)


def test_ranks_whose_tensors_are_on_different_devices_find_out():
    """Before they open transports, in which each would wait for the other."""
    text = "ranks disagree about this collective: the tensor of rank 0 is on cpu, that of rank 1 on cuda"
    assert ranks.shared(2).run(as_if_on_gpus, met_on_different_devices) == [text] * 2


def as_if_on_gpus(function):
    real = gpus.name_of, gpus.reach, gpus.kind_of
    gpus.name_of, gpus.reach, gpus.kind_of = (lambda device: ""), (lambda device: {}), (lambda device: "")
    try:
        return function()
    finally:
        gpus.name_of, gpus.reach, gpus.kind_of = real


def planned_by_engines():
    home = group_of(None)
    home.meet(CPU)
    sums = Sums(Policy(min_bytes=0), dist.group.WORLD, lambda: False, logging.getLogger("test"))
    return [sums._plan(16 * MIB, codecs.parse("int8g128"), device).declined for device in (CPU, CUDA)]


def test_engines_plan_by_the_device_of_the_tensor():
    # On CPUs the ranks share memory, where compression does not pay.
    assert ranks.shared(2).run(planned_by_engines) == [[True, False]] * 2


def test_side_streams_go_before_the_models_kernels(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: made.append((device, priority)))
    lanes.Lane(None).stream(CUDA)
    assert made == [(CUDA, -1)]


def test_links_and_gates_have_the_same_names():
    assert set(GPU_COMPRESSED_BYTES) == set(gpus.LINKS)
