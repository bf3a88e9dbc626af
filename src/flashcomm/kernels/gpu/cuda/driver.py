"""Launches through the CUDA driver: a compiled kernel of one device, and the call that starts it.

Loaded in the context that torch has made current for the device. Nothing here has run on a GPU yet.
"""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from flashcomm.kernels.gpu.cuda import compiler

THREADS = 128
"""Threads of a block: four warps."""


class Arguments(ctypes.Structure):
    """The kernel's arguments, laid out as the driver takes them."""

    _fields_ = [
        ("source", ctypes.c_uint64),
        ("rank_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("target", ctypes.c_uint64),
        ("target_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("ranks", ctypes.c_int32),
        ("cols", ctypes.c_int32),
    ]


class EntropyArguments(Arguments):
    """Those of `decode_entropy`: where its tables are, and the bytes of a row."""

    _fields_ = [("tables", ctypes.c_uint64), ("size", ctypes.c_int32)]


# The marks of cuLaunchKernel's `extra`: a buffer of arguments, its size, and the end.
_BUFFER, _SIZE, _END = 1, 2, 0


def open_library(name: str) -> ctypes.CDLL:
    """Open the driver."""
    cuda = ctypes.CDLL(name)
    cuda.cuLaunchKernel.argtypes = [ctypes.c_void_p] + 7 * [ctypes.c_uint] + 3 * [ctypes.c_void_p]
    return cuda


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return open_library("libcuda.so.1")


def _check(code: int):
    if code:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()}")


def call(name: str, *arguments: Any):
    """Call a function of the driver.

    Raises:
        RuntimeError: it fails; the message is the driver's.
    """
    _check(getattr(_library(), name)(*arguments))


def make_current(device: int):
    """Make torch's context of the current device current in this thread, which may not have called CUDA before."""
    context = ctypes.c_void_p()
    _check(_library().cuCtxGetCurrent(ctypes.byref(context)))
    if not context.value:
        _check(_library().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _check(_library().cuCtxSetCurrent(context))


class Kernel:
    """One kernel on one device. The device's context must be current when it is made and launched.

    Args:
        code: machine code.
        name: of the kernel in it.
    """

    def __init__(self, code: bytes, name: str = "move"):
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_library().cuModuleLoadData(ctypes.byref(self._module), code))
        _check(_library().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))

    def __call__(self, blocks: int, stream: int, arguments: ctypes.Structure, threads: int = THREADS):
        """Start `blocks` blocks on a stream; the driver copies the arguments before it returns."""
        size = ctypes.c_size_t(ctypes.sizeof(arguments))
        extra = (ctypes.c_void_p * 5)(_BUFFER, ctypes.addressof(arguments), _SIZE, ctypes.addressof(size), _END)
        _check(_library().cuLaunchKernel(self._function, blocks, 1, 1, threads, 1, 1, 0, stream, None, extra))


@lru_cache(maxsize=4096)
def kernel(macros: tuple[tuple[str, str], ...], device: int, name: str = "move", more: Path | None = None) -> Kernel:
    """The kernel of a name with these macros on a device, whose context must be current; `more` as in `compiler`."""
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(compiler.cubin(dict(macros), f"sm_{major}{minor}", more), name)
