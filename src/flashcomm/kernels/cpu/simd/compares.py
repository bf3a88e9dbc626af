"""Comparisons of vectors: the smaller and the larger, side by side or folded together, and keys that order."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from flashcomm.kernels.cpu.simd.vectors import I16, I32, LANES, constant, halves, lanes, splatted, words


def _make_where(compare, vector, result):
    @intrinsic
    def where(typingctx, a, b, yes, no):
        def codegen(context, builder, sig, args):
            a, b, yes, no = args
            return builder.select(compare(builder, a, b), yes, no)

        return signature(result, vector, vector, result, result), codegen

    return where


def _ordered(predicate):
    return lambda builder, a, b: builder.fcmp_ordered(predicate, a, b)


def _signed(predicate):
    return lambda builder, a, b: builder.icmp_signed(predicate, a, b)


where_less, where_less_words = _make_where(_ordered("<"), lanes, lanes), _make_where(_ordered("<"), lanes, words)


words_where_less, words_where_equal = (_make_where(_signed(p), words, words) for p in ("<", "=="))


halves_where_less = _make_where(_signed("<"), halves, halves)


def _make_extreme(vector, less):
    predicate = "<" if less else ">"

    @intrinsic
    def extreme(typingctx, a, b):
        def codegen(context, builder, sig, args):
            compare = builder.fcmp_ordered if vector is lanes else builder.icmp_signed
            return builder.select(compare(predicate, *args), *args)

        return signature(vector, vector, vector), codegen

    return extreme


# On lanes, `a < b ? a : b` is one instruction on every CPU; it gives b where either is a NaN.
lane_min, lane_max = (_make_extreme(lanes, less) for less in (True, False))


word_min, word_max = (_make_extreme(words, less) for less in (True, False))


half_min, half_max = (_make_extreme(halves, less) for less in (True, False))


def _make_reduce(vector, name):
    @intrinsic
    def reduce(typingctx, v):
        def codegen(context, builder, sig, args):
            element, count = vector.ir_type.element, vector.ir_type.count
            kind = ir.FunctionType(element, [vector.ir_type])
            function = cgutils.get_or_insert_function(
                builder.module, kind, f"llvm.vector.reduce.{name}.v{count}i{element.width}"
            )
            return builder.sext(builder.call(function, args), ir.IntType(64))

        return signature(types.int64, vector), codegen

    return reduce


words_max, words_sum, words_or = (_make_reduce(words, name) for name in ("smax", "add", "or"))


def folded(builder, vector, block, less, a, b):
    """Fold two vectors of blocks into one vector of blocks of half the size, the first vector's before the second's.

    Of every block's two halves the smaller values (or the larger ones) stay.
    """
    count, index = vector.ir_type.count, ir.VectorType(I32, vector.ir_type.count)
    halves_of = []
    for upper in (0, 1):
        starts = range(0, 2 * count, block)
        places = [ir.Constant(I32, start + upper * block // 2 + i) for start in starts for i in range(block // 2)]
        halves_of.append(builder.shuffle_vector(a, b, ir.Constant(index, places)))
    compare = builder.fcmp_ordered if vector is lanes else builder.icmp_signed
    return builder.select(compare("<" if less else ">", *halves_of), *halves_of)


def _make_fold(vector, block, less):
    @intrinsic
    def fold(typingctx, a, b):
        def codegen(context, builder, sig, args):
            return folded(builder, vector, block, less, *args)

        return signature(vector, vector, vector), codegen

    return fold


fold32_min, fold16_min, fold8_min, fold4_min, fold2_min = (_make_fold(halves, n, True) for n in (32, 16, 8, 4, 2))


fold32_max, fold16_max, fold8_max, fold4_max, fold2_max = (_make_fold(halves, n, False) for n in (32, 16, 8, 4, 2))


words_fold16_min, words_fold8_min, words_fold4_min, words_fold2_min = (
    _make_fold(words, n, True) for n in (16, 8, 4, 2)
)


words_fold16_max, words_fold8_max, words_fold4_max, words_fold2_max = (
    _make_fold(words, n, False) for n in (16, 8, 4, 2)
)


lanes_fold16_min, lanes_fold8_min = (_make_fold(lanes, n, True) for n in (16, 8))


lanes_fold16_max, lanes_fold8_max = (_make_fold(lanes, n, False) for n in (16, 8))


def _make_fold_second(block, less):
    """Fold like `_make_fold`, for the second smallest (or largest) values.

    The result takes the two vectors of the smallest, then the two of the second smallest.
    """

    def halves_of(builder, a, b):
        index = ir.VectorType(I32, LANES)
        for upper in (0, 1):
            starts = range(0, 2 * LANES, block)
            lanes_of = [ir.Constant(I32, s + upper * block // 2 + i) for s in starts for i in range(block // 2)]
            yield builder.shuffle_vector(a, b, ir.Constant(index, lanes_of))

    def extreme(builder, a, b, less):
        return builder.select(builder.icmp_signed("<" if less else ">", a, b), a, b)

    @intrinsic
    def fold(typingctx, first_a, first_b, second_a, second_b):
        def codegen(context, builder, sig, args):
            loser = extreme(builder, *halves_of(builder, *args[:2]), not less)
            second = extreme(builder, *halves_of(builder, *args[2:]), less)
            return extreme(builder, loser, second, less)

        return signature(words, words, words, words, words), codegen

    return fold


second16_min, second8_min, second4_min, second2_min = (_make_fold_second(n, True) for n in (16, 8, 4, 2))


second16_max, second8_max, second4_max, second2_max = (_make_fold_second(n, False) for n in (16, 8, 4, 2))


def _make_key(vector):
    element = vector.ir_type.element
    last = element.width - 1

    @intrinsic
    def key(typingctx, v):
        def codegen(context, builder, sig, args):
            sign = builder.ashr(args[0], constant(vector.ir_type, last))
            return builder.xor(args[0], builder.and_(sign, constant(vector.ir_type, (1 << last) - 1)))

        return signature(vector, vector), codegen

    return key


@intrinsic
def halves_magnitude(typingctx, v):
    """Patterns of bf16 without their signs."""

    def codegen(context, builder, sig, args):
        return builder.and_(args[0], constant(halves.ir_type, 0x7FFF))

    return signature(halves, halves), codegen


@intrinsic
def halves_signed(typingctx, v):
    """Patterns of bf16 -> integers that order like the numbers: magnitudes, negative ones below 0, and one zero."""

    def codegen(context, builder, sig, args):
        sign = builder.ashr(args[0], constant(halves.ir_type, 15))
        magnitude = builder.and_(args[0], constant(halves.ir_type, 0x7FFF))
        return builder.sub(builder.xor(magnitude, sign), sign)

    return signature(halves, halves), codegen


@intrinsic
def halves_equal(typingctx, v, scalar):
    """Compare each lane with the lowest 16 bits of an integer; one bit per lane."""

    def codegen(context, builder, sig, args):
        same = builder.icmp_signed("==", args[0], splatted(builder, builder.trunc(args[1], I16), halves.ir_type))
        return builder.zext(builder.bitcast(same, I32), ir.IntType(64))

    return signature(types.int64, halves, types.int64), codegen


@intrinsic
def words_equal(typingctx, v, scalar):
    """Compare each word with the lowest 32 bits of an integer; one bit per word."""

    def codegen(context, builder, sig, args):
        same = builder.icmp_signed("==", args[0], splatted(builder, builder.trunc(args[1], I32), words.ir_type))
        return builder.zext(builder.bitcast(same, I16), ir.IntType(64))

    return signature(types.int64, words, types.int64), codegen


@intrinsic
def halves_replace(typingctx, v, mask, scalar):
    """Put the lowest 16 bits of an integer into each lane whose bit is set in `mask`."""

    def codegen(context, builder, sig, args):
        chosen = builder.bitcast(builder.trunc(args[1], I32), ir.VectorType(ir.IntType(1), 32))
        return builder.select(chosen, splatted(builder, builder.trunc(args[2], I16), halves.ir_type), args[0])

    return signature(halves, halves, types.int64, types.int64), codegen


# Integers that order like the floating-point numbers of these patterns; the function is its own inverse.
words_key, halves_key = _make_key(words), _make_key(halves)
