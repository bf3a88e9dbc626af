"""Replace attributes of frameworks and models, and put them back: one record for the whole process.

    patches = Patches("flashcomm.integrations.vllm")
    patches.wrap(GroupCoordinator, "all_reduce", lambda original: ...)
    patches.undo()

The record knows what was replaced and by whom, so nothing is replaced twice: the second replacement would be lost, or
would come back, when the first one is undone.

Source: our own.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False, slots=True)
class _Patch:
    """One replaced attribute. It keeps its owner alive, so that `id` stays its own."""

    by: str
    owner: Any
    name: str
    before: Any
    own: bool
    """Whether the owner itself held the attribute, rather than its class or a base."""

    def restore(self):
        if self.own:
            setattr(self.owner, self.name, self.before)
        else:
            delattr(self.owner, self.name)


_record: dict[tuple[int, str], _Patch] = {}
_lock = threading.RLock()


class Patches:
    """The attributes that one part of flashcomm has replaced.

    Args:
        by: name of that part, for error messages.

    >>> class Engine:
    ...     def run(self):
    ...         return 1
    >>> patches = Patches("an example")
    >>> patches.wrap(Engine, "run", lambda original: lambda self: 10 * original(self))
    >>> Engine().run()
    10
    >>> patches.undo()
    >>> Engine().run()
    1
    """

    def __init__(self, by: str):
        self.by = by
        self._made: list[_Patch] = []

    def replace(self, owner: Any, name: str, value: Any):
        """Replace an attribute until `undo`.

        Args:
            owner: a class, a module or an object.
            name: of the attribute; it must exist.
            value: what it becomes.

        Raises:
            RuntimeError: it is replaced already; the message says by whom.
        """
        with _lock:
            if patch := _record.get((id(owner), name)):
                what = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
                raise RuntimeError(f"{self.by} cannot replace {what}: {patch.by} has replaced it. Undo that first")
            held = vars(owner)
            own = name in held
            patch = _Patch(self.by, owner, name, held[name] if own else getattr(owner, name), own)
            setattr(owner, name, value)
            _record[id(owner), name] = patch
            self._made.append(patch)

    def wrap(self, owner: Any, name: str, wrapper: Callable[[Callable], Callable]):
        """Replace a function by what `wrapper` makes of it; the arguments and errors are those of `replace`."""
        original = getattr(owner, name)
        self.replace(owner, name, functools.wraps(original)(wrapper(original)))

    def has(self, owner: Any, name: str) -> bool:
        """Whether this part has replaced the attribute."""
        return any(patch.owner is owner and patch.name == name for patch in self._made)

    def undo(self):
        """Put everything back, the latest first. Harmless when repeated."""
        with _lock:
            while self._made:
                patch = self._made.pop()
                del _record[id(patch.owner), patch.name]
                patch.restore()
