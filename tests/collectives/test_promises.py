"""Promises 1 to 7 of docs/design.md for every world size, and the proof that each check can fail."""

import pytest

import promises
import ranks

# Five and seven ranks are more than the cores of many a machine: one way each.
WORLDS = [*((size, by) for size in (1, 2, 3, 4) for by in ranks.WAYS), (5, "connections"), (7, "memory")]


@pytest.mark.parametrize("promise", promises.PROMISES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("world_size", "by"), WORLDS)
def test_promise(promise, world_size, by):
    violations = ranks.shared(world_size, by=by).run(promises.check, promise, "flashcomm")
    assert violations == [[]] * world_size


@pytest.mark.parametrize(
    ("promise", "broken"), list(zip(promises.PROMISES, promises.BROKEN, strict=True)), ids=lambda f: f.__name__
)
def test_the_check_catches_a_broken_all_reduce(promise, broken):
    violations = ranks.shared(4).run(promises.check, promise, broken.__name__)
    assert any(violations), f"{promise.__name__} does not notice {broken.__name__}"
