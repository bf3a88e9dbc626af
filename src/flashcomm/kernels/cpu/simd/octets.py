"""Vectors of 64 bytes, which take 16-bit values apart and compare exponents."""

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from flashcomm.kernels.cpu.simd.vectors import I8, I16, I64, load_raw, octets, splatted, store_raw


@intrinsic
def count_at_least(typingctx, address, least):
    """Number of bytes, unsigned, of 64 at an address that are not below a byte."""

    def codegen(context, builder, sig, args):
        loaded = load_raw(builder, args[0], I8, 64)
        found = builder.icmp_unsigned(">=", loaded, splatted(builder, builder.trunc(args[1], I8), octets.ir_type))
        return builder.ctpop(builder.bitcast(found, I64))

    return signature(types.int64, types.int64, types.int64), codegen


@intrinsic
def bytes_equal(typingctx, address, byte):
    """Compare 64 bytes at an address with one byte; one bit per byte."""

    def codegen(context, builder, sig, args):
        loaded = load_raw(builder, args[0], I8, 64)
        found = builder.icmp_unsigned("==", loaded, splatted(builder, builder.trunc(args[1], I8), octets.ir_type))
        return builder.bitcast(found, I64)

    return signature(types.int64, types.int64, types.int64), codegen


_WIDE_OCTETS = ir.VectorType(I16, 64)


@intrinsic
def store_octets(typingctx, address, value):
    """Store 64 bytes."""

    def codegen(context, builder, sig, args):
        store_raw(builder, args[1], args[0], I8, 64)
        return context.get_dummy_value()

    return signature(types.void, types.int64, octets), codegen


@intrinsic
def load_octets_of_halves(typingctx, address, shift):
    """Load 64 int16, shift them to the right, and keep the lowest byte of each."""

    def codegen(context, builder, sig, args):
        by = splatted(builder, builder.trunc(args[1], I16), _WIDE_OCTETS)
        return builder.trunc(builder.lshr(load_raw(builder, args[0], I16, 64), by), octets.ir_type)

    return signature(octets, types.int64, types.int64), codegen


@intrinsic
def store_halves_of_octets(typingctx, address, sign, first, first_shift, second, second_shift, third):
    """Store 64 int16, each joined from a byte of `sign`, in its upper half, and of `first`, `second` and `third`."""

    def codegen(context, builder, sig, args):
        address, sign, first, first_shift, second, second_shift, third = args

        def shifted(value, by):
            by = splatted(builder, builder.trunc(by, I16), _WIDE_OCTETS)
            return builder.shl(builder.zext(value, _WIDE_OCTETS), by)

        joined = builder.or_(shifted(first, first_shift), shifted(second, second_shift))
        joined = builder.or_(joined, shifted(sign, ir.Constant(I64, 8)))
        store_raw(builder, builder.or_(joined, builder.zext(third, _WIDE_OCTETS)), address, I16, 64)
        return context.get_dummy_value()

    return signature(types.void, types.int64, octets, octets, types.int64, octets, types.int64, octets), codegen


@intrinsic
def octet_min(typingctx, v, most):
    """Replace bytes above `most` by it."""

    def codegen(context, builder, sig, args):
        most = splatted(builder, builder.trunc(args[1], I8), octets.ir_type)
        return builder.select(builder.icmp_unsigned("<", args[0], most), args[0], most)

    return signature(octets, octets, types.int64), codegen


@intrinsic
def octets_bit(typingctx, v, place):
    """One bit of each byte, the first byte's lowest."""

    def codegen(context, builder, sig, args):
        bit = splatted(builder, builder.trunc(builder.shl(ir.Constant(I64, 1), args[1]), I8), octets.ir_type)
        found = builder.icmp_unsigned("!=", builder.and_(args[0], bit), ir.Constant(octets.ir_type, None))
        return builder.bitcast(found, I64)

    return signature(types.int64, octets, types.int64), codegen


@intrinsic
def octets_where(typingctx, mask, byte):
    """64 bytes: one byte where the bit of `mask` is set, 0 elsewhere."""

    def codegen(context, builder, sig, args):
        chosen = builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 64))
        byte = splatted(builder, builder.trunc(args[1], I8), octets.ir_type)
        return builder.select(chosen, byte, ir.Constant(octets.ir_type, None))

    return signature(octets, types.int64, types.int64), codegen
