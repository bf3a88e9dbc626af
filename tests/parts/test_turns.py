"""Functions that take turns, without ranks: order, results, errors, contexts."""

import contextvars
import gc
from itertools import count

import pytest

pytest.importorskip("greenlet", reason="pip install greenlet")
import greenlet

from flashcomm.parts import turns
from flashcomm.parts.planned import Refused, cut


class Arrival:
    """A transfer that notes when it is waited for."""

    def __init__(self, log, name, error=None):
        self.log, self.name, self.error = log, name, error
        log.append(f"start {name}")

    def wait(self):
        self.log.append(f"wait {self.name}")
        if self.error:
            raise self.error
        return self.name


def sums(log, name, steps=2):
    def function():
        return [turns.wait(Arrival(log, f"{name}{step}")) for step in range(steps)]

    return function


def test_the_first_always_leads_and_transfers_start_before_others_are_waited_for():
    log = []
    assert turns.run([sums(log, "a"), sums(log, "b")]) == [["a0", "a1"], ["b0", "b1"]]
    assert log == ["start a0", "start b0", "wait a0", "start a1", "wait b0", "start b1", "wait a1", "wait b1"]


def test_functions_of_different_lengths_all_finish():
    log = []
    assert turns.run([sums(log, "a", 0), sums(log, "b", 3), sums(log, "c", 1)]) == [[], ["b0", "b1", "b2"], ["c0"]]


def test_outside_of_a_turn_wait_only_waits():
    log = []
    assert turns.wait(Arrival(log, "x")) == "x"
    assert log == ["start x", "wait x"]


def parts_alive():
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is greenlet.greenlet and one.parent]


@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_ends_all_and_waits_for_what_is_under_way(failing, error):
    log, ended = [], []

    def function(name):
        try:
            turns.wait(Arrival(log, f"{name}0"))
            if name == failing:
                raise error
            turns.wait(Arrival(log, f"{name}1", RuntimeError("the group is broken")))
        finally:
            ended.append(name)

    with pytest.raises(error):
        turns.run([lambda name=name: function(name) for name in range(3)])
    assert sorted(ended) == [0, 1, 2]
    started = [entry.split()[1] for entry in log if entry.startswith("start")]
    waited = [entry.split()[1] for entry in log if entry.startswith("wait")]
    assert sorted(started) == sorted(waited)
    assert parts_alive() == []
    assert turns.run([lambda: 1]) == [1]


def test_a_transfer_that_fails_is_the_error():
    def function():
        turns.wait(Arrival([], "a", RuntimeError("lost")))

    with pytest.raises(RuntimeError, match="lost"):
        turns.run([function, function])
    assert parts_alive() == []


def test_a_part_cannot_be_split_once_more():
    with pytest.raises(RuntimeError, match="a part cannot be split once more"):
        turns.run([lambda: turns.run([lambda: 1])])


def test_context_variables_are_the_parts_own():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)

    def function(value):
        assert variable.get() == 7
        variable.set(value)
        turns.wait(Arrival([], "a"))
        return variable.get()

    assert turns.run([lambda: function(1), lambda: function(2)]) == [1, 2]
    assert variable.get() == 7


@pytest.mark.parametrize("shares", [(1, 1), (1, 2, 3), (100, 1, 1)])
def test_cut_gives_every_part_some_tokens(shares):
    for tokens in (*range(len(shares), 40), 1000):
        sizes = cut(tokens, shares)
        assert sum(sizes) == tokens
        assert min(sizes) >= 1
        assert len(sizes) == len(shares)
    with pytest.raises(Refused, match="fewer tokens than parts"):
        cut(len(shares) - 1, shares)


def test_the_order_is_that_of_a_round():
    ticket, order = count(), []

    def function(name):
        for _ in range(3):
            order.append((next(ticket), name))
            turns.wait(Arrival([], name))

    turns.run([lambda name=name: function(name) for name in "abc"])
    assert [name for _, name in order] == list("abcabcabc")
