"""The codecs on the CPU, compiled by numba."""

from flashcomm.kernels.cpu.formats import (
    KINDS,
    STEP_FIELDS,
    decode_sum,
    decode_sum_encode,
    decoder,
    encode,
    encoder,
    pool,
    reducer,
    run_rows,
    supports,
)
from flashcomm.kernels.cpu.ops import compiled

__all__ = [
    "KINDS", "STEP_FIELDS", "compiled", "decode_sum", "decode_sum_encode", "decoder", "encode", "encoder", "pool",
    "reducer", "run_rows", "supports",
]  # fmt: skip
