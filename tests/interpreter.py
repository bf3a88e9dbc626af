"""Triton's interpreter without what it repeats: tests of kernels take a quarter of their time, for the same values.

And with a numpy that is newer than Triton 3.6, which makes an index of an array that has a dimension.

The interpreter calls the function of a `tl.reduce` for one element after the other, patches Triton's language anew for
every function that a kernel calls, and computes whether integers overflow but looks at the answer in debug mode only.
"""

import dataclasses
import functools

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

_patched: set[int] = set()
"""Modules of Triton's language that the launch under way has patched."""


def hasten():
    """Change the interpreter of this process; may be called again."""
    reduce, patch, patch_tensor, launch = (
        interpreter.ReduceOps.generic_reduce,
        interpreter._patch_lang,
        interpreter._patch_lang_tensor,
        interpreter.GridExecutor.__call__,
    )
    if hasattr(reduce, "__wrapped__"):
        return

    @functools.wraps(reduce)
    def reduce_halves(self, inputs):
        values = inputs[0].handle.data
        count = 0 if self.axis is None else values.shape[self.axis]
        return _reduced(self, inputs) if count & (count - 1) == 0 < count else reduce(self, inputs)

    @functools.wraps(patch)
    def patch_once(function):
        modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if modules and modules <= _patched:
            # Since Triton 3.5 there is something to put back.
            return getattr(interpreter, "_LangPatchScope", lambda: None)()
        _patched.update(modules)
        return patch(function)

    @functools.wraps(patch_tensor)
    def patch_index(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    @functools.wraps(launch)
    def launch_anew(self, *args, **kwargs):
        _patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            _patched.clear()

    interpreter.ReduceOps.generic_reduce = reduce_halves
    interpreter._patch_lang = patch_once
    interpreter._patch_lang_tensor = patch_index
    interpreter.GridExecutor.__call__ = launch_anew
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _reduced(self: "interpreter.ReduceOps", inputs: tuple) -> list:
    """Reduce a power of two of values by halves, as a GPU does, with one call for all groups."""
    parts = [x.handle.data for x in inputs]
    while (count := parts[0].shape[self.axis]) > 1:
        halves = [np.split(part, [count // 2], self.axis) for part in parts]
        left = [self.to_tensor(first, x.dtype) for (first, _), x in zip(halves, inputs, strict=True)]
        right = [self.to_tensor(second, x.dtype) for (_, second), x in zip(halves, inputs, strict=True)]
        result = self.combine_fn.fn(*left, *right)
        parts = [one.handle.data for one in (result if isinstance(result, tuple) else (result,))]
    if not self.keep_dims:
        parts = [part.squeeze(self.axis) for part in parts]
    return [self.to_tensor(part, x.dtype) for part, x in zip(parts, inputs, strict=True)]
