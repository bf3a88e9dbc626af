"""Walsh-Hadamard transforms of runs of 1 to 128 values in registers."""

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from flashcomm.kernels.cpu.simd.compares import folded
from flashcomm.kernels.cpu.simd.memory import load_values, put_bf16_twice
from flashcomm.kernels.cpu.simd.vectors import (
    F32,
    I16,
    I32,
    LANES,
    fmuladd,
    int_constant,
    lanes,
    load_raw,
    moved,
    splatted,
    store_raw,
)


def _butterfly(builder, v, apart):
    """Apply one stage of a Walsh-Hadamard transform to sixteen lanes: a + b, a - b for values `apart` lanes apart."""
    index = ir.VectorType(I32, LANES)
    partners = ir.Constant(index, [ir.Constant(I32, i ^ apart) for i in range(LANES)])
    signs = ir.Constant(lanes.ir_type, [ir.Constant(F32, -1.0 if i & apart else 1.0) for i in range(LANES)])
    partner = builder.shuffle_vector(v, ir.Constant(lanes.ir_type, ir.Undefined), partners)
    return fmuladd(builder, v, signs, partner)


def _inside(builder, v, size):
    """Transform runs of up to sixteen values within a vector."""
    apart = 1
    while apart < min(size, LANES):
        v = _butterfly(builder, v, apart)
        apart *= 2
    return v


def _across(builder, rows, size, apart=1):
    """Finish the transform of runs of `size` values in several vectors, from a distance of `apart` vectors on."""
    while apart < size // LANES:
        for i in range(len(rows)):
            if not i & apart:
                a, b = rows[i], rows[i + apart]
                rows[i], rows[i + apart] = builder.fadd(a, b), builder.fsub(a, b)
        apart *= 2
    return rows


def _make_hadamard(size):
    """Make a function that multiplies `size` fp32 by a factor and transforms them in place; sixteen values at least."""

    @intrinsic
    def transform(typingctx, address, factor):
        def codegen(context, builder, sig, args):
            factors = splatted(builder, args[1], lanes.ir_type)
            count = max(1, size // LANES)
            places = [builder.add(args[0], ir.Constant(ir.IntType(64), 4 * LANES * i)) for i in range(count)]
            rows = [_inside(builder, builder.fmul(load_raw(builder, at, F32, LANES), factors), size) for at in places]
            for at, v in zip(places, _across(builder, rows, size), strict=True):
                store_raw(builder, v, at, F32, LANES)
            return context.get_dummy_value()

        return signature(types.void, types.int64, types.float32), codegen

    return transform


hadamard1, hadamard2, hadamard4, hadamard8 = (_make_hadamard(size) for size in (1, 2, 4, 8))


hadamard16, hadamard32, hadamard64, hadamard128 = (_make_hadamard(size) for size in (16, 32, 64, 128))


def _store_candidates(builder, rows, size, least, most):
    """Store sixteen candidates for the smallest and sixteen for the largest value of each run of `size`.

    Four runs of 32 values share a vector, so they get four candidates each.
    """
    count = size // LANES
    for at, less in ((least, True), (most, False)):
        found = []
        for first in range(0, len(rows), count):
            left = rows[first : first + count]
            while len(left) > 1:
                pairs = zip(left[::2], left[1::2], strict=True)
                left = [builder.select(builder.fcmp_ordered("<" if less else ">", *pair), *pair) for pair in pairs]
            found += left
        if size == 32:
            upper = [folded(builder, lanes, 16, less, *found[i : i + 2]) for i in (0, 2)]
            found = [folded(builder, lanes, 8, less, *upper)]
        for i, v in enumerate(found):
            store_raw(builder, v, moved(builder, at, 4 * LANES * i), F32, LANES)


def _make_hadamard_ranges(kind, size):
    """Make a function that multiplies 128 values by a factor, transforms each run of `size` and stores it as fp32.

    Candidates for the smallest and the largest value of each run go to least[] and most[]: see `_store_candidates`.
    """

    @intrinsic
    def transform(typingctx, source, factor, target, least, most):
        def codegen(context, builder, sig, args):
            source, factor, target, least, most = args
            width, factors = {"bf16": 2, "fp32": 4}[kind], splatted(builder, factor, lanes.ir_type)
            rows = []
            for i in range(128 // LANES):
                v = load_values(builder, moved(builder, source, width * LANES * i), kind, LANES)
                rows.append(_inside(builder, builder.fmul(v, factors), size))
            rows = _across(builder, rows, size)
            for i, v in enumerate(rows):
                store_raw(builder, v, moved(builder, target, 4 * LANES * i), F32, LANES)
            _store_candidates(builder, rows, size, least, most)
            return context.get_dummy_value()

        return signature(types.void, types.int64, types.float32, *[types.int64] * 3), codegen

    return transform


hadamard32_ranges_bf16, hadamard64_ranges_bf16, hadamard128_ranges_bf16 = (
    _make_hadamard_ranges("bf16", size) for size in (32, 64, 128)
)


hadamard32_ranges_fp32, hadamard64_ranges_fp32, hadamard128_ranges_fp32 = (
    _make_hadamard_ranges("fp32", size) for size in (32, 64, 128)
)


def _make_hadamard_pairs(size):
    """Make a function like `_make_hadamard_ranges` for bf16 that stores even and odd values apart.

    Sixteen even values, their odd neighbours, and so on: two bf16 share a word, so no lane moves to widen them, and
    the first stage adds whole vectors. The products with the factor are exact, so they cost one operation of a pair.
    """

    @intrinsic
    def transform(typingctx, source, factor, target, least, most):
        def codegen(context, builder, sig, args):
            source, factor, target, least, most = args
            factors, rows = splatted(builder, factor, lanes.ir_type), []
            for i in range(128 // 32):
                pair = load_raw(builder, moved(builder, source, 64 * i), I32, LANES)
                even = builder.bitcast(builder.shl(pair, int_constant(LANES, 16)), lanes.ir_type)
                odd = builder.bitcast(builder.and_(pair, int_constant(LANES, 0xFFFF0000)), lanes.ir_type)
                odd = builder.fmul(odd, factors)
                for v in (fmuladd(builder, even, factors, odd), fmuladd(builder, even, factors, builder.fneg(odd))):
                    rows.append(_inside(builder, v, LANES))
            rows = _across(builder, rows, size, 2)
            for i, v in enumerate(rows):
                store_raw(builder, v, moved(builder, target, 4 * LANES * i), F32, LANES)
            _store_candidates(builder, rows, size, least, most)
            return context.get_dummy_value()

        return signature(types.void, types.int64, types.float32, *[types.int64] * 3), codegen

    return transform


hadamard32_pairs, hadamard64_pairs, hadamard128_pairs = (_make_hadamard_pairs(size) for size in (32, 64, 128))


def _make_hadamard_back(size):
    """Make a function that transforms 128 fp32, each run of `size`, and writes bf16; returns whether one is a NaN."""

    @intrinsic
    def transform(typingctx, source, target):
        def codegen(context, builder, sig, args):
            rows = [load_raw(builder, moved(builder, args[0], 4 * LANES * i), F32, LANES) for i in range(128 // LANES)]
            rows = _across(builder, [_inside(builder, v, size) for v in rows], size)
            found = None
            for i in range(0, len(rows), 2):
                put_bf16_twice(builder, *rows[i : i + 2], moved(builder, args[1], 2 * LANES * i))
                unordered = builder.fcmp_unordered("uno", *rows[i : i + 2])
                found = unordered if found is None else builder.or_(found, unordered)
            return builder.zext(builder.bitcast(found, I16), ir.IntType(64))

        return signature(types.int64, types.int64, types.int64), codegen

    return transform


hadamard32_back, hadamard64_back, hadamard128_back = (_make_hadamard_back(size) for size in (32, 64, 128))
