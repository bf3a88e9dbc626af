"""The vectors as numba values, with Python's operators, and what all other files build LLVM from."""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16


F32, I32, I16, I8 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)


class _Vector(types.Type):
    def __init__(self, name, element, count):
        self.ir_type = ir.VectorType(element, count)
        super().__init__(name=name)


lanes = _Vector("fp32x16", F32, LANES)


words = _Vector("int32x16", I32, LANES)


halves = _Vector("int16x32", I16, 32)


octets = _Vector("int8x64", I8, 64)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.ir_type)


def splatted(builder, scalar, vector_type):
    """The scalar in every element."""
    one = builder.insert_element(ir.Constant(vector_type, ir.Undefined), scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, vector_type.count), [ir.Constant(I32, 0)] * vector_type.count)
    return builder.shuffle_vector(one, ir.Constant(vector_type, ir.Undefined), zeros)


def constant(vector_type, value):
    """The integer or the number in every element."""
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
            return getattr(builder, instruction)(args[0], splatted(builder, right, vector.ir_type))


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


_declare_operator(operator.mul, words, [types.int64], "mul")


def _at(builder, address, element, count):
    pointee = ir.VectorType(element, count) if count > 1 else element
    return builder.inttoptr(address, ir.PointerType(pointee))


def load_raw(builder, address, element, count):
    """Load `count` elements from an address of any alignment."""
    loaded = builder.load(_at(builder, address, element, count))
    loaded.align = 1
    return loaded


def store_raw(builder, value, address, element, count):
    """Store `count` elements at an address of any alignment."""
    builder.store(value, _at(builder, address, element, count)).align = 1


def wide_type(element, count):
    """A vector of `count` elements, or the element itself."""
    return ir.VectorType(element, count) if count > 1 else element


def int_constant(count, value):
    """An int32 in each of `count` elements."""
    return constant(ir.VectorType(I32, count), value) if count > 1 else ir.Constant(I32, value)


@intrinsic
def splat(typingctx, scalar):
    """Set all sixteen lanes to one fp32."""

    def codegen(context, builder, sig, args):
        return splatted(builder, args[0], lanes.ir_type)

    return signature(lanes, types.float32), codegen


@intrinsic
def splat_halves(typingctx, scalar):
    """Set all 32 int16 to one integer."""

    def codegen(context, builder, sig, args):
        return splatted(builder, builder.trunc(args[0], I16), halves.ir_type)

    return signature(halves, types.int64), codegen


@intrinsic
def splat_words(typingctx, scalar):
    """Set all sixteen words to one integer."""

    def codegen(context, builder, sig, args):
        return splatted(builder, builder.trunc(args[0], I32), words.ir_type)

    return signature(words, types.int64), codegen


@intrinsic
def places(typingctx):
    """The words 0 to 15."""

    def codegen(context, builder, sig, args):
        return ir.Constant(words.ir_type, [ir.Constant(I32, i) for i in range(LANES)])

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


@intrinsic
def twice_minus(typingctx, v, w):
    """2 v - w, for values where that is exact."""

    def codegen(context, builder, sig, args):
        two = ir.Constant(lanes.ir_type, [ir.Constant(F32, 2.0)] * LANES)
        return fmuladd(builder, args[0], two, builder.fneg(args[1]))

    return signature(lanes, lanes, lanes), codegen


def moved(builder, address, by):
    """An address `by` bytes later."""
    return builder.add(address, ir.Constant(address.type, by))


def fmuladd(builder, a, b, c):
    """Compute a * b + c, fused where the CPU can: only for products that are exact, so that fusing changes no bit."""
    kind = ir.FunctionType(lanes.ir_type, [lanes.ir_type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [a, b, c])


@intrinsic
def pairwise_sum(typingctx, v):
    """Sum of sixteen lanes: neighbours are added, then neighbouring sums, and so on."""

    def codegen(context, builder, sig, args):
        v, width = args[0], LANES
        while width > 1:
            width //= 2
            undefined = ir.Constant(v.type, ir.Undefined)
            index = ir.VectorType(I32, width)
            even, odd = (
                builder.shuffle_vector(
                    v, undefined, ir.Constant(index, [ir.Constant(I32, 2 * i + k) for i in range(width)])
                )
                for k in (0, 1)
            )
            v = builder.fadd(even, odd)
        return builder.extract_element(v, ir.Constant(I32, 0))

    return signature(types.float32, lanes), codegen


I64 = ir.IntType(64)


def call_intrinsic(builder, name, result, *operands):
    """Call a function of LLVM, such as ``llvm.prefetch.p0``."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


@intrinsic
def words_signed_shift(typingctx, v, by):
    """Shift sixteen words to the right, filled with their signs."""

    def codegen(context, builder, sig, args):
        return builder.ashr(args[0], splatted(builder, builder.trunc(args[1], I32), words.ir_type))

    return signature(words, words, types.int64), codegen
