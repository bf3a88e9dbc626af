"""Sixteen lanes as a numba value, with the loads, stores and bit operations that the wire formats need.

Separate from the ops because it is the only place that speaks LLVM. numba's own vectoriser leaves loops of fewer than
64 trips scalar, which makes groups of 32 four times slower than groups of 128. A value that *is* a vector has no such
cliff: LLVM splits it into whatever registers the CPU has (AVX-512, AVX2, NEON).

There are `lanes` (sixteen fp32) and `words` (sixteen int32), with Python's operators between two of them or with a
scalar on the right; `>>` on words fills with zeros. `halves` (32 int16) exist to find ranges of bf16,
`octets` (64 bytes, without signs) to take 16-bit values apart.

Hazard: addresses are plain integers and nothing checks them. Only `flashcomm.kernels.cpu` may call these.

Source: our own. bf16 rounds half to even with integer arithmetic (exact, the same on every CPU); fp16 uses LLVM's
`fpext`/`fptrunc`, which IEEE 754 fixes, or the same in integers on CPUs without such instructions (an x86 without
F16C), where LLVM would call functions that no process has.
"""

import operator
import platform

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils, config
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

_F32, _I32, _I16, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)


class _Vector(types.Type):
    def __init__(self, name, element, count):
        self.ir_type = ir.VectorType(element, count)
        super().__init__(name=name)


lanes = _Vector("fp32x16", _F32, LANES)
words = _Vector("int32x16", _I32, LANES)
halves = _Vector("int16x32", _I16, 32)
octets = _Vector("int8x64", _I8, 64)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.ir_type)


def _splat(builder, scalar, vector_type):
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, vector_type.count), [ir.Constant(_I32, 0)] * vector_type.count)
    return builder.shuffle_vector(one, ir.Constant(vector_type, ir.Undefined), zeros)


def _constant(vector_type, value):
    return ir.Constant(vector_type, [ir.Constant(vector_type.element, value)] * vector_type.count)


def _declare_operator(op, vector, scalars, instruction):
    @infer_global(op)
    class _Typing(ConcreteTemplate):
        cases = [signature(vector, vector, right) for right in (vector, *scalars)]

    @lower_builtin(op, vector, vector)
    def _lower(context, builder, sig, args):
        return getattr(builder, instruction)(*args)

    for scalar in scalars:

        @lower_builtin(op, vector, scalar)
        def _lower_scalar(context, builder, sig, args):
            right = builder.trunc(args[1], vector.ir_type.element) if sig.args[1] == types.int64 else args[1]
            return getattr(builder, instruction)(args[0], _splat(builder, right, vector.ir_type))


for _op, _instruction in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv"),
):  # fmt: skip
    _declare_operator(_op, lanes, [types.float32], _instruction)

for _op, _instruction in (
    (operator.add, "add"), (operator.sub, "sub"), (operator.and_, "and_"), (operator.or_, "or_"),
    (operator.xor, "xor"), (operator.lshift, "shl"), (operator.rshift, "lshr"),
):  # fmt: skip
    _declare_operator(_op, words, [types.int64], _instruction)
    _declare_operator(_op, octets, [types.int64], _instruction)


def _at(builder, address, element, count):
    pointee = ir.VectorType(element, count) if count > 1 else element
    return builder.inttoptr(address, ir.PointerType(pointee))


def _load_raw(builder, address, element, count):
    loaded = builder.load(_at(builder, address, element, count))
    loaded.align = 1
    return loaded


def _store_raw(builder, value, address, element, count):
    builder.store(value, _at(builder, address, element, count)).align = 1


def _wide(element, count):
    return ir.VectorType(element, count) if count > 1 else element


def _const(count, value):
    return _constant(ir.VectorType(_I32, count), value) if count > 1 else ir.Constant(_I32, value)


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
    constant, element = lambda value: _const(count, value), _wide(_F32, count)
    half = builder.zext(half, _wide(_I32, count))
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
    small = builder.bitcast(builder.fmul(builder.uitofp(size, element), step), _wide(_I32, count))
    bits = builder.select(builder.icmp_unsigned("<", size, constant(0x400)), small, bits)
    sign = builder.shl(builder.and_(half, constant(0x8000)), constant(16))
    return builder.bitcast(builder.or_(bits, sign), element)


def _narrow_to_fp16(builder, value, count):
    """The bits of fp16 nearest to fp32, half to even; a NaN keeps the top of its payload, as by F16C."""
    constant, integer = lambda value: _const(count, value), _wide(_I32, count)
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
    return builder.trunc(builder.or_(half, sign), _wide(_I16, count))


def _load(builder, address, kind, count):
    """fp32 from `count` values of `kind` at `address`; widening is exact."""
    half = ir.HalfType() if _CONVERTS_FP16 else _I16
    element = {"fp32": _F32, "fp16": half, "bf16": _I16, "u8": _I8}[kind]
    loaded = _load_raw(builder, address, element, count)
    if kind == "fp32":
        return loaded
    if kind == "fp16":
        return builder.fpext(loaded, _wide(_F32, count)) if _CONVERTS_FP16 else _widen_fp16(builder, loaded, count)
    loaded = builder.zext(loaded, _wide(_I32, count))
    if kind == "u8":
        return builder.uitofp(loaded, _wide(_F32, count))
    return builder.bitcast(builder.shl(loaded, _const(count, 16)), _wide(_F32, count))


def _store(builder, address, value, kind, count):
    element = {"fp32": _F32, "fp16": ir.HalfType() if _CONVERTS_FP16 else _I16, "bf16": _I16}[kind]
    if kind == "fp16" and not _CONVERTS_FP16:
        value = _narrow_to_fp16(builder, value, count)
    elif kind == "fp16":
        value = builder.fptrunc(value, _wide(element, count))
    elif kind == "bf16":
        # Add 0x7fff plus the bit that becomes the last one, then drop 16 bits.
        bits = builder.bitcast(value, _wide(_I32, count))
        odd = builder.and_(builder.lshr(bits, _const(count, 16)), _const(count, 1))
        rounded = builder.lshr(builder.add(builder.add(bits, _const(count, 0x7FFF)), odd), _const(count, 16))
        value = builder.trunc(rounded, _wide(element, count))
    _store_raw(builder, value, address, element, count)


def _make_load(kind, count):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            return _load(builder, args[0], kind, count)

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
            loaded = _load_raw(builder, args[0], element, vector.ir_type.count)
            return loaded if element == vector.ir_type.element else builder.zext(loaded, vector.ir_type)

        return signature(vector, types.int64), codegen

    return load


def _make_store_words(element):
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            value = args[1] if element == _I32 else builder.trunc(args[1], ir.VectorType(element, LANES))
            _store_raw(builder, value, args[0], element, LANES)
            return context.get_dummy_value()

        return signature(types.void, types.int64, words), codegen

    return store


load_words, load_words_u16, load_words_u8 = (_make_load_words(element, words) for element in (_I32, _I16, _I8))
load_halves, load_octets = _make_load_words(_I16, halves), _make_load_words(_I8, octets)
store_words, store_words_u16, store_words_u8 = (_make_store_words(element) for element in (_I32, _I16, _I8))


def _bf16_in_upper_halves(builder, value):
    bits = builder.bitcast(value, words.ir_type)
    odd_bit = builder.and_(builder.lshr(bits, _const(LANES, 16)), _const(LANES, 1))
    return builder.add(builder.add(bits, _const(LANES, 0x7FFF)), odd_bit)


def _store_bf16_twice(builder, first, second, address):
    parts = [builder.bitcast(_bf16_in_upper_halves(builder, value), halves.ir_type) for value in (first, second)]
    upper = ir.Constant(ir.VectorType(_I32, 32), [ir.Constant(_I32, 2 * i + 1) for i in range(32)])
    _store_raw(builder, builder.shuffle_vector(*parts, upper), address, _I16, 32)


@intrinsic
def store_bf16_twice(typingctx, address, first, second):
    """Round two vectors half to even to bf16 and store them one behind the other, 32 bf16."""

    def codegen(context, builder, sig, args):
        _store_bf16_twice(builder, *args[1:], args[0])
        return context.get_dummy_value()

    return signature(types.void, types.int64, lanes, lanes), codegen


@intrinsic
def store_bf16_pairs(typingctx, address, even, odd):
    """Round the even and the odd values of a row half to even to bf16 and store them interleaved, 32 bf16."""

    def codegen(context, builder, sig, args):
        rounded = [_bf16_in_upper_halves(builder, value) for value in args[1:]]
        low, high = builder.lshr(rounded[0], _const(LANES, 16)), builder.and_(rounded[1], _const(LANES, 0xFFFF0000))
        _store_raw(builder, builder.or_(low, high), args[0], _I32, LANES)
        return context.get_dummy_value()

    return signature(types.void, types.int64, lanes, lanes), codegen


@intrinsic
def splat(typingctx, scalar):
    """Set all sixteen lanes to one fp32."""

    def codegen(context, builder, sig, args):
        return _splat(builder, args[0], lanes.ir_type)

    return signature(lanes, types.float32), codegen


@intrinsic
def splat_halves(typingctx, scalar):
    """Set all 32 int16 to one integer."""

    def codegen(context, builder, sig, args):
        return _splat(builder, builder.trunc(args[0], _I16), halves.ir_type)

    return signature(halves, types.int64), codegen


def _make_repeat(times):
    @intrinsic
    def repeat(typingctx, address):
        def codegen(context, builder, sig, args):
            count = LANES // times
            loaded = _load_raw(builder, args[0], _F32, count)
            places = [ir.Constant(_I32, i // times) for i in range(LANES)]
            undefined = ir.Constant(loaded.type, ir.Undefined)
            return builder.shuffle_vector(loaded, undefined, ir.Constant(ir.VectorType(_I32, LANES), places))

        return signature(lanes, types.int64), codegen

    return repeat


# Load the first fp32 at an address, and repeat each 2, 4 or 8 times to fill sixteen lanes.
repeat2, repeat4, repeat8 = (_make_repeat(times) for times in (2, 4, 8))


@intrinsic
def splat_words(typingctx, scalar):
    """Set all sixteen words to one integer."""

    def codegen(context, builder, sig, args):
        return _splat(builder, builder.trunc(args[0], _I32), words.ir_type)

    return signature(words, types.int64), codegen


@intrinsic
def places(typingctx):
    """The words 0 to 15."""

    def codegen(context, builder, sig, args):
        return ir.Constant(words.ir_type, [ir.Constant(_I32, i) for i in range(LANES)])

    return signature(words), codegen


def _make_bitcast(source, target):
    @intrinsic
    def cast(typingctx, value):
        def codegen(context, builder, sig, args):
            return builder.bitcast(args[0], target.ir_type)

        return signature(target, source), codegen

    return cast


as_words, as_lanes = _make_bitcast(lanes, words), _make_bitcast(words, lanes)


def _make_convert(source, target, instruction):
    @intrinsic
    def convert(typingctx, value):
        def codegen(context, builder, sig, args):
            return getattr(builder, instruction)(args[0], target.ir_type)

        return signature(target, source), codegen

    return convert


to_lanes, to_words = _make_convert(words, lanes, "sitofp"), _make_convert(lanes, words, "fptosi")


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


@intrinsic
def store_bits(typingctx, address, v):
    """Store 16 bytes of the first eight words, with bits of the other eight, one place to the left, in their gaps."""

    def codegen(context, builder, sig, args):
        undefined, index = ir.Constant(words.ir_type, ir.Undefined), ir.VectorType(_I32, 8)
        first, second = (
            builder.shuffle_vector(args[1], undefined, ir.Constant(index, [ir.Constant(_I32, i + j) for i in range(8)]))
            for j in (0, 8)
        )
        joined = builder.or_(first, builder.shl(second, _const(8, 1)))
        _store_raw(builder, builder.trunc(joined, ir.VectorType(_I16, 8)), args[0], _I16, 8)
        return context.get_dummy_value()

    return signature(types.void, types.int64, words), codegen


def _fold(builder, vector, block, less, a, b):
    """Fold two vectors of blocks into one vector of blocks of half the size, the first vector's before the second's.

    Of every block's two halves the smaller values (or the larger ones) stay.
    """
    count, index = vector.ir_type.count, ir.VectorType(_I32, vector.ir_type.count)
    halves_of = []
    for upper in (0, 1):
        starts = range(0, 2 * count, block)
        places = [ir.Constant(_I32, start + upper * block // 2 + i) for start in starts for i in range(block // 2)]
        halves_of.append(builder.shuffle_vector(a, b, ir.Constant(index, places)))
    compare = builder.fcmp_ordered if vector is lanes else builder.icmp_signed
    return builder.select(compare("<" if less else ">", *halves_of), *halves_of)


def _make_fold(vector, block, less):
    @intrinsic
    def fold(typingctx, a, b):
        def codegen(context, builder, sig, args):
            return _fold(builder, vector, block, less, *args)

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
        index = ir.VectorType(_I32, LANES)
        for upper in (0, 1):
            starts = range(0, 2 * LANES, block)
            lanes_of = [ir.Constant(_I32, s + upper * block // 2 + i) for s in starts for i in range(block // 2)]
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


@intrinsic
def store_halves(typingctx, address, value):
    """Store all 32 int16."""

    def codegen(context, builder, sig, args):
        _store_raw(builder, args[1], args[0], _I16, 32)
        return context.get_dummy_value()

    return signature(types.void, types.int64, halves), codegen


@intrinsic
def store_halves_wide(typingctx, address, value):
    """Store all 32 int16 as the upper halves of int32 with lower halves of 0: fp32 from bf16."""

    def codegen(context, builder, sig, args):
        wide = ir.VectorType(_I32, 32)
        _store_raw(builder, builder.shl(builder.zext(args[1], wide), _constant(wide, 16)), args[0], _I32, 32)
        return context.get_dummy_value()

    return signature(types.void, types.int64, halves), codegen


@intrinsic
def twice_minus(typingctx, v, w):
    """2 v - w, for values where that is exact."""

    def codegen(context, builder, sig, args):
        two = ir.Constant(lanes.ir_type, [ir.Constant(_F32, 2.0)] * LANES)
        return _fmuladd(builder, args[0], two, builder.fneg(args[1]))

    return signature(lanes, lanes, lanes), codegen


def _make_key(vector):
    element = vector.ir_type.element
    last = element.width - 1

    @intrinsic
    def key(typingctx, v):
        def codegen(context, builder, sig, args):
            sign = builder.ashr(args[0], _constant(vector.ir_type, last))
            return builder.xor(args[0], builder.and_(sign, _constant(vector.ir_type, (1 << last) - 1)))

        return signature(vector, vector), codegen

    return key


@intrinsic
def halves_magnitude(typingctx, v):
    """Patterns of bf16 without their signs."""

    def codegen(context, builder, sig, args):
        return builder.and_(args[0], _constant(halves.ir_type, 0x7FFF))

    return signature(halves, halves), codegen


@intrinsic
def halves_signed(typingctx, v):
    """Patterns of bf16 -> integers that order like the numbers: magnitudes, negative ones below 0, and one zero."""

    def codegen(context, builder, sig, args):
        sign = builder.ashr(args[0], _constant(halves.ir_type, 15))
        magnitude = builder.and_(args[0], _constant(halves.ir_type, 0x7FFF))
        return builder.sub(builder.xor(magnitude, sign), sign)

    return signature(halves, halves), codegen


@intrinsic
def halves_equal(typingctx, v, scalar):
    """Compare each lane with the lowest 16 bits of an integer; one bit per lane."""

    def codegen(context, builder, sig, args):
        same = builder.icmp_signed("==", args[0], _splat(builder, builder.trunc(args[1], _I16), halves.ir_type))
        return builder.zext(builder.bitcast(same, _I32), ir.IntType(64))

    return signature(types.int64, halves, types.int64), codegen


@intrinsic
def words_equal(typingctx, v, scalar):
    """Compare each word with the lowest 32 bits of an integer; one bit per word."""

    def codegen(context, builder, sig, args):
        same = builder.icmp_signed("==", args[0], _splat(builder, builder.trunc(args[1], _I32), words.ir_type))
        return builder.zext(builder.bitcast(same, _I16), ir.IntType(64))

    return signature(types.int64, words, types.int64), codegen


@intrinsic
def halves_replace(typingctx, v, mask, scalar):
    """Put the lowest 16 bits of an integer into each lane whose bit is set in `mask`."""

    def codegen(context, builder, sig, args):
        chosen = builder.bitcast(builder.trunc(args[1], _I32), ir.VectorType(ir.IntType(1), 32))
        return builder.select(chosen, _splat(builder, builder.trunc(args[2], _I16), halves.ir_type), args[0])

    return signature(halves, halves, types.int64, types.int64), codegen


@intrinsic
def lowest_bit(typingctx, mask):
    """Position of the lowest bit that is set."""

    def codegen(context, builder, sig, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return signature(types.int64, types.int64), codegen


# Integers that order like the floating-point numbers of these patterns; the function is its own inverse.
words_key, halves_key = _make_key(words), _make_key(halves)


@intrinsic
def bits_of(typingctx, value):
    """The 32-bit pattern of an fp32."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], _I32)

    return signature(types.uint32, types.float32), codegen


@intrinsic
def from_bits(typingctx, pattern):
    """The fp32 whose pattern is the lower 32 bits of an integer."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.trunc(args[0], _I32), _F32)

    return signature(types.float32, types.int64), codegen


def _make_word(bits):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            loaded = _load_raw(builder, args[0], ir.IntType(bits), 1)
            return builder.sext(loaded, ir.IntType(64)) if bits < 64 else loaded

        return signature(types.int64, types.int64), codegen

    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            value = builder.trunc(args[1], ir.IntType(bits)) if bits < 64 else args[1]
            _store_raw(builder, value, args[0], ir.IntType(bits), 1)
            return context.get_dummy_value()

        return signature(types.void, types.int64, types.int64), codegen

    return load, store


# Loads extend the sign.
load_byte, store_byte = _make_word(8)
load_half, store_half = _make_word(16)
load_word, store_word = _make_word(32)
load_long, store_long = _make_word(64)


def _make_planes(width):
    """Make pack and unpack of a plane of 128 codes: byte i of 16 * width bytes holds codes i, i + 16 * width, ..."""
    size = 16 * width
    vector = ir.VectorType(_I32, size // 4)
    mask = _constant(vector, int.from_bytes(bytes([(1 << width) - 1]) * 4, "little"))

    def moved(builder, address, offset):
        return builder.add(address, ir.Constant(address.type, offset))

    @intrinsic
    def pack(typingctx, codes, shift, plane):
        def codegen(context, builder, sig, args):
            codes, shift, plane = args
            by = _splat(builder, builder.trunc(shift, _I32), vector)
            total = None
            for t in range(8 // width):
                part = _load_raw(builder, moved(builder, codes, t * size), _I32, size // 4)
                part = builder.shl(builder.and_(builder.lshr(part, by), mask), _constant(vector, t * width))
                total = part if total is None else builder.or_(total, part)
            _store_raw(builder, total, plane, _I32, size // 4)
            return context.get_dummy_value()

        return signature(types.void, types.int64, types.int64, types.int64), codegen

    def make_unpack(first):
        @intrinsic
        def unpack(typingctx, plane, shift, codes):
            def codegen(context, builder, sig, args):
                plane, shift, codes = args
                by = _splat(builder, builder.trunc(shift, _I32), vector)
                loaded = _load_raw(builder, plane, _I32, size // 4)
                for t in range(8 // width):
                    part = builder.and_(builder.lshr(loaded, _constant(vector, t * width)), mask)
                    at = moved(builder, codes, t * size)
                    if not first:
                        part = builder.or_(builder.shl(part, by), _load_raw(builder, at, _I32, size // 4))
                    _store_raw(builder, part, at, _I32, size // 4)
                return context.get_dummy_value()

            return signature(types.void, types.int64, types.int64, types.int64), codegen

        return unpack

    return pack, make_unpack(True), make_unpack(False)


# pack(codes, shift, plane) takes the codes' bits from `shift` on; unpack_first(plane, shift, codes) writes the codes,
# and unpack_more adds bits from `shift` on to the codes that are there.
pack4, unpack4_first, _ = _make_planes(4)
pack2, unpack2_first, unpack2_more = _make_planes(2)
pack1, unpack1_first, unpack1_more = _make_planes(1)


def _moved(builder, address, by):
    return builder.add(address, ir.Constant(address.type, by))


def _fmuladd(builder, a, b, c):
    """Compute a * b + c, fused where the CPU can: only for products that are exact, so that fusing changes no bit."""
    kind = ir.FunctionType(lanes.ir_type, [lanes.ir_type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [a, b, c])


def _butterfly(builder, v, apart):
    """Apply one stage of a Walsh-Hadamard transform to sixteen lanes: a + b, a - b for values `apart` lanes apart."""
    index = ir.VectorType(_I32, LANES)
    partners = ir.Constant(index, [ir.Constant(_I32, i ^ apart) for i in range(LANES)])
    signs = ir.Constant(lanes.ir_type, [ir.Constant(_F32, -1.0 if i & apart else 1.0) for i in range(LANES)])
    partner = builder.shuffle_vector(v, ir.Constant(lanes.ir_type, ir.Undefined), partners)
    return _fmuladd(builder, v, signs, partner)


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
            factors = _splat(builder, args[1], lanes.ir_type)
            count = max(1, size // LANES)
            places = [builder.add(args[0], ir.Constant(ir.IntType(64), 4 * LANES * i)) for i in range(count)]
            rows = [_inside(builder, builder.fmul(_load_raw(builder, at, _F32, LANES), factors), size) for at in places]
            for at, v in zip(places, _across(builder, rows, size), strict=True):
                _store_raw(builder, v, at, _F32, LANES)
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
            upper = [_fold(builder, lanes, 16, less, *found[i : i + 2]) for i in (0, 2)]
            found = [_fold(builder, lanes, 8, less, *upper)]
        for i, v in enumerate(found):
            _store_raw(builder, v, _moved(builder, at, 4 * LANES * i), _F32, LANES)


def _make_hadamard_ranges(kind, size):
    """Make a function that multiplies 128 values by a factor, transforms each run of `size` and stores it as fp32.

    Candidates for the smallest and the largest value of each run go to least[] and most[]: see `_store_candidates`.
    """

    @intrinsic
    def transform(typingctx, source, factor, target, least, most):
        def codegen(context, builder, sig, args):
            source, factor, target, least, most = args
            width, factors = {"bf16": 2, "fp32": 4}[kind], _splat(builder, factor, lanes.ir_type)
            rows = []
            for i in range(128 // LANES):
                v = _load(builder, _moved(builder, source, width * LANES * i), kind, LANES)
                rows.append(_inside(builder, builder.fmul(v, factors), size))
            rows = _across(builder, rows, size)
            for i, v in enumerate(rows):
                _store_raw(builder, v, _moved(builder, target, 4 * LANES * i), _F32, LANES)
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
            factors, rows = _splat(builder, factor, lanes.ir_type), []
            for i in range(128 // 32):
                pair = _load_raw(builder, _moved(builder, source, 64 * i), _I32, LANES)
                even = builder.bitcast(builder.shl(pair, _const(LANES, 16)), lanes.ir_type)
                odd = builder.bitcast(builder.and_(pair, _const(LANES, 0xFFFF0000)), lanes.ir_type)
                odd = builder.fmul(odd, factors)
                for v in (_fmuladd(builder, even, factors, odd), _fmuladd(builder, even, factors, builder.fneg(odd))):
                    rows.append(_inside(builder, v, LANES))
            rows = _across(builder, rows, size, 2)
            for i, v in enumerate(rows):
                _store_raw(builder, v, _moved(builder, target, 4 * LANES * i), _F32, LANES)
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
            rows = [
                _load_raw(builder, _moved(builder, args[0], 4 * LANES * i), _F32, LANES) for i in range(128 // LANES)
            ]
            rows = _across(builder, [_inside(builder, v, size) for v in rows], size)
            found = None
            for i in range(0, len(rows), 2):
                _store_bf16_twice(builder, *rows[i : i + 2], _moved(builder, args[1], 2 * LANES * i))
                unordered = builder.fcmp_unordered("uno", *rows[i : i + 2])
                found = unordered if found is None else builder.or_(found, unordered)
            return builder.zext(builder.bitcast(found, _I16), ir.IntType(64))

        return signature(types.int64, types.int64, types.int64), codegen

    return transform


hadamard32_back, hadamard64_back, hadamard128_back = (_make_hadamard_back(size) for size in (32, 64, 128))


@intrinsic
def pairwise_sum(typingctx, v):
    """Sum of sixteen lanes: neighbours are added, then neighbouring sums, and so on."""

    def codegen(context, builder, sig, args):
        v, width = args[0], LANES
        while width > 1:
            width //= 2
            undefined = ir.Constant(v.type, ir.Undefined)
            index = ir.VectorType(_I32, width)
            even, odd = (
                builder.shuffle_vector(
                    v, undefined, ir.Constant(index, [ir.Constant(_I32, 2 * i + k) for i in range(width)])
                )
                for k in (0, 1)
            )
            v = builder.fadd(even, odd)
        return builder.extract_element(v, ir.Constant(_I32, 0))

    return signature(types.float32, lanes), codegen


@intrinsic
def prefetch(typingctx, address):
    """Prefetch the cache line at `address`, which may lie outside any buffer: a prefetch never faults."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.PointerType(_I8))
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer] + [ir.Constant(_I32, c) for c in (0, 3, 1)])
        return context.get_dummy_value()

    return signature(types.void, types.int64), codegen


_I64 = ir.IntType(64)


def _read_control(builder):
    """The thread's floating-point control register, and its bits that flush; None on CPUs that cannot flush."""
    if platform.machine() in ("x86_64", "AMD64"):
        place = cgutils.alloca_once(builder, _I32)
        _intrinsic_call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(place, ir.PointerType(_I8)))
        # Flush results, and take arguments for zero.
        return builder.zext(builder.load(place), _I64), 1 << 15 | 1 << 6
    if platform.machine() in ("aarch64", "arm64"):
        # FZ, FZ16 and FIZ.
        return _intrinsic_call(builder, "llvm.aarch64.get.fpcr", _I64), 1 << 24 | 1 << 19 | 1
    return None


def _write_control(builder, control):
    if platform.machine() in ("x86_64", "AMD64"):
        place = cgutils.alloca_once_value(builder, builder.trunc(control, _I32))
        _intrinsic_call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(place, ir.PointerType(_I8)))
    else:
        _intrinsic_call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), control)


def _intrinsic_call(builder, name, result, *operands):
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


@intrinsic
def keep_subnormals(typingctx):
    """Stop this thread from flushing subnormal numbers; return what `restore_control` needs."""

    def codegen(context, builder, sig, args):
        found = _read_control(builder)
        if found is None:
            return ir.Constant(_I64, 0)
        control, flushing = found
        changes = builder.icmp_unsigned("!=", builder.and_(control, ir.Constant(_I64, flushing)), ir.Constant(_I64, 0))
        with builder.if_then(changes, likely=False):
            _write_control(builder, builder.and_(control, ir.Constant(_I64, ~flushing)))
        # 0 where there is nothing to restore, which no register that flushes holds.
        return builder.select(changes, control, ir.Constant(_I64, 0))

    return signature(types.int64), codegen


@intrinsic
def restore_control(typingctx, before):
    """Undo `keep_subnormals`."""

    def codegen(context, builder, sig, args):
        if platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64"):
            with builder.if_then(builder.icmp_unsigned("!=", args[0], ir.Constant(_I64, 0)), likely=False):
                _write_control(builder, args[0])
        return context.get_dummy_value()

    return signature(types.void, types.int64), codegen


@intrinsic
def field(typingctx, at, i):
    """The i-th int64 at an address."""

    def codegen(context, builder, sig, args):
        return _load_raw(builder, builder.add(args[0], builder.shl(args[1], ir.Constant(_I64, 3))), _I64, 1)

    return signature(types.int64, types.int64, types.int64), codegen


@intrinsic
def words_signed_shift(typingctx, v, by):
    """Shift sixteen words to the right, filled with their signs."""

    def codegen(context, builder, sig, args):
        return builder.ashr(args[0], _splat(builder, builder.trunc(args[1], _I32), words.ir_type))

    return signature(words, words, types.int64), codegen


@intrinsic
def gather(typingctx, table, index):
    """Load sixteen int32 of a table at an address, by their numbers."""

    def codegen(context, builder, sig, args):
        wide = ir.VectorType(_I64, LANES)
        at = builder.add(_splat(builder, args[0], wide), builder.shl(builder.zext(args[1], wide), _constant(wide, 2)))
        pointers = builder.inttoptr(at, ir.VectorType(ir.PointerType(_I32), LANES))
        mask = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [ir.Constant(ir.IntType(1), 1)] * LANES)
        operands = [pointers, ir.Constant(_I32, 4), mask, ir.Constant(words.ir_type, ir.Undefined)]
        name = f"llvm.masked.gather.v{LANES}i32.v{LANES}p0"
        return _intrinsic_call(builder, name, words.ir_type, *operands)

    return signature(words, types.int64, words), codegen


@intrinsic
def count_at_least(typingctx, address, least):
    """Number of bytes, unsigned, of 64 at an address that are not below a byte."""

    def codegen(context, builder, sig, args):
        loaded = _load_raw(builder, args[0], _I8, 64)
        found = builder.icmp_unsigned(">=", loaded, _splat(builder, builder.trunc(args[1], _I8), octets.ir_type))
        return builder.ctpop(builder.bitcast(found, _I64))

    return signature(types.int64, types.int64, types.int64), codegen


@intrinsic
def bytes_equal(typingctx, address, byte):
    """Compare 64 bytes at an address with one byte; one bit per byte."""

    def codegen(context, builder, sig, args):
        loaded = _load_raw(builder, args[0], _I8, 64)
        found = builder.icmp_unsigned("==", loaded, _splat(builder, builder.trunc(args[1], _I8), octets.ir_type))
        return builder.bitcast(found, _I64)

    return signature(types.int64, types.int64, types.int64), codegen


_WIDE_OCTETS = ir.VectorType(_I16, 64)


@intrinsic
def store_octets(typingctx, address, value):
    """Store 64 bytes."""

    def codegen(context, builder, sig, args):
        _store_raw(builder, args[1], args[0], _I8, 64)
        return context.get_dummy_value()

    return signature(types.void, types.int64, octets), codegen


@intrinsic
def load_octets_of_halves(typingctx, address, shift):
    """Load 64 int16, shift them to the right, and keep the lowest byte of each."""

    def codegen(context, builder, sig, args):
        by = _splat(builder, builder.trunc(args[1], _I16), _WIDE_OCTETS)
        return builder.trunc(builder.lshr(_load_raw(builder, args[0], _I16, 64), by), octets.ir_type)

    return signature(octets, types.int64, types.int64), codegen


@intrinsic
def store_halves_of_octets(typingctx, address, sign, first, first_shift, second, second_shift, third):
    """Store 64 int16, each joined from a byte of `sign`, in its upper half, and of `first`, `second` and `third`."""

    def codegen(context, builder, sig, args):
        address, sign, first, first_shift, second, second_shift, third = args

        def shifted(value, by):
            by = _splat(builder, builder.trunc(by, _I16), _WIDE_OCTETS)
            return builder.shl(builder.zext(value, _WIDE_OCTETS), by)

        joined = builder.or_(shifted(first, first_shift), shifted(second, second_shift))
        joined = builder.or_(joined, shifted(sign, ir.Constant(_I64, 8)))
        _store_raw(builder, builder.or_(joined, builder.zext(third, _WIDE_OCTETS)), address, _I16, 64)
        return context.get_dummy_value()

    return signature(types.void, types.int64, octets, octets, types.int64, octets, types.int64, octets), codegen


@intrinsic
def octet_min(typingctx, v, most):
    """Replace bytes above `most` by it."""

    def codegen(context, builder, sig, args):
        most = _splat(builder, builder.trunc(args[1], _I8), octets.ir_type)
        return builder.select(builder.icmp_unsigned("<", args[0], most), args[0], most)

    return signature(octets, octets, types.int64), codegen


@intrinsic
def octets_bit(typingctx, v, place):
    """One bit of each byte, the first byte's lowest."""

    def codegen(context, builder, sig, args):
        bit = _splat(builder, builder.trunc(builder.shl(ir.Constant(_I64, 1), args[1]), _I8), octets.ir_type)
        found = builder.icmp_unsigned("!=", builder.and_(args[0], bit), ir.Constant(octets.ir_type, None))
        return builder.bitcast(found, _I64)

    return signature(types.int64, octets, types.int64), codegen


@intrinsic
def octets_where(typingctx, mask, byte):
    """64 bytes: one byte where the bit of `mask` is set, 0 elsewhere."""

    def codegen(context, builder, sig, args):
        chosen = builder.bitcast(args[0], ir.VectorType(ir.IntType(1), 64))
        byte = _splat(builder, builder.trunc(args[1], _I8), octets.ir_type)
        return builder.select(chosen, byte, ir.Constant(octets.ir_type, None))

    return signature(octets, types.int64, types.int64), codegen


def _make_join(forward):
    @intrinsic
    def join(typingctx, entries, codes, lengths):
        def codegen(context, builder, sig, args):
            entries, codes, lengths = args
            pairs = ir.VectorType(_I64, 8)
            both = builder.bitcast(entries, pairs)
            part = lambda by: builder.and_(builder.lshr(both, _constant(pairs, by)), _constant(pairs, 0xFFFF))  # noqa: E731
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
                undefined, index = ir.Constant(joined.type, ir.Undefined), ir.VectorType(_I32, count)
                every = [ir.Constant(index, [ir.Constant(_I32, 2 * i + k) for i in range(count)]) for k in (0, 1)]
                code = [builder.shuffle_vector(joined, undefined, places) for places in every]
                length = [builder.shuffle_vector(total, undefined, places) for places in every]
            _store_raw(builder, joined, codes, _I64, 4)
            _store_raw(builder, total, lengths, _I64, 4)
            return context.get_dummy_value()

        return signature(types.void, words, types.int64, types.int64), codegen

    return join


# Join sixteen entries, a code of up to 11 bits and its length from bit 16 on, to four codes and lengths of int64 each:
# the first code in the lowest bits, or in the highest.
join_low_first, join_high_first = _make_join(True), _make_join(False)


def _make_long_extreme(less):
    @intrinsic
    def extreme(typingctx, a, b):
        def codegen(context, builder, sig, args):
            return builder.select(builder.icmp_signed("<" if less else ">", *args), *args)

        return signature(types.int64, types.int64, types.int64), codegen

    return extreme


# The smaller and the larger of two integers. numba's own min and max are compiled anew for each op, 0.03 s a time.
long_min, long_max = (_make_long_extreme(less) for less in (True, False))


@intrinsic
def stack(typingctx):
    """Address of memory for 32 int64, until the function returns. numba's arrays would take 0.2 s to compile."""

    def codegen(context, builder, sig, args):
        with builder.goto_entry_block():
            return builder.ptrtoint(builder.alloca(_I64, 32), _I64)

    return signature(types.int64), codegen


MAX_OPERANDS = 12


@intrinsic
def call(typingctx, function, operands, count):
    """Call the compiled op at the address `function` with the first `count` integers at `operands`."""

    def codegen(context, builder, sig, args):
        function, operands, count = args
        i64 = ir.IntType(64)
        base = builder.inttoptr(operands, ir.PointerType(i64))
        done = builder.append_basic_block("called")
        switch = builder.switch(count, done)
        for n in range(1, MAX_OPERANDS + 1):
            block = builder.append_basic_block(f"call{n}")
            switch.add_case(ir.Constant(i64, n), block)
            with builder.goto_block(block):
                kind = ir.FunctionType(ir.VoidType(), [i64] * n)
                loaded = [builder.load(builder.gep(base, [ir.Constant(_I32, i)])) for i in range(n)]
                builder.call(builder.inttoptr(function, ir.PointerType(kind)), loaded)
                builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature(types.void, types.int64, types.int64, types.int64), codegen
