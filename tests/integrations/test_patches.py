import types

import pytest
import torch

from flashcomm.integrations.patches import Patches


class Base:
    def inherited(self):
        return "base"

    @staticmethod
    def fixed():
        return "fixed"


class Engine(Base):
    def run(self):
        """Run."""
        return "engine"


def test_everything_is_as_it_was():
    before = dict(vars(Engine)), dict(vars(Base))
    patches, module, block = Patches("a test"), types.ModuleType("module"), torch.nn.Linear(2, 2)
    module.function = function = len
    for owner, name in ((Engine, "run"), (Engine, "inherited"), (Base, "fixed"), (module, "function")):
        assert not patches.has(owner, name)
        patches.replace(owner, name, lambda *args: "replaced")
        assert patches.has(owner, name)
    patches.replace(block, "forward", lambda x: "replaced")
    engine = Engine()
    assert engine.run() == engine.inherited() == engine.fixed() == module.function([]) == block(1) == "replaced"
    patches.undo()
    patches.undo()
    assert (dict(vars(Engine)), dict(vars(Base))) == before
    assert engine.inherited() == "base" and Engine.fixed() == "fixed"
    assert module.function is function
    assert "forward" not in vars(block)


def test_a_wrapper_looks_like_what_it_wraps():
    patches = Patches("a test")
    patches.wrap(Engine, "run", lambda original: lambda self: original(self) + "!")
    assert (Engine().run(), Engine.run.__doc__, Engine.run.__name__) == ("engine!", "Run.", "run")
    patches.undo()
    assert Engine().run() == "engine"


def test_nothing_is_replaced_twice():
    first, second = Patches("the first"), Patches("the second")
    first.replace(Engine, "run", lambda self: 1)
    for patches in (first, second):
        with pytest.raises(RuntimeError, match="cannot replace Engine.run: the first has replaced it. Undo that first"):
            patches.replace(Engine, "run", lambda self: 2)
    second.undo()
    assert Engine().run() == 1
    first.undo()
    second.replace(Engine, "run", lambda self: 2)
    second.undo()
    assert Engine().run() == "engine"


def test_an_attribute_must_exist():
    with pytest.raises(AttributeError, match="nothing"):
        Patches("a test").replace(Engine, "nothing", None)
    assert "nothing" not in vars(Engine)
