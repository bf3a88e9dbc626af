"""Codes as bits: planes of 1, 2 and 4 bits, and codes of variable length joined."""

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from flashcomm.kernels.cpu.simd.vectors import (
    I16,
    I32,
    I64,
    constant,
    int_constant,
    load_raw,
    splatted,
    store_raw,
    words,
)


@intrinsic
def store_bits(typingctx, address, v):
    """Store 16 bytes of the first eight words, with bits of the other eight, one place to the left, in their gaps."""

    def codegen(context, builder, sig, args):
        undefined, index = ir.Constant(words.ir_type, ir.Undefined), ir.VectorType(I32, 8)
        first, second = (
            builder.shuffle_vector(args[1], undefined, ir.Constant(index, [ir.Constant(I32, i + j) for i in range(8)]))
            for j in (0, 8)
        )
        joined = builder.or_(first, builder.shl(second, int_constant(8, 1)))
        store_raw(builder, builder.trunc(joined, ir.VectorType(I16, 8)), args[0], I16, 8)
        return context.get_dummy_value()

    return signature(types.void, types.int64, words), codegen


def _make_planes(width):
    """Make pack and unpack of a plane of 128 codes: byte i of 16 * width bytes holds codes i, i + 16 * width, ..."""
    size = 16 * width
    vector = ir.VectorType(I32, size // 4)
    mask = constant(vector, int.from_bytes(bytes([(1 << width) - 1]) * 4, "little"))

    def moved(builder, address, offset):
        return builder.add(address, ir.Constant(address.type, offset))

    @intrinsic
    def pack(typingctx, codes, shift, plane):
        def codegen(context, builder, sig, args):
            codes, shift, plane = args
            by = splatted(builder, builder.trunc(shift, I32), vector)
            total = None
            for t in range(8 // width):
                part = load_raw(builder, moved(builder, codes, t * size), I32, size // 4)
                part = builder.shl(builder.and_(builder.lshr(part, by), mask), constant(vector, t * width))
                total = part if total is None else builder.or_(total, part)
            store_raw(builder, total, plane, I32, size // 4)
            return context.get_dummy_value()

        return signature(types.void, types.int64, types.int64, types.int64), codegen

    def make_unpack(first):
        @intrinsic
        def unpack(typingctx, plane, shift, codes):
            def codegen(context, builder, sig, args):
                plane, shift, codes = args
                by = splatted(builder, builder.trunc(shift, I32), vector)
                loaded = load_raw(builder, plane, I32, size // 4)
                for t in range(8 // width):
                    part = builder.and_(builder.lshr(loaded, constant(vector, t * width)), mask)
                    at = moved(builder, codes, t * size)
                    if not first:
                        part = builder.or_(builder.shl(part, by), load_raw(builder, at, I32, size // 4))
                    store_raw(builder, part, at, I32, size // 4)
                return context.get_dummy_value()

            return signature(types.void, types.int64, types.int64, types.int64), codegen

        return unpack

    return pack, make_unpack(True), make_unpack(False)


# pack(codes, shift, plane) takes the codes' bits from `shift` on; unpack_first(plane, shift, codes) writes the codes,
# and unpack_more adds bits from `shift` on to the codes that are there.
pack4, unpack4_first, _ = _make_planes(4)


pack2, unpack2_first, unpack2_more = _make_planes(2)


pack1, unpack1_first, unpack1_more = _make_planes(1)


def _make_join(forward):
    @intrinsic
    def join(typingctx, entries, codes, lengths):
        def codegen(context, builder, sig, args):
            entries, codes, lengths = args
            pairs = ir.VectorType(I64, 8)
            both = builder.bitcast(entries, pairs)
            part = lambda by: builder.and_(builder.lshr(both, constant(pairs, by)), constant(pairs, 0xFFFF))  # noqa: E731
            code, length = [part(0), part(32)], [part(16), part(48)]
            while True:
                (first, second), (before, behind) = code, length
                if forward:
                    joined = builder.or_(first, builder.shl(second, before))
                else:
                    joined = builder.or_(builder.shl(first, behind), second)
                total = builder.add(before, behind)
                count = joined.type.count // 2
                if count < 4:
                    break
                undefined, index = ir.Constant(joined.type, ir.Undefined), ir.VectorType(I32, count)
                every = [ir.Constant(index, [ir.Constant(I32, 2 * i + k) for i in range(count)]) for k in (0, 1)]
                code = [builder.shuffle_vector(joined, undefined, places) for places in every]
                length = [builder.shuffle_vector(total, undefined, places) for places in every]
            store_raw(builder, joined, codes, I64, 4)
            store_raw(builder, total, lengths, I64, 4)
            return context.get_dummy_value()

        return signature(types.void, words, types.int64, types.int64), codegen

    return join


# Join sixteen entries, a code of up to 11 bits and its length from bit 16 on, to four codes and lengths of int64 each:
# the first code in the lowest bits, or in the highest.
join_low_first, join_high_first = _make_join(True), _make_join(False)
