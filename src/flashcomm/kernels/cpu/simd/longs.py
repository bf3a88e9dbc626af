"""Scalars: integers of 8 to 64 bits in memory, the bits of an fp32, the smaller and the larger."""

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from flashcomm.kernels.cpu.simd.vectors import F32, I32, I64, load_raw, store_raw


@intrinsic
def lowest_bit(typingctx, mask):
    """Position of the lowest bit that is set."""

    def codegen(context, builder, sig, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return signature(types.int64, types.int64), codegen


@intrinsic
def bits_of(typingctx, value):
    """The 32-bit pattern of an fp32."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], I32)

    return signature(types.uint32, types.float32), codegen


@intrinsic
def from_bits(typingctx, pattern):
    """The fp32 whose pattern is the lower 32 bits of an integer."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.trunc(args[0], I32), F32)

    return signature(types.float32, types.int64), codegen


def _make_word(bits):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            loaded = load_raw(builder, args[0], ir.IntType(bits), 1)
            return builder.sext(loaded, ir.IntType(64)) if bits < 64 else loaded

        return signature(types.int64, types.int64), codegen

    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            value = builder.trunc(args[1], ir.IntType(bits)) if bits < 64 else args[1]
            store_raw(builder, value, args[0], ir.IntType(bits), 1)
            return context.get_dummy_value()

        return signature(types.void, types.int64, types.int64), codegen

    return load, store


# Loads extend the sign.
load_byte, store_byte = _make_word(8)


load_half, store_half = _make_word(16)


load_word, store_word = _make_word(32)


load_long, store_long = _make_word(64)


@intrinsic
def field(typingctx, at, i):
    """The i-th int64 at an address."""

    def codegen(context, builder, sig, args):
        return load_raw(builder, builder.add(args[0], builder.shl(args[1], ir.Constant(I64, 3))), I64, 1)

    return signature(types.int64, types.int64, types.int64), codegen


def _make_long_extreme(less):
    @intrinsic
    def extreme(typingctx, a, b):
        def codegen(context, builder, sig, args):
            return builder.select(builder.icmp_signed("<" if less else ">", *args), *args)

        return signature(types.int64, types.int64, types.int64), codegen

    return extreme


# The smaller and the larger of two integers. numba's own min and max are compiled anew for each op, 0.03 s a time.
long_min, long_max = (_make_long_extreme(less) for less in (True, False))
