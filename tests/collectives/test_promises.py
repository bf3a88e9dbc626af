"""Promises 1 to 7 of docs/design.md for every world size, and the proof that each check can fail.

In one process over both kinds of messages, where seven ranks cost no more than their arithmetic, and on real ranks over
each way that bytes take between them.
"""

import pytest

import promises
import ranks
from loopback import Loopback
from thorough import thorough

IN_ONE_PROCESS = [(1, False), (2, False), (3, False), (5, False), (4, True), thorough(7, False), thorough(2, True)]
ON_RANKS = [
    *[(1, "memory"), (2, "memory"), (2, "connections"), (2, "gloo")],
    *[thorough(4, "memory"), thorough(5, "connections"), thorough(3, "gloo")],
]


def in_one_process(promise, world_size: int, bulk: bool = False, **kwargs) -> list[list[str]]:
    loop = Loopback(world_size, bulk=bulk)
    return loop.run(lambda rank, _: promise(promises.Member(loop.groups[rank], **kwargs)))


@pytest.mark.parametrize("promise", promises.PROMISES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("world_size", "bulk"), IN_ONE_PROCESS, ids=lambda x: {False: "direct", True: "bulk"}.get(x))
def test_promise_in_one_process(promise, world_size, bulk):
    assert in_one_process(promise, world_size, bulk) == [[]] * world_size


@pytest.mark.parametrize("promise", promises.PROMISES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("world_size", "by"), ON_RANKS)
def test_promise(promise, world_size, by):
    violations = ranks.shared(world_size, by=by).run(promises.check, promise)
    assert violations == [[]] * world_size


@pytest.mark.parametrize(
    ("promise", "broken"), list(zip(promises.PROMISES, promises.BROKEN, strict=True)), ids=lambda f: f.__name__
)
def test_the_check_catches_a_broken_all_reduce(promise, broken):
    violations = in_one_process(promise, 4, function=broken)
    assert any(violations), f"{promise.__name__} does not notice {broken.__name__}"
