"""`flashcomm tune`: costs of a real group, kept, and what `auto` makes of them."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import flashcomm
import ranks
from flashcomm import measured
from flashcomm.bench import tune
from flashcomm.collectives.group import group_of
from flashcomm.planner import Algorithm, Cost, LinkCosts


def tuned_on_ranks(file: str):
    """Measure, keep, meet again in a new group, and see that `auto` goes by what was kept."""
    import os

    group = tune.measure(repeats=1, sizes=(4096, 1 << 20))
    assert group.costs is not None
    home = group_of(None)
    assert group.costs.name == home.name
    again = home.ranks.tell(group.costs.as_dict())
    assert all(costs == again[0] for costs in again), "ranks hold different costs"
    os.environ["FLASHCOMM_TUNING"] = file
    if home.ranks.rank == 0:
        measured.save(group.costs)
    dist.barrier()
    fresh = dist.new_group(list(range(dist.get_world_size())))
    x = torch.ones(64, 1024).bfloat16()
    flashcomm.reset_stats()
    flashcomm.all_reduce(x, "int4g128", fresh)
    facts = group_of(fresh).facts
    assert facts.costs is not None
    assert vars(facts.costs) == vars(group.costs)
    # On this machine only two steps with 4 bits are fast: the decision follows the costs that were kept.
    slow = Cost.measured([(4096, 16.0, 1.0), (1 << 20, 16.0, 2.0)])
    fast = Cost.measured([(4096, 4.25, 0.1), (1 << 20, 4.25, 0.2)])
    group_of(fresh).facts = replace(
        facts, costs=LinkCosts(name="here", plain=slow, compressed={Algorithm(name="two_step", pieces=1): fast})
    )
    group_of(fresh).calls.clear()
    flashcomm.reset_stats()
    flashcomm.all_reduce(x, "int4g128", fresh)
    os.environ["FLASHCOMM_TUNING"] = file + ".none"
    return flashcomm.stats()["reasons"]


@pytest.mark.parametrize("by", ranks.WAYS)
def test_auto_goes_by_what_was_measured(by, tmp_path):
    for reasons in ranks.shared(2, by=by).run(tuned_on_ranks, str(tmp_path / "tuning.json")):
        assert reasons == {"all_reduce/two_step/int4g128": {"measured to win from 1 KiB on": 1}}
    kept = json.loads((tmp_path / "tuning.json").read_text())
    assert list(kept) == [kept[name]["name"] for name in kept]


def test_a_file_that_cannot_be_read_is_ignored_and_said_so(tmp_path, monkeypatch, caplog):
    file = tmp_path / "tuning.json"
    monkeypatch.setenv("FLASHCOMM_TUNING", str(file))
    assert measured.load("gloo: 2 on here") is None
    assert not caplog.records
    for text in ("{", "[]", '{"gloo: 2 on here": {"name": 1}}'):
        file.write_text(text)
        assert measured.load("gloo: 2 on here") is None
        assert "it was not written by 'flashcomm tune'" in caplog.text
        caplog.clear()


def test_machines_are_kept_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHCOMM_TUNING", str(tmp_path / "deep" / "tuning.json"))
    cost = Cost.measured([(4096, 16.0, 1.0)])
    for name in ("a", "b", "a"):
        measured.save(LinkCosts(name=name, plain=cost))
    assert [vars(measured.load(name))["name"] for name in ("a", "b")] == ["a", "b"]
    assert measured.load("c") is None
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tuning.json"]


def device_over(backend):
    real = tune.backend_of, torch.cuda.current_device
    tune.backend_of, torch.cuda.current_device = lambda group, device: backend, lambda: 3
    try:
        return str(tune._device())
    finally:
        tune.backend_of, torch.cuda.current_device = real


@pytest.mark.parametrize(("backend", "device"), [("nccl", "cuda:3"), ("gloo", "cpu"), ("none", "cpu")])
def test_tensors_are_where_the_backend_wants_them(backend, device):
    assert ranks.shared(2).run(device_over, backend) == [device] * 2


def test_calls_on_a_gpu_are_timed_in_a_row():
    """The queue of a GPU hides the cost of a launch, as between the layers of a model."""
    counts = {kind: [tune._calls(size, torch.device(kind)) for size in tune.SIZES] for kind in ("cpu", "cuda")}
    assert counts == {"cpu": [20, 20, 20, 1, 1, 1, 1], "cuda": [20, 20, 20, 20, 20, 5, 5]}


def test_one_rank_has_nothing_to_measure():
    with pytest.raises(ranks.RankFailed, match="one rank has no link to measure: give 2 or more"):
        ranks.shared(1).run(tune.measure)
