"""Passes that are planned by times: counts, refusals, the comparison with a graph, and times that drift."""

import contextlib
from dataclasses import replace

import pytest
import torch

pytest.importorskip("greenlet", reason="pip install greenlet")
import flashcomm
from flashcomm.parts import planned
from flashcomm.parts.planned import Planned, Refused
from flashcomm.planner.batches import Requests, Rows
from flashcomm.planner.overlap import Line, Profile

# 16 segments of 1 ms and as many sums: 32 ms in one piece, about half in parts.
EVEN = Profile(segments=(Line(token_s=1e-6),) * 17, sum=Line(token_s=1e-6))


class Clock:
    """In place of time.perf_counter."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Pass:
    """A pass whose times are those of a profile, `slower` times as long; it makes no sums."""

    skips, device = "none", torch.device("cpu")

    def __init__(self, clock, slower=1.0, batch=Rows(1024), refuses=""):
        self.clock, self.slower, self.batch, self.refuses, self.ran = clock, slower, batch, refuses, None

    def _run(self, sizes):
        self.ran = sizes
        self.clock.now += self.slower * EVEN.turns_s(self.batch.parts(sizes, self.skips))
        return "output"

    def whole(self):
        return self._run((self.batch.tokens,))

    def check(self, sizes):
        if self.refuses:
            raise Refused(self.refuses)

    def calls(self, sizes):
        return [lambda: self._run(tuple(sizes)), *[lambda: "output" for _ in sizes[1:]]]

    def joined(self, outputs):
        assert len(outputs) == len(self.ran)
        return outputs[0]

    def waiting(self, wait):
        return contextlib.nullcontext()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(planned.time, "perf_counter", clock)
    monkeypatch.setattr(planned, "slowest", lambda ratio, group: ratio)
    flashcomm.reset_stats()
    return clock


def prefills() -> dict:
    return flashcomm.stats()["prefills"]


def test_times_that_drift_are_measured_anew(clock):
    one = Planned("auto")
    one.profiles["codec"] = EVEN
    for slower in (1.0, 1.0, 1.2, 0.8):
        for _ in range(planned.WINDOW):
            assert one.run(Pass(clock, slower), "codec", None) == "output"
    assert "codec" in one.profiles
    for _ in range(planned.WINDOW):
        one.run(Pass(clock, 1.4), "codec", None)
    assert "codec" not in one.profiles
    assert prefills()["measured anew: times have drifted"] == 1
    # What it was used to is forgotten, too.
    one.profiles["codec"] = EVEN
    for _ in range(2 * planned.WINDOW):
        one.run(Pass(clock, 1.4), "codec", None)
    assert "codec" in one.profiles


@pytest.mark.parametrize("slower, in_parts", [(0.4, False), (1.0, True)])
def test_a_graph_is_compared_before_passes_leave_it(clock, slower, in_parts):
    one = Planned("auto", graphs=True)
    one.profiles["codec"] = EVEN
    first, second = Pass(clock, slower), Pass(clock)
    one.run(first, "codec", None)
    assert len(first.ran) == 1
    assert one.profiles["codec"] == replace(EVEN, whole=pytest.approx(slower))
    one.run(second, "codec", None)
    assert (len(second.ran) > 1) == in_parts
    assert prefills()["in one piece: to compare"] == 1


def test_a_cut_that_is_refused_runs_in_one_piece(clock):
    one, refused = Planned(2), Pass(clock, refuses="a reason")
    assert one.run(refused, "codec", None) == "output"
    assert refused.ran == (1024,)
    assert prefills() == {"in one piece: a reason": 1}


def test_requests_are_cut_between_two_of_them_where_that_balances(clock):
    near, far = Requests(((500, 0), (524, 0))), Requests(((100, 0), (924, 0)))
    for batch, sizes in ((near, (500, 524)), (far, (512, 512))):
        cut = Pass(clock, batch=batch)
        Planned(2).run(cut, "codec", None)
        assert cut.ran == sizes
        whole, parts = batch.parts((1024,), "none"), batch.parts(sizes, "none")
        assert sum(part.tokens for part in parts) == 1024
        # Tokens of a second part see the first part's keys of their own request, and no other's.
        assert (sum(part.pairs for part in parts) == whole[0].pairs) == (batch is near)
