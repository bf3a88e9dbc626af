"""Loads and stores of sixteen lanes: bf16, fp16, fp32 and integers of 8 to 32 bits.

bf16 rounds half to even with integer arithmetic (exact, the same on every CPU). fp16 uses LLVM's `fpext`/`fptrunc`,
which IEEE 754 fixes, or the same in integers on CPUs without such instructions (an x86 without F16C), where LLVM would
call functions that no process has.
"""

import platform

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils, config
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from flashcomm.kernels.cpu.simd.vectors import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    call_intrinsic,
    constant,
    halves,
    int_constant,
    lanes,
    load_raw,
    octets,
    splatted,
    store_raw,
    wide_type,
    words,
)


def _converts_fp16() -> bool:
    """Whether the CPU for which numba compiles has instructions between fp16 and fp32."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return platform.machine() in ("aarch64", "arm64")
    if config.CPU_FEATURES is not None:
        return "+f16c" in config.CPU_FEATURES.split(",")
    return bool(get_host_cpu_features().get("f16c"))


_CONVERTS_FP16 = _converts_fp16()


def _widen_fp16(builder, half, count):
    """fp32 from the bits of fp16; a NaN becomes a quiet one, as by F16C."""
    constant, element = lambda value: int_constant(count, value), wide_type(F32, count)
    half = builder.zext(half, wide_type(I32, count))
    size = builder.and_(half, constant(0x7FFF))
    # The exponent's bias is 127 instead of 15, and all ones stay all ones.
    bits = builder.add(builder.shl(size, constant(13)), constant(112 << 23))
    special = builder.icmp_unsigned(">=", size, constant(0x7C00))
    bits = builder.select(special, builder.add(bits, constant(112 << 23)), bits)
    bits = builder.select(
        builder.icmp_unsigned(">", size, constant(0x7C00)), builder.or_(bits, constant(0x400000)), bits
    )
    # Subnormal numbers are multiples of 2^-24.
    step = builder.bitcast(constant(103 << 23), element)
    small = builder.bitcast(builder.fmul(builder.uitofp(size, element), step), wide_type(I32, count))
    bits = builder.select(builder.icmp_unsigned("<", size, constant(0x400)), small, bits)
    sign = builder.shl(builder.and_(half, constant(0x8000)), constant(16))
    return builder.bitcast(builder.or_(bits, sign), element)


def _narrow_to_fp16(builder, value, count):
    """The bits of fp16 nearest to fp32, half to even; a NaN keeps the top of its payload, as by F16C."""
    constant, integer = lambda value: int_constant(count, value), wide_type(I32, count)
    bits = builder.bitcast(value, integer)
    size = builder.and_(bits, constant(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, constant(13)), constant(1))
    rounded = builder.add(builder.add(builder.sub(size, constant(112 << 23)), constant(0xFFF)), odd)
    half = builder.lshr(rounded, constant(13))
    # The last bit of a sum with 1/2 is worth 2^-24, the step of subnormal numbers.
    add = builder.bitcast(constant(126 << 23), value.type)
    sum_ = builder.bitcast(builder.fadd(builder.bitcast(size, value.type), add), integer)
    small = builder.sub(sum_, constant(126 << 23))
    half = builder.select(builder.icmp_unsigned("<", size, constant(113 << 23)), small, half)
    half = builder.select(builder.icmp_unsigned(">=", size, constant(143 << 23)), constant(0x7C00), half)
    payload = builder.and_(builder.lshr(size, constant(13)), constant(0x3FF))
    half = builder.select(
        builder.icmp_unsigned(">", size, constant(255 << 23)), builder.or_(payload, constant(0x7E00)), half
    )
    sign = builder.and_(builder.lshr(bits, constant(16)), constant(0x8000))
    return builder.trunc(builder.or_(half, sign), wide_type(I16, count))


def load_values(builder, address, kind, count):
    """fp32 from `count` values of `kind` at `address`; widening is exact."""
    half = ir.HalfType() if _CONVERTS_FP16 else I16
    element = {"fp32": F32, "fp16": half, "bf16": I16, "u8": I8}[kind]
    loaded = load_raw(builder, address, element, count)
    if kind == "fp32":
        return loaded
    if kind == "fp16":
        return builder.fpext(loaded, wide_type(F32, count)) if _CONVERTS_FP16 else _widen_fp16(builder, loaded, count)
    loaded = builder.zext(loaded, wide_type(I32, count))
    if kind == "u8":
        return builder.uitofp(loaded, wide_type(F32, count))
    return builder.bitcast(builder.shl(loaded, int_constant(count, 16)), wide_type(F32, count))


def _store(builder, address, value, kind, count):
    element = {"fp32": F32, "fp16": ir.HalfType() if _CONVERTS_FP16 else I16, "bf16": I16}[kind]
    if kind == "fp16" and not _CONVERTS_FP16:
        value = _narrow_to_fp16(builder, value, count)
    elif kind == "fp16":
        value = builder.fptrunc(value, wide_type(element, count))
    elif kind == "bf16":
        # Add 0x7fff plus the bit that becomes the last one, then drop 16 bits.
        bits = builder.bitcast(value, wide_type(I32, count))
        odd = builder.and_(builder.lshr(bits, int_constant(count, 16)), int_constant(count, 1))
        rounded = builder.lshr(
            builder.add(builder.add(bits, int_constant(count, 0x7FFF)), odd), int_constant(count, 16)
        )
        value = builder.trunc(rounded, wide_type(element, count))
    store_raw(builder, value, address, element, count)


def _make_load(kind, count):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            return load_values(builder, args[0], kind, count)

        return signature(lanes if count > 1 else types.float32, types.int64), codegen

    return load


def _make_store(kind, count):
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            _store(builder, args[0], args[1], kind, count)
            return context.get_dummy_value()

        return signature(types.void, types.int64, lanes if count > 1 else types.float32), codegen

    return store


load_bf16, load_fp16, load_fp32, load_u8 = (_make_load(k, LANES) for k in ("bf16", "fp16", "fp32", "u8"))


store_fp16, store_fp32 = (_make_store(k, LANES) for k in ("fp16", "fp32"))


load1_bf16, load1_fp16, load1_fp32 = (_make_load(k, 1) for k in ("bf16", "fp16", "fp32"))


store1_bf16, store1_fp16, store1_fp32 = (_make_store(k, 1) for k in ("bf16", "fp16", "fp32"))


def _make_load_words(element, vector):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            loaded = load_raw(builder, args[0], element, vector.ir_type.count)
            return loaded if element == vector.ir_type.element else builder.zext(loaded, vector.ir_type)

        return signature(vector, types.int64), codegen

    return load


def _make_store_words(element):
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            value = args[1] if element == I32 else builder.trunc(args[1], ir.VectorType(element, LANES))
            store_raw(builder, value, args[0], element, LANES)
            return context.get_dummy_value()

        return signature(types.void, types.int64, words), codegen

    return store


load_words, load_words_u16, load_words_u8 = (_make_load_words(element, words) for element in (I32, I16, I8))


load_halves, load_octets = _make_load_words(I16, halves), _make_load_words(I8, octets)


store_words, store_words_u16, store_words_u8 = (_make_store_words(element) for element in (I32, I16, I8))


def _bf16_in_upper_halves(builder, value):
    bits = builder.bitcast(value, words.ir_type)
    odd_bit = builder.and_(builder.lshr(bits, int_constant(LANES, 16)), int_constant(LANES, 1))
    return builder.add(builder.add(bits, int_constant(LANES, 0x7FFF)), odd_bit)


def put_bf16_twice(builder, first, second, address):
    """Round two vectors half to even to bf16 and store them one behind the other."""
    parts = [builder.bitcast(_bf16_in_upper_halves(builder, value), halves.ir_type) for value in (first, second)]
    upper = ir.Constant(ir.VectorType(I32, 32), [ir.Constant(I32, 2 * i + 1) for i in range(32)])
    store_raw(builder, builder.shuffle_vector(*parts, upper), address, I16, 32)


@intrinsic
def store_bf16_twice(typingctx, address, first, second):
    """Round two vectors half to even to bf16 and store them one behind the other, 32 bf16."""

    def codegen(context, builder, sig, args):
        put_bf16_twice(builder, *args[1:], args[0])
        return context.get_dummy_value()

    return signature(types.void, types.int64, lanes, lanes), codegen


@intrinsic
def store_bf16_pairs(typingctx, address, even, odd):
    """Round the even and the odd values of a row half to even to bf16 and store them interleaved, 32 bf16."""

    def codegen(context, builder, sig, args):
        rounded = [_bf16_in_upper_halves(builder, value) for value in args[1:]]
        low, high = (
            builder.lshr(rounded[0], int_constant(LANES, 16)),
            builder.and_(rounded[1], int_constant(LANES, 0xFFFF0000)),
        )
        store_raw(builder, builder.or_(low, high), args[0], I32, LANES)
        return context.get_dummy_value()

    return signature(types.void, types.int64, lanes, lanes), codegen


def _make_repeat(times):
    @intrinsic
    def repeat(typingctx, address):
        def codegen(context, builder, sig, args):
            count = LANES // times
            loaded = load_raw(builder, args[0], F32, count)
            places = [ir.Constant(I32, i // times) for i in range(LANES)]
            undefined = ir.Constant(loaded.type, ir.Undefined)
            return builder.shuffle_vector(loaded, undefined, ir.Constant(ir.VectorType(I32, LANES), places))

        return signature(lanes, types.int64), codegen

    return repeat


# Load the first fp32 at an address, and repeat each 2, 4 or 8 times to fill sixteen lanes.
repeat2, repeat4, repeat8 = (_make_repeat(times) for times in (2, 4, 8))


@intrinsic
def store_halves(typingctx, address, value):
    """Store all 32 int16."""

    def codegen(context, builder, sig, args):
        store_raw(builder, args[1], args[0], I16, 32)
        return context.get_dummy_value()

    return signature(types.void, types.int64, halves), codegen


@intrinsic
def store_halves_wide(typingctx, address, value):
    """Store all 32 int16 as the upper halves of int32 with lower halves of 0: fp32 from bf16."""

    def codegen(context, builder, sig, args):
        wide = ir.VectorType(I32, 32)
        store_raw(builder, builder.shl(builder.zext(args[1], wide), constant(wide, 16)), args[0], I32, 32)
        return context.get_dummy_value()

    return signature(types.void, types.int64, halves), codegen


@intrinsic
def prefetch(typingctx, address):
    """Prefetch the cache line at `address`, which may lie outside any buffer: a prefetch never faults."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.PointerType(I8))
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer] + [ir.Constant(I32, c) for c in (0, 3, 1)])
        return context.get_dummy_value()

    return signature(types.void, types.int64), codegen


@intrinsic
def gather(typingctx, table, index):
    """Load sixteen int32 of a table at an address, by their numbers."""

    def codegen(context, builder, sig, args):
        wide = ir.VectorType(I64, LANES)
        at = builder.add(splatted(builder, args[0], wide), builder.shl(builder.zext(args[1], wide), constant(wide, 2)))
        pointers = builder.inttoptr(at, ir.VectorType(ir.PointerType(I32), LANES))
        mask = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [ir.Constant(ir.IntType(1), 1)] * LANES)
        operands = [pointers, ir.Constant(I32, 4), mask, ir.Constant(words.ir_type, ir.Undefined)]
        name = f"llvm.masked.gather.v{LANES}i32.v{LANES}p0"
        return call_intrinsic(builder, name, words.ir_type, *operands)

    return signature(words, types.int64, words), codegen
