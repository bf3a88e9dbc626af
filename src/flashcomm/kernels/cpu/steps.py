"""Steps that the programs of several formats share: rows in and out, groups, planes, transforms.

Each adds its steps to a program and says where their results are.

Hazard: nothing here checks its arguments; `flashcomm.kernels.verbs` does.

Source: our own.
"""

from struct import pack as to_struct
from struct import unpack as from_struct

from flashcomm.codecs import bits as planes
from flashcomm.codecs import groups
from flashcomm.codecs.hadamard import blocks_of
from flashcomm.kernels.cpu import ops
from flashcomm.kernels.cpu.ops import BF16, FP32
from flashcomm.kernels.cpu.program import ADDING, ROOM, SUMS, Operand, Program, Row


def bits(value: float) -> int:
    """The pattern of an fp32, as steps take it."""
    return from_struct("<i", to_struct("<f", value))[0]


def readable(p: Program, x: Row, group: int) -> Row:
    """Let steps read `x` in place if they can, otherwise widened to fp32."""
    in_pairs = x.kind == BF16 and p.cols % 32 == 0 and (group % 32 == 0 or group in (8, 16))
    if in_pairs and p.cols % group and x.roomy and group <= ROOM:
        p.add(ops.lengthen, x.at, p.cols, groups.count(p.cols, group) * group)
        return x
    if (in_pairs and p.cols % group == 0) or (x.kind == FP32 and (x.roomy or p.cols % 16 == 0)):
        return x
    return wide(p, x)


def wide(p: Program, x: Row) -> Row:
    """Widen `x` to fp32 in scratch memory, unless it is there already."""
    if x.roomy and x.kind == FP32:
        return x
    row = p.row()
    p.add(ops.widen, x.at, x.kind, p.cols, row.at)
    return row


def writable(p: Program, y: Row, group: int) -> Row:
    """Let steps write `y` in place if they can, otherwise a scratch row that `_deliver` brings there."""
    in_pairs = y.kind == BF16 and p.cols % 32 == group % 2 == 0
    return y if in_pairs or (y.kind == FP32 and (y.roomy or p.cols % 16 == 0)) else p.row()


def workplace(p: Program, y: Row) -> Row:
    """Let steps work in `y` if it is fp32 scratch memory without sums in it, otherwise in a row for `_deliver`."""
    return y if y.roomy and y.kind == FP32 and y.at != SUMS else p.row()


def deliver(p: Program, row: Row, y: Row, clean: bool = False):
    """Add `row` to the sums if `y` is them, otherwise narrow it into `y`; `clean` if its NaN may have any pattern."""
    if row is y:
        return
    if y.at == SUMS:
        p.add(ops.accumulate, row.at, p.cols, ADDING, y.at)
    else:
        p.add(ops.narrow, row.at, p.cols, y.at, y.kind, clean)


def spread(p: Program, kind: int, group: int, *arrays: Operand) -> tuple[int, list[Operand]]:
    """Repeat numbers per group so that they are one per unit of a step; returns the unit and the numbers."""
    wide, narrow = (32, 2) if kind == BF16 else (16, 1)
    unit = wide if group % wide == 0 else narrow
    if group == unit:
        return unit, list(arrays)
    spread = [p.array() for _ in arrays]
    for per_group, out in zip(arrays, spread, strict=True):
        p.add(ops.spread, per_group, group // unit, -(-p.cols // unit), out)
    return unit, spread


def pack(p: Program, codes: Operand, n: int, bits: int, target: Operand):
    """Pack `n` codes, a byte each, into bit planes at `target`."""
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


def unpack(p: Program, source: Operand, n: int, bits: int) -> Operand:
    """Unpack `n` codes to a byte each; returns their address."""
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


def ranges(p: Program, x: Row, group: int) -> tuple[Operand, Operand]:
    """Find the smallest and the largest value of each group."""
    if x.ranges:
        return x.ranges
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


def magnitudes(p: Program, x: Row, group: int) -> Operand:
    """Find the largest magnitude of each group."""
    amax = p.array()
    if x.kind == BF16:
        most, count = p.array(), groups.count(p.cols, group)
        p.add(ops.shrink_magnitudes, x.at, count * group, group, most)
        p.add(ops.magnitudes_bf16, most, count, amax)
    else:
        p.add(ops.magnitudes_fp32, x.at, p.cols, group, amax)
    return amax


def convert(p: Program, values: Operand, kind: int, y: Row):
    """Bring values of `kind` to `y`, with one quiet NaN, or add them to it if it is the sums."""
    if y.plus and kind == BF16:
        p.add(ops.add_bf16, values, p.cols, y.plus, y.at)
        return
    if y.at == SUMS:
        p.add(ops.add_wide, values, kind, p.cols, ADDING, y.at)
        return
    row = workplace(p, y)
    p.add(ops.widen, values, kind, p.cols, row.at)
    deliver(p, row, y, clean=True)


def transform(
    p: Program, row: Row, group: int, factors: "Operand | int", ahead: "Operand | int", *, forward: bool, first: int = 0
):
    """Transform the groups of `row` from `first` on in place.

    `ahead` is the address to prefetch: the next row to read, or the one to write.
    """
    full, rest = p.cols // group, p.cols % group
    for n, start, blocks in ((group, first, full - first), (rest, full, 1)):
        for place, size in blocks_of(n) if blocks else ():
            at, own = row.at + (start * group + place) * 4, factors if isinstance(factors, int) else factors + start * 4
            p.add(ops.hadamard, at, blocks, size, n, bits(1.0 / size if forward else 1.0), own, ahead)
