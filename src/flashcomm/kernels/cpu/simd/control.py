"""The loop over steps: calls of ops by address, its memory, and the thread's floating-point control."""

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from flashcomm.kernels.cpu.simd.vectors import I8, I32, I64, call_intrinsic


def _read_control(builder):
    """The thread's floating-point control register, and its bits that flush; None on CPUs that cannot flush."""
    if platform.machine() in ("x86_64", "AMD64"):
        place = cgutils.alloca_once(builder, I32)
        call_intrinsic(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(place, ir.PointerType(I8)))
        # Flush results, and take arguments for zero.
        return builder.zext(builder.load(place), I64), 1 << 15 | 1 << 6
    if platform.machine() in ("aarch64", "arm64"):
        # FZ, FZ16 and FIZ.
        return call_intrinsic(builder, "llvm.aarch64.get.fpcr", I64), 1 << 24 | 1 << 19 | 1
    return None


def _write_control(builder, control):
    if platform.machine() in ("x86_64", "AMD64"):
        place = cgutils.alloca_once_value(builder, builder.trunc(control, I32))
        call_intrinsic(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(place, ir.PointerType(I8)))
    else:
        call_intrinsic(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), control)


@intrinsic
def keep_subnormals(typingctx):
    """Stop this thread from flushing subnormal numbers; return what `restore_control` needs."""

    def codegen(context, builder, sig, args):
        found = _read_control(builder)
        if found is None:
            return ir.Constant(I64, 0)
        control, flushing = found
        changes = builder.icmp_unsigned("!=", builder.and_(control, ir.Constant(I64, flushing)), ir.Constant(I64, 0))
        with builder.if_then(changes, likely=False):
            _write_control(builder, builder.and_(control, ir.Constant(I64, ~flushing)))
        # 0 where there is nothing to restore, which no register that flushes holds.
        return builder.select(changes, control, ir.Constant(I64, 0))

    return signature(types.int64), codegen


@intrinsic
def restore_control(typingctx, before):
    """Undo `keep_subnormals`."""

    def codegen(context, builder, sig, args):
        if platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64"):
            with builder.if_then(builder.icmp_unsigned("!=", args[0], ir.Constant(I64, 0)), likely=False):
                _write_control(builder, args[0])
        return context.get_dummy_value()

    return signature(types.void, types.int64), codegen


@intrinsic
def stack(typingctx):
    """Address of memory for 32 int64, until the function returns. numba's arrays would take 0.2 s to compile."""

    def codegen(context, builder, sig, args):
        with builder.goto_entry_block():
            return builder.ptrtoint(builder.alloca(I64, 32), I64)

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
                loaded = [builder.load(builder.gep(base, [ir.Constant(I32, i)])) for i in range(n)]
                builder.call(builder.inttoptr(function, ir.PointerType(kind)), loaded)
                builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature(types.void, types.int64, types.int64, types.int64), codegen
