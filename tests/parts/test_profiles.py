"""What is read from the times of a prompt: the profile, on made-up times."""

import math

import pytest
import torch

pytest.importorskip("greenlet", reason="pip install greenlet")
from flashcomm.machine import Seat
from flashcomm.parts import measuring
from flashcomm.parts.measuring import PartTimes, Rate, profile_of
from flashcomm.planner.batches import Rows
from flashcomm.planner.overlap import CROWDED

SIZES = (128, 256, 640)
NAMES = [f"layers.{n}.{module}" for n in range(4) for module in ("attention", "mlp")]


class Ranks:
    """In place of a group: every rank has the times that rank 0 tells, `slower` times as long on the last."""

    def __init__(self, *facts):
        self.facts = facts

    @property
    def ranks(self):
        return self

    def tell(self, fact):
        if not isinstance(fact, tuple):
            return [fact]
        return [change(fact) for change in self.facts]


def times(slow_places=(), token_s=1e-5, sum_s=3e-5, burst_s=0.0):
    parts = []
    for size in SIZES:
        segments = [size * token_s * (2 if n in slow_places else 1) for n in range(len(NAMES) + 1)]
        parts.append(PartTimes(segments, [max(0.0, size * sum_s - burst_s)] * len(NAMES)))
    return parts


def measured(monkeypatch, mine, *others, machines=None, cores=2, device="cpu"):
    """The profile of ranks with these times; each runs one thread on a machine with so many cores."""
    ranks = [mine, *others]
    machines = machines or ["here"] * len(ranks)
    told = [
        lambda fact, n=n: ([*map(tuple, ranks[n])], fact[1], Seat(machines[n], 1, frozenset(range(cores))))
        for n in range(len(ranks))
    ]
    monkeypatch.setattr(measuring, "group_of", lambda group: Ranks(*told))
    rates = [Rate(size, size * 3e-5, size * 1e-5) for size in SIZES[1:]]
    return profile_of(mine, rates, NAMES, Rows(sum(SIZES)).parts(SIZES, "none"), "none", None, torch.device(device))


def test_lines_of_segments_and_sums(monkeypatch):
    profile = measured(monkeypatch, times(), times())
    assert profile.sums == len(NAMES)
    assert math.isclose(profile.segments[0].seconds(1000), 1e-2, rel_tol=1e-6)
    assert math.isclose(profile.sum.seconds(1000), 3e-2, rel_tol=1e-6)
    assert profile.uneven == pytest.approx(0)
    assert profile.burst_s == pytest.approx(0)


def test_a_burst_is_what_a_sum_saves_after_an_idle_time(monkeypatch):
    profile = measured(monkeypatch, times(burst_s=5e-3))
    assert profile.burst_s == pytest.approx(5e-3)
    assert math.isclose(profile.sum.seconds(1000), 3e-2, rel_tol=1e-6)


def test_ranks_that_are_slow_in_turns_are_uneven_and_one_that_always_is_is_not(monkeypatch):
    in_turns = measured(monkeypatch, times(slow_places=(0,)), times(slow_places=(2,)))
    assert 0.05 < in_turns.uneven < 0.2
    always = measured(monkeypatch, times(), times(token_s=2e-5))
    assert always.uneven == pytest.approx(0)
    assert math.isclose(always.segments[0].seconds(1000), 2e-2, rel_tol=1e-6)


def test_sums_take_cores_where_no_core_is_left_on_the_machine(monkeypatch):
    assert measured(monkeypatch, times(), times(), cores=2).busy == pytest.approx(1 / 3)
    assert measured(monkeypatch, *[times()] * 4, cores=2).busy == pytest.approx(2 / 3)
    assert measured(monkeypatch, times(), times(), cores=3).busy == 0
    assert measured(monkeypatch, times(), times(), cores=2).crowded == pytest.approx(CROWDED)
    on_gpus = measured(monkeypatch, *[times()] * 4, cores=2, device="cuda")
    assert (on_gpus.busy, on_gpus.crowded) == (0, 0)
    assert measured(monkeypatch, times(), times(), machines=["here", "there"], cores=2).busy == 0
