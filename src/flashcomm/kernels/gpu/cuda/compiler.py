"""NVRTC, the compiler of CUDA C++ that a CUDA build of torch brings, and its results on disk.

Called through ctypes, so that neither nvcc nor an extension module is needed. The compiler finds its built-in
declarations in a second library, which is loaded first.
"""

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from functools import lru_cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_OPTIONS = ("--fmad=false", "-std=c++17", "-default-device", "-diag-suppress=177")
"""No fused multiply-add but where it is written; all functions are the device's; unused constants are no warning."""


@lru_cache(maxsize=4)
def source(more: Path | None = None) -> str:
    """The text of the kernels, and that of a file whose kernels use them."""
    files = [_FOLDER / "device.cuh", _FOLDER / "codecs.cu", *([more] if more else [])]
    return "".join(file.read_text() for file in files)


@lru_cache(maxsize=1)
def find() -> str | None:
    """Path of NVRTC in the packages of this environment, else its name if the system has it, else None."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        spec = None
    for folder in spec.submodule_search_locations or () if spec else ():
        # libnvrtc.alt is another build of the same.
        if found := sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return str(found[-1])
    import ctypes.util

    return ctypes.util.find_library("nvrtc")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    path = find()
    if path is None:
        raise RuntimeError("NVRTC is not installed: it comes with a CUDA build of torch, or with nvidia-cuda-nvrtc")
    for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(path)


@lru_cache(maxsize=1)
def version() -> tuple[int, int]:
    """Version of NVRTC.

    Raises:
        RuntimeError: it is not installed.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def cache_folder() -> Path:
    """Folder of the compiled kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcomm" / "cuda"


def cubin(macros: dict[str, str], target: str, more: Path | None = None) -> bytes:
    """Machine code of the kernel for a target such as ``sm_90``, from the cache if it was compiled before.

    Args:
        macros: what the source leaves open: SOURCE, TARGET, LAYOUT and SUM_RANKS.
        target: architecture.
        more: file with kernels that use those of the codecs, whose own macros are then given.

    Raises:
        RuntimeError: NVRTC is missing, or refuses the source.
    """
    key = repr((version(), _OPTIONS, target, sorted(macros.items()), source(more)))
    try:
        path = cache_folder() / (hashlib.sha256(key.encode()).hexdigest() + ".cubin")
    except RuntimeError:  # there is no home folder
        return compiled(macros, target, more)
    try:
        return path.read_bytes()
    except OSError:
        code = compiled(macros, target, more)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may write the same file.
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        pass  # compiled again next time
    return code


def compiled(macros: dict[str, str], target: str, more: Path | None = None) -> bytes:
    """Machine code of the kernel, compiled now: see `cubin`."""
    nvrtc, program = _library(), ctypes.c_void_p()
    options = [f"-arch={target}", *_OPTIONS, *(f"-D{name}={value}" for name, value in macros.items())]
    array = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source(more).encode(), b"codecs.cu", 0, None, None), "")
    try:
        code = nvrtc.nvrtcCompileProgram(program, len(options), array)
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        _check(code, log.rstrip(b"\0").decode(errors="replace"))
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of, text_of, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)), "")
    text = ctypes.create_string_buffer(size.value)
    _check(text_of(program, text), "")
    return text.raw


def _check(code: int, log: str):
    if code:
        get = _library().nvrtcGetErrorString
        get.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {get(code).decode()}\n{log}".rstrip())
