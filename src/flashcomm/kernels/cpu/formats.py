"""The codecs on the CPU: programs of `steps`, run on every row of a message, on several threads.

A program is a table: per step its address and its operands. An operand is a number, or an offset from one of five
registers: where the row comes from, where the next rank's row comes from, where it goes to, the thread's scratch
memory, and whether to add to what is there.
Python writes a program once per codec, row length and type, by the rules of that codec (`_encode`, `_decode`), and
keeps it; one compiled loop, `run_rows`, executes all of them. So a format costs no compilation of its own, and a
wrapper such as Hadamard is a few steps before those of its base.

Hazard: nothing here checks its arguments; `flashcomm.kernels` does.

Source: our own.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, singledispatch
from struct import pack as to_struct
from struct import unpack as from_struct

import numpy as np
import torch
from numba import njit

from flashcomm.codecs import bits as planes
from flashcomm.codecs import groups
from flashcomm.codecs.affine import Affine
from flashcomm.codecs.base import Codec
from flashcomm.codecs.blocks import Block
from flashcomm.codecs.calibrated import Features, Keep, Static
from flashcomm.codecs.cast import Cast
from flashcomm.codecs.hadamard import Hadamard, pieces
from flashcomm.codecs.spike import Spike
from flashcomm.kernels.cpu import ops, simd
from flashcomm.kernels.cpu.ops import BF16, FP16, FP32, Step

KINDS = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}

_NUMBER, _SOURCE, _TARGET, _SCRATCH, _ADD, _NEXT = range(6)


@dataclass(frozen=True, slots=True)
class _Operand:
    """A number, or an offset from a register."""

    register: int
    offset: int = 0

    def __add__(self, more: int) -> "_Operand":
        return _Operand(self.register, self.offset + more)


# Of a step in a table: address, count, then the operands' registers and offsets.
STEP_FIELDS = 2 + 2 * simd.MAX_OPERANDS
# Values that a scratch array has room for beyond a row.
_ROOM = 256

_IN, _OUT, _ADDING, _SUMS, _NEXT_IN = (_Operand(register) for register in (_SOURCE, _TARGET, _ADD, _SCRATCH, _NEXT))


@dataclass(frozen=True, slots=True)
class _Values:
    """A row of values: where it is, of which kind, and whether whole vectors may reach beyond its end."""

    at: _Operand
    kind: int
    roomy: bool
    plus: _Operand | int = 0
    """Where the fp32 are that what is written here is added to, if any."""


class _Program:
    """Steps for one row of `cols` values. The first scratch array holds sums over ranks and outlives the program."""

    def __init__(self, cols: int):
        self.cols = cols
        self._array_bytes = 4 * (cols + _ROOM)
        self._arrays = 1
        self._steps: list[tuple[Step, list[_Operand]]] = []
        self.constants: list[np.ndarray] = []

    def array(self) -> _Operand:
        """Scratch memory for an fp32 per value, and whole vectors beyond it."""
        self._arrays += 1
        return _Operand(_SCRATCH, (self._arrays - 1) * self._array_bytes)

    def row(self) -> _Values:
        """A row of fp32 in scratch memory."""
        return _Values(self.array(), FP32, True)

    def constant(self, array: np.ndarray) -> int:
        """The address of an array that lives as long as the program."""
        self.constants.append(np.ascontiguousarray(array))
        return self.constants[-1].ctypes.data

    @contextmanager
    def shortened(self, by: int):
        """Steps added in this block see a row that is shorter by so many values."""
        self.cols -= by
        yield
        self.cols += by

    def add(self, step: Step, *operands: "_Operand | int"):
        """Append a step."""
        assert len(operands) == step.operands, (step, operands)
        self._steps.append((step, [o if isinstance(o, _Operand) else _Operand(_NUMBER, int(o)) for o in operands]))

    def table(self) -> np.ndarray:
        """[steps, STEP_FIELDS] int64."""
        table = np.zeros((len(self._steps), STEP_FIELDS), np.int64)
        for row, (step, operands) in zip(table, self._steps, strict=True):
            row[:2] = step.address, len(operands)
            row[2 : 2 + len(operands)] = [o.register for o in operands]
            row[2 + simd.MAX_OPERANDS :][: len(operands)] = [o.offset for o in operands]
        return table

    @property
    def scratch_bytes(self) -> int:
        """What the arrays take."""
        return self._arrays * self._array_bytes


def _bits(value: float) -> int:
    return from_struct("<i", to_struct("<f", value))[0]


def _readable(p: _Program, x: _Values, group: int) -> _Values:
    """`x` as the steps can read it: as it is, or widened."""
    in_pairs = x.kind == BF16 and p.cols % 32 == 0 and (group % 32 == 0 or group in (8, 16))
    if in_pairs and p.cols % group and x.roomy and group <= _ROOM:
        p.add(ops.lengthen, x.at, p.cols, groups.count(p.cols, group) * group)
        return x
    if (in_pairs and p.cols % group == 0) or (x.kind == FP32 and (x.roomy or p.cols % 16 == 0)):
        return x
    return _wide(p, x)


def _wide(p: _Program, x: _Values) -> _Values:
    """`x` as fp32 in scratch memory."""
    if x.roomy and x.kind == FP32:
        return x
    row = p.row()
    p.add(ops.widen, x.at, x.kind, p.cols, row.at)
    return row


def _writable(p: _Program, y: _Values, group: int) -> _Values:
    """`y`, or the row to write in its place, which `_deliver` brings there."""
    in_pairs = y.kind == BF16 and p.cols % 32 == group % 2 == 0
    return y if in_pairs or (y.kind == FP32 and (y.roomy or p.cols % 16 == 0)) else p.row()


def _workplace(p: _Program, y: _Values) -> _Values:
    """`y` if it is fp32 in scratch memory and holds nothing yet, or the row to work in before `_deliver`."""
    return y if y.roomy and y.kind == FP32 and y.at != _SUMS else p.row()


def _deliver(p: _Program, row: _Values, y: _Values, clean: bool = False):
    """Bring what lies in `row` to `y`; `clean` if its NaN may be of any kind."""
    if row is y:
        return
    if y.at == _SUMS:
        p.add(ops.accumulate, row.at, p.cols, _ADDING, y.at)
    else:
        p.add(ops.narrow, row.at, p.cols, y.at, y.kind, clean)


def _spread(p: _Program, kind: int, group: int, *arrays: _Operand) -> tuple[int, list[_Operand]]:
    """The unit of the steps that read or write values of `kind`, and the numbers per group spread to it."""
    wide, narrow = (32, 2) if kind == BF16 else (16, 1)
    unit = wide if group % wide == 0 else narrow
    if group == unit:
        return unit, list(arrays)
    spread = [p.array() for _ in arrays]
    for per_group, out in zip(arrays, spread, strict=True):
        p.add(ops.spread, per_group, group // unit, -(-p.cols // unit), out)
    return unit, spread


def _pack(p: _Program, codes: _Operand, n: int, bits: int, target: _Operand):
    full, rest = n // 128 * 128, n % 128
    if bits == 8:
        p.add(ops.copy_bytes, codes, n, target)
        return
    if full:
        p.add(ops.pack, codes, full, bits, target)
    target, shift = target + full * bits // 8, 0
    for width in planes.PLANES[bits] if rest else ():
        p.add(ops.pack_rest, codes + full, rest, width, shift, target)
        target, shift = target + (rest * width + 7) // 8, shift + width


def _unpack(p: _Program, source: _Operand, n: int, bits: int) -> _Operand:
    """Where the codes are, a byte each."""
    codes = p.array()
    full, rest = n // 128 * 128, n % 128
    if bits == 8:
        if n % 16 == 0:
            return source
        p.add(ops.copy_bytes, source, n, codes)
        return codes
    if full:
        p.add(ops.unpack, source, full, bits, codes)
    source, shift = source + full * bits // 8, 0
    for width in planes.PLANES[bits] if rest else ():
        p.add(ops.unpack_rest, source, rest, width, shift, codes + full)
        source, shift = source + (rest * width + 7) // 8, shift + width
    return codes


def _ranges(p: _Program, x: _Values, group: int) -> tuple[_Operand, _Operand]:
    low, high = p.array(), p.array()
    if x.kind == BF16:
        least, most, count = p.array(), p.array(), groups.count(p.cols, group)
        p.add(ops.shrink_bf16, x.at, count * group, group, least, most)
        p.add(ops.ranges_bf16, least, most, count, 0, low, high)
    else:
        least, most = p.array(), p.array()
        if group % 16 == 0 and p.cols >= group:
            p.add(ops.shrink_fp32, x.at, p.cols, group, least, most)
        p.add(ops.ranges_fp32, least, most, x.at, p.cols, group, low, high)
    return low, high


def _magnitudes(p: _Program, x: _Values, group: int) -> _Operand:
    amax = p.array()
    if x.kind == BF16:
        most, count = p.array(), groups.count(p.cols, group)
        p.add(ops.shrink_magnitudes, x.at, count * group, group, most)
        p.add(ops.magnitudes_bf16, most, count, amax)
    else:
        p.add(ops.magnitudes_fp32, x.at, p.cols, group, amax)
    return amax


@singledispatch
def _encode(codec: Codec, p: _Program, x: _Values, target: _Operand) -> None:
    """Append the steps that encode the row `x` into the payload at `target`."""
    raise NotImplementedError(f"no CPU kernel for {codec}")


@singledispatch
def _decode(codec: Codec, p: _Program, source: _Operand, y: _Values) -> None:
    """Append the steps that decode the payload at `source` into `y`, or add it to `y` if that is the sums."""
    raise NotImplementedError(f"no CPU kernel for {codec}")


@_encode.register
def _encode_cast(codec: Cast, p: _Program, x: _Values, target: _Operand):
    if x.kind == BF16 and codec.wire == torch.bfloat16 and p.cols % 32 == 0:
        p.add(ops.clean_bf16, x.at, p.cols, target)
        return
    row = x if x.kind == FP32 else _wide(p, x)
    p.add(ops.narrow, row.at, p.cols, target, KINDS[codec.wire], 1)


@_decode.register
def _decode_cast(codec: Cast, p: _Program, source: _Operand, y: _Values):
    if y.plus and codec.wire == torch.bfloat16:
        p.add(ops.add_bf16, source, p.cols, y.plus, y.at)
        return
    if y.at == _SUMS:
        p.add(ops.add_wide, source, KINDS[codec.wire], p.cols, _ADDING, y.at)
        return
    row = _workplace(p, y)
    p.add(ops.widen, source, KINDS[codec.wire], p.cols, row.at)
    _deliver(p, row, y, clean=True)


@_encode.register
def _encode_affine(codec: Affine, p: _Program, x: _Values, target: _Operand):
    group, count = min(codec.group, p.cols), groups.count(p.cols, codec.group)
    x = _readable(p, x, group)
    low, high = _ranges(p, x, group)
    zero, inverse, flag, meta = (p.array() for _ in range(4))
    last = _bits(codec.last)
    p.add(ops.affine_scales, low, high, count, codec.symmetric, last, zero, inverse, flag, meta)
    unit, (zeros, inverses) = _spread(p, x.kind, group, zero, inverse)
    codes = target if codec.bits == 8 and p.cols % 16 == 0 else p.array()
    p.add(ops.quantise, x.at, x.kind, p.cols, unit, zeros, inverses, 0, codes)
    p.add(ops.forget, flag, inverse, p.cols, group, codes)
    if codes is not target:
        _pack(p, codes, p.cols, codec.bits, target)
    p.add(ops.copy_bytes, meta, (2 if codec.symmetric else 4) * count, target + planes.code_bytes(p.cols, codec.bits))


@_decode.register
def _decode_affine(codec: Affine, p: _Program, source: _Operand, y: _Values):
    group, count = min(codec.group, p.cols), groups.count(p.cols, codec.group)
    meta, zero, scale = (p.array() for _ in range(3))
    p.add(ops.copy_bytes, source + planes.code_bytes(p.cols, codec.bits), (2 if codec.symmetric else 4) * count, meta)
    p.add(ops.affine_meta, meta, count, codec.symmetric, _bits(codec.last), zero, scale)
    codes = _unpack(p, source, p.cols, codec.bits)
    row = _writable(p, y, group)
    unit, (scales, zeros) = _spread(p, row.kind, group, scale, zero)
    adding = _ADDING if row.at == _SUMS else y.plus
    p.add(ops.dequantise, codes, p.cols, unit, scales, zeros, adding, row.at, row.kind)
    _deliver(p, row, y)


@_encode.register
def _encode_block(codec: Block, p: _Program, x: _Values, target: _Operand):
    group, count = min(codec.group, p.cols), groups.count(p.cols, codec.group)
    element, _ = codec.parts
    x = _readable(p, x, group)
    amax = _magnitudes(p, x, group)
    inverse, flag, meta = (p.array() for _ in range(3))
    behind = target + planes.code_bytes(p.cols, element.bits)
    operands = (amax, count, _bits(codec.limit), inverse, flag, meta)
    if codec.scale == "e8m0":
        p.add(ops.scales_e8m0, *operands)
        p.add(ops.copy_bytes, meta, count, behind)
    elif codec.scale == "fp32":
        p.add(ops.scales_fp32, *operands)
        p.add(ops.copy_bytes, meta, 4 * count, behind)
    elif codec.scale == "e4m3":
        p.add(ops.scales_e4m3, *operands, behind + count)
        p.add(ops.copy_bytes, meta, count, behind)
    else:
        p.add(ops.scales_e5m0, *operands, behind + planes.code_bytes(count, 5))
        _pack(p, meta, count, 5, behind)
    unit, (inverses,) = _spread(p, x.kind, group, inverse)
    codes = target if element.bits == 8 and p.cols % 16 == 0 else p.array()
    form = (element.bits, element.mantissa, element.lowest, element.last)
    p.add(ops.round_floats, x.at, x.kind, p.cols, unit, inverses, *form, codes)
    p.add(ops.forget, flag, inverse, p.cols, group, codes)
    if codes is not target:
        _pack(p, codes, p.cols, element.bits, target)


@_decode.register
def _decode_block(codec: Block, p: _Program, source: _Operand, y: _Values):
    group, count = min(codec.group, p.cols), groups.count(p.cols, codec.group)
    element, _ = codec.parts
    behind = source + planes.code_bytes(p.cols, element.bits)
    meta, scale = p.array(), p.array()
    if codec.scale == "e5m0":
        below = _unpack(p, behind, count, 5)
        p.add(ops.meta_e5m0, below, behind + planes.code_bytes(count, 5), count, scale)
    elif codec.scale == "fp32":
        p.add(ops.copy_bytes, behind, 4 * count, scale)
    else:
        p.add(ops.copy_bytes, behind, count, meta)
        if codec.scale == "e8m0":
            p.add(ops.meta_e8m0, meta, count, scale)
        else:
            p.add(ops.meta_e4m3, meta, behind + count, count, scale)
    codes = _unpack(p, source, p.cols, element.bits)
    row = _writable(p, y, group)
    unit, (scales,) = _spread(p, row.kind, group, scale)
    form = (element.bits, element.mantissa, element.lowest, _ADDING if row.at == _SUMS else 0)
    p.add(ops.read_floats, codes, p.cols, unit, scales, *form, row.at, row.kind)
    _deliver(p, row, y)


@_encode.register
def _encode_spike(codec: Spike, p: _Program, x: _Values, target: _Operand):
    base, group, count = codec.base, min(codec.group, p.cols), groups.count(p.cols, codec.group)
    places, zero, inverse, flag, spikes, meta, codes = (p.array() for _ in range(7))
    if x.kind == BF16 and group % 32 == p.cols % group == 0:
        low, high = _ranges(p, x, group)
        a, b, least, most = (p.array() for _ in range(4))
        p.add(ops.find_spikes_bf16, x.at, p.cols, group, places, low, high, least, most)
        p.add(ops.ranges_bf16, least, most, count, 1, a, b)
    else:
        x = _wide(p, x)
        low, high, a, b = (p.array() for _ in range(4))
        if group % 16 == 0:
            p.add(ops.shrink_spikes, x.at, p.cols, group, low, a, high, b)
            p.add(ops.two_smallest, low, a, p.cols // group)
            p.add(ops.two_largest, high, b, p.cols // group)
        p.add(ops.find_spikes, x.at, p.cols, group, places, low, high, a, b)
    form = (count, base.bits, base.symmetric)
    p.add(ops.spike_scales, low, high, a, b, *form, zero, inverse, flag, spikes, meta)
    unit, (zeros, inverses) = _spread(p, x.kind, group, zero, inverse)
    p.add(ops.quantise, x.at, x.kind, p.cols, unit, zeros, inverses, _bits(base.last), codes)
    p.add(ops.forget, flag, inverse, p.cols, group, codes)
    sections = codec.sections(p.cols)
    _pack(p, codes, p.cols, base.bits, target)
    p.add(ops.copy_bytes, spikes, sections[1], target + sections[0])
    p.add(ops.copy_bytes, meta, sections[2], target + sum(sections[:2]))
    p.add(ops.copy_bytes, meta + count + 16, sections[3], target + sum(sections[:3]))
    _pack(p, places, 2 * count, codec.place_bits, target + sum(sections[:4]))


@_decode.register
def _decode_spike(codec: Spike, p: _Program, source: _Operand, y: _Values):
    base, group, count = codec.base, min(codec.group, p.cols), groups.count(p.cols, codec.group)
    spikes, scale_codes, centres, zero, scale, low, high = (p.array() for _ in range(7))
    sections = codec.sections(p.cols)
    for i, array in ((1, spikes), (2, scale_codes), (3, centres)):
        p.add(ops.copy_bytes, source + sum(sections[:i]), sections[i], array)
    form = (count, base.bits, base.symmetric)
    p.add(ops.spike_meta, spikes, scale_codes, centres, *form, zero, scale, low, high)
    codes = _unpack(p, source, p.cols, base.bits)
    # Spikes replace values, so they must be in place before anything is added to a sum.
    row = p.row() if y.at == _SUMS else _writable(p, y, group)
    unit, (scales, zeros) = _spread(p, row.kind, group, scale, zero)
    p.add(ops.dequantise, codes, p.cols, unit, scales, zeros, 0, row.at, row.kind)
    places = _unpack(p, source + sum(sections[:4]), 2 * count, codec.place_bits)
    p.add(ops.put_spikes, places, low, high, p.cols, group, row.at, row.kind)
    _deliver(p, row, y)


def _transform(
    p: _Program, row: _Values, group: int, factors: "_Operand | int", ahead: "_Operand | int", *, forward: bool
):
    """`ahead` is what to fetch meanwhile: the next row that comes in, or where this one goes."""
    full, rest = p.cols // group, p.cols % group
    for n, blocks, first in ((group, full, 0), (rest, 1, full)):
        for start, size in pieces(n) if blocks else ():
            at, own = row.at + (first * group + start) * 4, factors if isinstance(factors, int) else factors + first * 4
            p.add(ops.hadamard, at, blocks, size, n, _bits(1.0 / size if forward else 1.0), own, ahead)


@_encode.register
def _encode_hadamard(codec: Hadamard, p: _Program, x: _Values, target: _Operand):
    count, row, alpha = groups.count(p.cols, codec.group), p.row(), 0
    p.add(ops.widen, x.at, x.kind, p.cols, row.at)
    if codec.adaptive:
        alpha = p.array()
        p.add(ops.adapt, row.at, p.cols, codec.group, alpha)
        p.add(ops.copy_bytes, alpha, 4 * count, target + codec.base.payload_bytes(p.cols))
    _transform(p, row, codec.group, alpha, x.at + p.cols * (2 if x.kind != FP32 else 4), forward=True)
    _encode(codec.base, p, row, target)


@_decode.register
def _decode_hadamard(codec: Hadamard, p: _Program, source: _Operand, y: _Values):
    count, alpha = groups.count(p.cols, codec.group), 0
    row = _workplace(p, y)
    _decode(codec.base, p, source, row)
    if codec.adaptive:
        alpha = p.array()
        p.add(ops.copy_bytes, source + codec.base.payload_bytes(p.cols), 4 * count, alpha)
        p.add(ops.invert, alpha, count)
    _transform(p, row, codec.group, alpha, 0 if y.at == _SUMS else y.at, forward=False)
    _deliver(p, row, y, clean=True)


@_encode.register
def _encode_keep(codec: Keep, p: _Program, x: _Values, target: _Operand):
    codec.check(p.cols)
    x = x if x.kind == BF16 else _wide(p, x)
    rest, features = _Values(p.array(), x.kind, True), np.array(codec.kept, np.int64)
    sent = target + codec.base.payload_bytes(p.cols - len(features))
    p.add(ops.take_out, x.at, x.kind, p.cols, p.constant(features), len(features), rest.at, sent)
    with p.shortened(len(features)):
        _encode(codec.base, p, rest, target)


@_decode.register
def _decode_keep(codec: Keep, p: _Program, source: _Operand, y: _Values):
    codec.check(p.cols)
    row = y if y.kind == BF16 else _workplace(p, y)
    rest, features = _Values(p.array(), row.kind, True), np.array(codec.kept, np.int64)
    with p.shortened(len(features)):
        _decode(codec.base, p, source, rest)
    sent = source + codec.base.payload_bytes(p.cols - len(features))
    p.add(ops.put_back, rest.at, sent, p.constant(features), len(features), p.cols, row.at, row.kind)
    _deliver(p, row, y)


@lru_cache(maxsize=4096)
def _tables(features: Features, bits: int) -> np.ndarray:
    """The scales of all ranks and of the sum, each row with room for a whole vector more."""
    return np.pad(Static(bits, features).tables().numpy(), ((0, 0), (0, 16)))


def _features(codec: Static) -> Features:
    assert codec.features is not None
    return codec.features


@_encode.register
def _encode_static(codec: Static, p: _Program, x: _Values, target: _Operand):
    codec.check(p.cols)
    x, codes = _wide(p, x), p.array()
    scale = _tables(_features(codec), codec.bits)[codec.table]
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    operands = p.constant(scale * np.float32(-codec.last / 2)), p.constant(inverse)
    p.add(ops.quantise, x.at, FP32, p.cols, 1, *operands, _bits(codec.last), codes)
    p.add(ops.mark_nan, x.at, p.cols, int(codec.last) + 1, codes)
    _pack(p, codes, p.cols, codec.bits, target)
    p.add(ops.put_byte, codec.table, target + planes.code_bytes(p.cols, codec.bits))


@_decode.register
def _decode_static(codec: Static, p: _Program, source: _Operand, y: _Values):
    codec.check(p.cols)
    tables, scale, zero = _tables(_features(codec), codec.bits), p.array(), p.array()
    number = source + planes.code_bytes(p.cols, codec.bits)
    factor = _bits(-codec.last / 2)
    p.add(ops.pick_table, number, p.constant(tables), len(tables), tables.strides[0], factor, p.cols, scale, zero)
    codes = _unpack(p, source, p.cols, codec.bits)
    row = _workplace(p, y)
    p.add(ops.dequantise, codes, p.cols, 1, scale, zero, 0, row.at, FP32)
    p.add(ops.unmark_nan, codes, p.cols, int(codec.last) + 1, row.at)
    _deliver(p, row, y)


@dataclass(frozen=True, slots=True)
class Run:
    """A program per rank and one after the last rank, ready to run on rows."""

    each: np.ndarray
    after: np.ndarray
    scratch_bytes: int
    constants: list[np.ndarray]
    """Kept alive for the steps."""
    times: int = 1
    """For how many ranks `each` runs; `after` sees those that are left, if any."""


# Flat tensors may have any length, so programs are not kept for ever.
_remembered = lru_cache(maxsize=4096)


def _ready(each: _Program, after: _Program | None = None, times: int = 1) -> Run:
    after = after or _Program(each.cols)
    scratch_bytes = max(each.scratch_bytes, after.scratch_bytes)
    return Run(each.table(), after.table(), scratch_bytes, each.constants + after.constants, times)


@_remembered
def encoder(codec: Codec, cols: int, kind: int) -> Run:
    p = _Program(cols)
    _encode(codec, p, _Values(_IN, kind, False), _OUT)
    return _ready(p)


@_remembered
def decoder(codec: Codec, cols: int, kind: int, ranks: int) -> Run:
    """What decodes a row of one rank, or adds those of several."""
    each, after, out = _Program(cols), _Program(cols), _Values(_OUT, kind, False)
    if ranks == 1:
        _decode(codec, each, _IN, out)
        return _ready(each)
    if ranks == 2 and isinstance(codec, Cast) and KINDS[codec.wire] == kind and cols % 32 == 0:
        # Two payloads that are the values themselves need no sums in between.
        after.add(ops.add_two, _IN, _NEXT_IN, kind, cols, _OUT)
        return _ready(each, after, times=0)
    _decode(codec, each, _IN, _Values(_SUMS, FP32, True))
    if (
        kind == BF16
        and cols % 32 == 0
        and (codec == Cast(torch.bfloat16) or (isinstance(codec, Affine) and not min(codec.group, cols) % 32))
    ):
        # The last rank's values need not go into the sums to come out again.
        _decode(codec, after, _IN, _Values(_OUT, kind, False, _SUMS))
        return _ready(each, after, times=ranks - 1)
    after.add(ops.narrow, _SUMS, cols, _OUT, kind, 1)
    return _ready(each, after, times=ranks)


@_remembered
def reducer(codec: Codec, out_codec: Codec, cols: int, ranks: int) -> Run:
    sums, each, after = _Values(_SUMS, FP32, True), _Program(cols), _Program(cols)
    _decode(codec, each, _IN, sums)
    _encode(out_codec, after, sums, _OUT)
    return _ready(each, after, times=ranks)


def _rows(each, ranks, rank_stride, source, source_stride, after, target, target_stride, scratch, first, last):
    operands = np.empty(simd.MAX_OPERANDS, np.int64)
    registers = np.zeros(6, np.int64)
    registers[_SCRATCH] = scratch.ctypes.data
    for r in range(first, last):
        # Inside the loop: numba frees an array after the last line that names it.
        at = operands.ctypes.data
        registers[_TARGET] = target + r * target_stride
        for rank in range(ranks + 1):
            table = each if rank < ranks else after
            registers[_SOURCE] = source + rank * rank_stride + r * source_stride
            registers[_NEXT] = registers[_SOURCE] + rank_stride
            registers[_ADD] = registers[_SCRATCH] if rank > 0 else 0
            for s in range(table.shape[0]):
                count = table[s, 1]
                for i in range(count):
                    operands[i] = registers[table[s, 2 + i]] + table[s, 2 + simd.MAX_OPERANDS + i]
                simd.call(table[s, 0], at, count)  # pyright: ignore[reportCallIssue]


run_rows = ops.compiled(lambda on_disk: njit(nogil=True, error_model="numpy", cache=on_disk)(_rows))
"""Run the programs on rows `first` to `last`: `each` for every rank, then `after`. `scratch` is a uint8 array."""


def supports(codec: Codec) -> bool:
    """Whether there are steps for `codec` and all that it wraps."""
    # By its very type: a subclass may mean other bytes.
    return type(codec) in _encode.registry and (not isinstance(codec, Hadamard | Keep) or supports(codec.base))


@cache
def pool(threads):
    """The threads that share the rows of a large message."""
    return ThreadPoolExecutor(threads, thread_name_prefix="flashcomm-cpu")


# Below this many values a second thread costs more than it saves (measured 2026-11-20, 2 cores: 20 us to hand over).
_VALUES_PER_THREAD = 1 << 16


def _over_rows(run: Run, ranks, rank_stride, source: torch.Tensor, target: torch.Tensor, cols: int):
    """Run over all rows of `target`, on as many threads as torch is set to use."""
    rows = target.shape[0]
    from_stride, to_stride = (t.stride(-2) * t.element_size() for t in (source, target))
    fixed = (run.each, run.times, rank_stride, source.data_ptr(), from_stride, run.after, target.data_ptr(), to_stride)
    threads = max(1, min(torch.get_num_threads(), rows, rows * cols * ranks // _VALUES_PER_THREAD))
    over = lambda first, last: run_rows(*fixed, np.empty(run.scratch_bytes, np.uint8), first, last)  # noqa: E731
    if threads == 1:
        over(0, rows)
        return
    edges = [rows * t // threads for t in range(threads + 1)]
    list(pool(threads).map(over, edges[:-1], edges[1:]))


def encode(x, codec, out):
    """[rows, cols] bf16, fp16 or fp32 with unit stride in a row -> out[rows, payload_bytes(cols)] uint8."""
    cols = x.shape[1]
    _over_rows(encoder(codec, cols, KINDS[x.dtype]), 1, 0, x, out, cols)


def decode_sum(payloads, codec, out):
    """payloads[ranks, rows, payload_bytes(cols)] -> out[rows, cols], summed in fp32 in rank order."""
    ranks, cols = payloads.shape[0], out.shape[1]
    run = decoder(codec, cols, KINDS[out.dtype], ranks)
    _over_rows(run, ranks, payloads.stride(0), payloads, out, cols)


def decode_sum_encode(payloads, codec, out_codec, cols, out):
    """payloads[ranks, rows, bytes] in `codec` -> out[rows, bytes] in `out_codec`; the sum itself stays in fp32."""
    ranks = payloads.shape[0]
    _over_rows(reducer(codec, out_codec, cols, ranks), ranks, payloads.stride(0), payloads, out, cols)
