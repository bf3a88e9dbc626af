"""The CPU kernels compiled for ARM on any machine, down to machine code, which is looked at and not run.

A script, since it changes what numba takes this process for: ``python tests/cross.py [OP ...]``, all ops if none is
named. It prints the assembly.
"""

import platform
import sys

import llvmlite.binding as llvm
from numba import njit, types
from numba.core import codegen, compiler, compiler_lock, cpu, dispatcher, registry

TRIPLE = "aarch64-unknown-linux-gnu"


@compiler_lock.global_compiler_lock
def compile_ir(function, arguments, result=None):
    """Let numba compile a function, and what it calls, as far as LLVM's code."""
    flags = compiler.Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = flags.nrt = True
    flags.error_model = "numpy"
    target = registry.cpu_target
    made = compiler.compile_extra(target.typing_context, target.target_context, function, arguments, result, flags, {})
    made.library.finalize()


def instructions(code: str, machine: llvm.TargetMachine) -> str:
    """ARM's assembly of LLVM's code."""
    module = llvm.parse_assembly(code)
    module.triple, module.data_layout = TRIPLE, str(machine.target_data)
    module.verify()
    for function in module.functions:
        if function.name.startswith("NRT_") and not function.is_declaration:
            # numba's own runtime, which has been made for this machine already.
            function.linkage = "available_externally"
    return machine.emit_assembly(module)


def compile_kernels(names):
    """Compile ops and every loop."""
    from flashcomm.kernels.cpu import ops, run
    from flashcomm.transports import rows
    from flashcomm.transports.shared import loops

    for name, op in vars(ops).items():
        if isinstance(op, ops.Op) and (name in names or not names):
            compile_ir(op._function, (types.int64,) * op.operands, types.void)
    table, bytes_, one = types.int64[:, ::1], types.uint8[::1], types.int64
    compile_ir(run.run_rows.py_func, (table, one, one, one, one, table, one, one, bytes_, one, one))
    for loop in (loops._sum, loops._two_step, loops._gather):
        compile_ir(loop, loops.SIGNATURE)
    compile_ir(rows._pack.py_func, (bytes_, one, one, bytes_))
    compile_ir(rows._spread.py_func, (bytes_, one, one, one, types.int64[::1]))


def main(names):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    # Before the lie: what numba itself needs must run here.
    njit(lambda x: x + 1)(1)
    # What is compiled from now on must be found by nobody, and not become code of this process.
    code = []
    dispatcher.Dispatcher.enable_caching = lambda self: None
    codegen.JITCodeLibrary._finalize_specific = lambda library: code.append(library.get_llvm_str())
    # numba tells functions apart by these.
    cpu.CPUContext.get_executable = lambda *_: [].append
    platform.machine = lambda: "aarch64"
    compile_kernels(names)
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu="generic", opt=1)
    print(*[instructions(text, machine) for text in code])


if __name__ == "__main__":
    main(sys.argv[1:])
