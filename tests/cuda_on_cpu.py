"""The CUDA C++ kernels on the CPU: the same source, compiled by the system's C++ compiler beside `cuda_on_cpu.h`."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from flashcomm.kernels.gpu.cuda import compiler, launch
from flashcomm.kernels.gpu.cuda.driver import Arguments

COMPILER = shutil.which("g++") or shutil.which("clang++")
_HEADER = Path(__file__).with_suffix(".h")
_FRAME = """
#include "{header}"
#define KERNEL extern "C" void
#include "{source}"
struct Arguments {{
  const u8* source; i64 rank_stride, row_stride; u8* target; i64 target_stride, rows; int ranks, cols;
}};
static Arguments given;
template <class S, class T, class L, bool SUM> void lane_of_move() {{
  move_rows<S, T, L, SUM>(given.source, given.rank_stride, given.row_stride, given.target, given.target_stride,
                          given.rows, given.ranks, given.cols);
}}
"""
_ONE = """
extern "C" int {name}(Arguments arguments) {{
  given = arguments, misaligned = 0;
  run<lane_of_move<{SOURCE}, {TARGET}, {LAYOUT}, {SUM_RANKS}>>();
  return misaligned;
}}
"""

Macros = tuple[tuple[str, str], ...]


def _name(macros: Macros) -> str:
    return "move_" + hashlib.sha256(repr(macros).encode()).hexdigest()[:16]


class Kernels:
    """Kernels of the given macros, compiled together; launch one by `move`."""

    def __init__(self, kinds: Iterable[Macros], *, e4m3_by_hardware: bool = False):
        kinds = sorted(set(kinds))
        source = Path(compiler.__file__).with_name("codecs.cu")
        text = _FRAME.format(header=_HEADER, source=source)
        text += "".join(_ONE.format(name=_name(kind), **dict(kind)) for kind in kinds)
        options = [
            "-std=c++17",
            "-O0",
            "-fPIC",
            "-shared",
            "-ffp-contract=off",
            f"-DE4M3_BY_HARDWARE={int(e4m3_by_hardware)}",
        ]
        key = hashlib.sha256(repr((text, options, source.read_text(), _HEADER.read_text())).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"flashcomm-cuda-on-cpu-{os.getuid()}"
        folder.mkdir(exist_ok=True)
        library = folder / f"{key}.so"
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as work:
                code, made = Path(work) / "kernels.cpp", Path(work) / "kernels.so"
                code.write_text(text)
                done = subprocess.run([COMPILER, *options, code, "-o", made], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr[-3000:]
                os.replace(made, library)
        self.library = ctypes.CDLL(str(library))

    def move(
        self, source: torch.Tensor, source_format: str, target: torch.Tensor, target_format: str, cols: int
    ) -> str:
        """Fill `target` [T, ...] from `source` [R, T, ...] as `launch._move` does on a GPU; returns the layout."""
        layout, arguments, macros = launch.plan(source, source_format, target, target_format, cols)
        function = getattr(self.library, _name(macros))
        function.argtypes, function.restype = [Arguments], ctypes.c_int
        assert function(arguments) == 0, f"{layout}: accesses that are not aligned"
        return layout


@functools.lru_cache(maxsize=64)
def kernels(kinds: tuple[Macros, ...], e4m3_by_hardware: bool = False) -> Kernels:
    """The same, compiled once for a process."""
    return Kernels(kinds, e4m3_by_hardware=e4m3_by_hardware)
