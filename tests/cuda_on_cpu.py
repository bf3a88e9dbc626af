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

from flashcomm.codecs import Lossless
from flashcomm.kernels.gpu.cuda import compiler, launch
from flashcomm.kernels.gpu.cuda.driver import Arguments, EntropyArguments
from flashcomm.transports.symmetric import collective

COMPILER = shutil.which("g++") or shutil.which("clang++")
_HEADER = Path(__file__).with_suffix(".h")
_SOURCE = Path(compiler.__file__).with_name("codecs.cu")
_FRAME = """
#include "{header}"
#define KERNEL(...) extern "C" void
#include "{source}"
#include "{entropy}"
struct Arguments {{
  const u8* source; i64 rank_stride, row_stride; u8* target; i64 target_stride, rows; int ranks, cols;
  const Tables* tables; int size;
}};
static Arguments given;
template <class S, class T, class L, bool SUM> void lane_of_move() {{
  move_rows<S, T, L, SUM>(given.source, given.rank_stride, given.row_stride, given.target, given.target_stride,
                          given.rows, given.ranks, given.cols);
}}
template <class D, class Out, bool SUM> void lane_of_unpack() {{
  unpack_rows<D, Out, SUM>(given.source, given.rank_stride, given.row_stride, given.target, given.target_stride,
                           given.rows, given.ranks, given.cols);
}}
"""
_ENTROPY = """
template <class Out, int MOST> void lane_of_{name}() {{
  decode_rows<Out, MOST>(given.source, given.rank_stride, given.row_stride, given.target, given.target_stride,
                         given.rows, given.ranks, given.cols, *given.tables, given.size);
}}
extern "C" int {name}(Arguments arguments) {{
  given = arguments, misaligned = 0;
  i64 streams = arguments.rows * (arguments.cols < SECOND_PAIR ? 2 : 4);
  run_blocks<lane_of_{name}<{DECODED}, {MOST_RANKS}>>(1, int((streams + 31) / 32), 32);
  return misaligned;
}}
"""
_UNPACK = """
extern "C" int {name}(Arguments arguments) {{
  given = arguments, misaligned = 0;
  run<lane_of_unpack<{UNPACK}>>();
  return misaligned;
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


def _compiled(text: str, *options: str) -> ctypes.CDLL:
    """Compile C++ that includes the kernels, or load it from disk."""
    options = ("-std=c++17", "-O0", "-fPIC", "-shared", "-ffp-contract=off", *options)
    sources = [path.read_text() for path in (_SOURCE, launch.ENTROPY, _HEADER)]
    key = hashlib.sha256(repr((text, options, sources)).encode()).hexdigest()[:16]
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
    return ctypes.CDLL(str(library))


class Kernels:
    """Kernels of the given macros, compiled together; launch one by `move`."""

    def __init__(self, kinds: Iterable[Macros], *, e4m3_by_hardware: bool = False):
        text = _FRAME.format(header=_HEADER, source=_SOURCE, entropy=launch.ENTROPY)
        for kind in sorted(set(kinds)):
            one = _UNPACK if "UNPACK" in dict(kind) else _ENTROPY if "DECODED" in dict(kind) else _ONE
            text += one.format(name=_name(kind), **dict(kind))
        self.library = _compiled(text, f"-DE4M3_BY_HARDWARE={int(e4m3_by_hardware)}")

    def move(
        self, source: torch.Tensor, source_format: str, target: torch.Tensor, target_format: str, cols: int
    ) -> str:
        """Fill `target` [T, ...] from `source` [R, T, ...] as `launch._move` does on a GPU; returns the layout."""
        layout, arguments, macros = launch.plan(source, source_format, target, target_format, cols)
        self._run(macros, arguments)
        return layout

    def unpack(self, payloads: torch.Tensor, codec: Lossless, out: torch.Tensor):
        """Fill `out` [T, H] as `launch._unpack` does on a GPU."""
        macros = launch.unpack_macros(codec, out.dtype, len(payloads) > 1)
        self._run(macros, launch.arguments_of(payloads, out, out.shape[1]))

    def decode_entropy(self, payloads: torch.Tensor, out: torch.Tensor):
        """Fill `out` [T, H] as `launch._decode_entropy` does on a GPU."""
        self._run(launch.entropy_macros(out.dtype, len(payloads)), launch.entropy_arguments(payloads, out))

    def _run(self, macros: Macros, arguments: Arguments):
        function = getattr(self.library, _name(macros))
        function.argtypes, function.restype = [EntropyArguments], ctypes.c_int
        arguments = EntropyArguments.from_buffer_copy(bytes(arguments).ljust(ctypes.sizeof(EntropyArguments), b"\0"))
        assert function(arguments) == 0, "accesses that are not aligned"


@functools.lru_cache(maxsize=64)
def kernels(kinds: tuple[Macros, ...], e4m3_by_hardware: bool = False) -> Kernels:
    """The same, compiled once for a process."""
    return Kernels(kinds, e4m3_by_hardware=e4m3_by_hardware)


_COLLECTIVES = """
#include "{header}"
#define KERNEL(...) extern "C" void
#include "{source}"
extern "C" i64 num_events() {{ return events.size(); }}
extern "C" const Event* first_event() {{ return events.data(); }}
"""
_VERSION = """
namespace version{number} {{
{exchange}
static Exchange given[MOST_RANKS];
template <Algorithm A, class V, class F, class S, int R> void thread_of() {{
  exchange_rows<A, V, F, S, R>(given[this_rank()]);
}}
}}
"""
_COLLECTIVE = """
extern "C" int {name}_{number}(const void* ranks, int count, int blocks, int threads, u64 seed, const u8* memory,
                               i64 bytes) {{
  using namespace version{number};
  memcpy(given, ranks, count * sizeof *given);
  misaligned = 0, traced = memory, traced_bytes = bytes, events.clear();
  run_blocks<thread_of<{COLLECTIVE}>>(count, blocks, threads, seed);
  return misaligned;
}}
"""


class Event(ctypes.Structure):
    """An access to the memory of ranks, or what puts accesses in order; see the header."""

    _fields_ = [(name, ctypes.c_int64) for name in ("kind", "thread", "address", "value")]


class Collectives:
    """Kernels of `exchange.cu`, compiled together.

    Args:
        kinds: macros.
        faults: of each further version of the source, what stands there, what instead, and the macros of its kernels.
    """

    def __init__(self, kinds: Iterable[Macros], faults: Iterable[tuple[str, str, Macros]] = ()):
        right = collective.SOURCE.read_text()
        text = _COLLECTIVES.format(header=_HEADER, source=_SOURCE)
        versions = [(right, sorted(set(kinds)))]
        for line, instead, macros in faults:
            assert line in right, f"the fault no longer fits: {line}"
            versions.append((right.replace(line, instead), [macros]))
        for number, (exchange, its) in enumerate(versions):
            text += _VERSION.format(number=number, exchange=exchange)
            text += "".join(_COLLECTIVE.format(number=number, name=_name(kind), **dict(kind)) for kind in its)
        self.library = _compiled(text)
        self.library.num_events.restype = ctypes.c_int64
        self.library.first_event.restype = ctypes.POINTER(Event)

    def run(
        self, launches: list, seed: int = 0, memory: torch.Tensor | None = None, version: int = 0
    ) -> list[tuple[int, int, int, int]]:
        """Run one launch of every rank; return the events in `memory`, uint8 [R, bytes], if given.

        Ranks, blocks and threads take turns: in order, or as `seed` draws. Versions but the first have a fault.
        """
        (macros,), (blocks,), (threads,) = ({launch[i] for launch in launches} for i in range(3))
        function = getattr(self.library, f"{_name(macros)}_{version}")
        function.restype = ctypes.c_int
        arguments = (collective.Exchange * len(launches))(*(launch.argument for launch in launches))
        where = (memory.data_ptr(), memory.numel()) if memory is not None else (0, 0)
        numbers = [len(launches), blocks, threads, ctypes.c_uint64(seed), *map(ctypes.c_int64, where)]
        assert function(arguments, *numbers) == 0, "accesses that are not aligned"
        events = self.library.first_event()[: self.library.num_events()]
        return [(event.kind, event.thread, event.address, event.value) for event in events]
