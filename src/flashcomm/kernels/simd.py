"""Sixteen fp32 lanes as a numba value, with the loads and stores that the wire formats need.

Separate from the kernels because it is the only place that speaks LLVM. numba's own vectoriser leaves loops of fewer
than 64 trips scalar, which makes groups of 32 four times slower than groups of 128; a value that *is* a vector has no
such cliff, and LLVM splits it into whatever registers the CPU has (AVX-512, AVX2, NEON).

Hazard: addresses are plain integers and nothing checks them. Only `flashcomm.kernels.cpu` may call these.

Source: our own. bf16 rounds half to even with integer arithmetic (exact, the same on every CPU); fp16 uses LLVM's
`fpext`/`fptrunc`, which IEEE 754 fixes.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

_F32, _I32, _I16, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_VF32, _VI32 = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


class _Lanes(types.Type):
    def __init__(self):
        super().__init__(name="fp32x16")


lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _VF32)


def _declare_operator(op, instruction):
    @infer_global(op)
    class _Typing(ConcreteTemplate):
        cases = [signature(lanes, lanes, lanes)]

    @lower_builtin(op, lanes, lanes)
    def _lower(context, builder, sig, args):
        return getattr(builder, instruction)(*args)


for _op, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _declare_operator(_op, _instruction)


def _splat(builder, scalar, vector_type):
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [ir.Constant(_I32, 0)] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector_type, ir.Undefined), zeros)


def _constant(value):
    return ir.Constant(_VI32, [ir.Constant(_I32, value)] * LANES)


def _at(builder, address, element, count):
    pointee = ir.VectorType(element, count) if count > 1 else element
    return builder.inttoptr(address, ir.PointerType(pointee))


def _round_to_bf16(builder, bits, constant):
    """bf16 pattern in the low half: add 0x7fff plus the bit that becomes the last one, then drop 16 bits."""
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    return builder.lshr(builder.add(builder.add(bits, constant(0x7FFF)), odd), constant(16))


def _load(builder, address, kind, count):
    """fp32 from `count` values of `kind` at `address`; widening is exact."""
    as_type = (lambda t: ir.VectorType(t, count)) if count > 1 else (lambda t: t)
    element = {"fp32": _F32, "fp16": ir.HalfType(), "bf16": _I16, "u8": _I8}[kind]
    loaded = builder.load(_at(builder, address, element, count))
    loaded.align = 1
    if kind == "fp32":
        return loaded
    if kind == "fp16":
        return builder.fpext(loaded, as_type(_F32))
    wide = builder.zext(loaded, as_type(_I32))
    if kind == "u8":
        return builder.uitofp(wide, as_type(_F32))
    return builder.bitcast(builder.shl(wide, _const(count, 16)), as_type(_F32))


def _store(builder, address, value, kind, count):
    as_type = (lambda t: ir.VectorType(t, count)) if count > 1 else (lambda t: t)
    element = {"fp32": _F32, "fp16": ir.HalfType(), "bf16": _I16, "code": _I8}[kind]
    if kind == "fp16":
        value = builder.fptrunc(value, as_type(element))
    elif kind == "bf16":
        bits = builder.bitcast(value, as_type(_I32))
        value = builder.trunc(_round_to_bf16(builder, bits, lambda c: _const(count, c)), as_type(element))
    elif kind == "code":
        # The value is 1.5 * 2^23 plus a small integer, so that integer sits in the low bits of the pattern.
        value = builder.trunc(builder.bitcast(value, as_type(_I32)), as_type(element))
    builder.store(value, _at(builder, address, element, count)).align = 1


def _const(count, value):
    return _constant(value) if count > 1 else ir.Constant(_I32, value)


def _make_load(kind, count):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            return _load(builder, args[0], kind, count)

        return signature(lanes if count > 1 else types.float32, types.uintp), codegen

    return load


def _make_store(kind, count):
    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            _store(builder, args[0], args[1], kind, count)
            return context.get_dummy_value()

        return signature(types.void, types.uintp, lanes if count > 1 else types.float32), codegen

    return store


load_bf16, load_fp16, load_fp32, load_u8 = (_make_load(k, LANES) for k in ("bf16", "fp16", "fp32", "u8"))
store_bf16, store_fp16, store_fp32, store_code = (_make_store(k, LANES) for k in ("bf16", "fp16", "fp32", "code"))
load1_bf16, load1_fp16, load1_fp32, load1_u8 = (_make_load(k, 1) for k in ("bf16", "fp16", "fp32", "u8"))
store1_bf16, store1_fp16, store1_fp32, store1_code = (_make_store(k, 1) for k in ("bf16", "fp16", "fp32", "code"))


@intrinsic
def load_bits(typingctx, address, shift, mask):
    """fp32 lanes of (byte >> shift) & mask, for sixteen bytes at `address`."""

    def codegen(context, builder, sig, args):
        source, shift, mask = args
        loaded = builder.load(_at(builder, source, _I8, LANES))
        loaded.align = 1
        wide = builder.lshr(builder.zext(loaded, _VI32), _splat(builder, shift, _VI32))
        return builder.uitofp(builder.and_(wide, _splat(builder, mask, _VI32)), _VF32)

    return signature(lanes, types.uintp, types.uint32, types.uint32), codegen


@intrinsic
def splat(typingctx, scalar):
    """All sixteen lanes equal to one fp32."""

    def codegen(context, builder, sig, args):
        return _splat(builder, args[0], _VF32)

    return signature(lanes, types.float32), codegen


def _make_select(predicate):
    @intrinsic
    def select(typingctx, a, b):
        def codegen(context, builder, sig, args):
            return builder.select(builder.fcmp_ordered(predicate, *args), *args)

        return signature(lanes, lanes, lanes), codegen

    return select


# `a < b ? a : b` is one instruction everywhere but ignores a NaN in `a`; callers look for NaN separately.
lane_min, lane_max = _make_select("<"), _make_select(">")


def _make_reduce(predicate):
    @intrinsic
    def reduce(typingctx, v):
        def codegen(context, builder, sig, args):
            v, width = args[0], LANES
            while width > 1:
                width //= 2
                index = [ir.Constant(_I32, i) for i in range(width)]
                upper = [ir.Constant(_I32, i + width) for i in range(width)]
                half = ir.VectorType(_I32, width)
                undefined = ir.Constant(v.type, ir.Undefined)
                a = builder.shuffle_vector(v, undefined, ir.Constant(half, index))
                b = builder.shuffle_vector(v, undefined, ir.Constant(half, upper))
                v = (
                    builder.fadd(a, b)
                    if predicate is None
                    else builder.select(builder.fcmp_ordered(predicate, a, b), a, b)
                )
            return builder.extract_element(v, ir.Constant(_I32, 0))

        return signature(types.float32, lanes), codegen

    return reduce


reduce_min, reduce_max, reduce_add = _make_reduce("<"), _make_reduce(">"), _make_reduce(None)


@intrinsic
def bits_of(typingctx, value):
    """The 32-bit pattern of an fp32."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], _I32)

    return signature(types.uint32, types.float32), codegen


@intrinsic
def from_bits(typingctx, pattern):
    """The fp32 with a 32-bit pattern."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], _F32)

    return signature(types.float32, types.uint32), codegen


def _make_word(bits, nb_type):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            value = builder.load(builder.inttoptr(args[0], ir.PointerType(ir.IntType(bits))))
            value.align = 1
            return value

        return signature(nb_type, types.uintp), codegen

    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, sig, args):
            builder.store(args[1], builder.inttoptr(args[0], ir.PointerType(ir.IntType(bits)))).align = 1
            return context.get_dummy_value()

        return signature(types.void, types.uintp, nb_type), codegen

    return load, store


load_byte, store_byte = _make_word(8, types.uint8)
load_half, store_half = _make_word(16, types.uint16)
load_word64, store_word64 = _make_word(64, types.uint64)


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at `address`, which may lie outside any buffer: a prefetch never faults."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.PointerType(_I8))
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer] + [ir.Constant(_I32, c) for c in (0, 3, 1)])
        return context.get_dummy_value()

    return signature(types.void, types.uintp), codegen
