"""Sixteen lanes as a numba value, with the loads, stores and bit operations that the wire formats need.

Separate from the ops because it is the only place that speaks LLVM. numba's own vectoriser leaves loops of fewer than
64 trips scalar, which makes groups of 32 four times slower than groups of 128. A value that *is* a vector has no such
cliff: LLVM splits it into whatever registers the CPU has (AVX-512, AVX2, NEON).

There are `lanes` (sixteen fp32) and `words` (sixteen int32), with Python's operators between two of them or with a
scalar on the right; `>>` on words fills with zeros. `halves` (32 int16) exist to find ranges of bf16,
`octets` (64 bytes, without signs) to take 16-bit values apart.

    vectors    the types, their operators, and what the other files build LLVM from
    memory     loads and stores of vectors
    longs      single integers, in memory too
    compares   the smaller and the larger, side by side or folded together, and keys that order
    planes     codes as bits
    octets     64 bytes at a time
    hadamard   transforms in registers
    control    the call of an op, and the control of floating-point numbers

Hazard: addresses are plain integers and nothing checks them. Only `flashcomm.kernels.cpu` may call these.

Source: our own.
"""

from flashcomm.kernels.cpu.simd.compares import *
from flashcomm.kernels.cpu.simd.control import *
from flashcomm.kernels.cpu.simd.hadamard import *
from flashcomm.kernels.cpu.simd.longs import *
from flashcomm.kernels.cpu.simd.memory import *
from flashcomm.kernels.cpu.simd.octets import *
from flashcomm.kernels.cpu.simd.planes import *
from flashcomm.kernels.cpu.simd.vectors import *
