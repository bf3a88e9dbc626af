"""The end of an all-reduce in a transformer's layer, in one kernel: decode, add the residual, normalise."""

import triton
import triton.language as tl

from flashcomm.kernels.gpu.tiles.move import read_sum
from flashcomm.kernels.gpu.tiles.values import narrow, read_values, widen, write_values


@triton.jit(do_not_specialize=["ranks"])
def add_norm(
    payload_ptr,
    rank_stride,
    row_stride,
    ranks,
    residual_ptr,
    residual_stride,
    weight_ptr,
    out_ptr,
    total_ptr,
    cols,
    epsilon,
    SOURCE: tl.constexpr,
    VALUES: tl.constexpr,
    V: tl.constexpr,
    EDGE: tl.constexpr,
):
    """total = decoded sum + residual; out = total / sqrt(mean(total**2) + epsilon) * weight. One program for each row.

    The sum, the total, the norm and the product are rounded to the values' type, as in a model without this kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    x = read_sum(payload_ptr + row * row_stride, rank_stride, ranks, 0, cols, SOURCE, V, EDGE)
    residual = read_values(residual_ptr + row * residual_stride, 0, cols, VALUES, V, EDGE)
    total = widen(narrow(widen(narrow(x, VALUES), VALUES) + residual, VALUES), VALUES)
    write_values(total_ptr + row * cols, total, 0, cols, VALUES, V, EDGE)
    # Beyond the row there may be any values.
    squares = tl.where(tl.arange(0, V) < cols, total * total, 0.0)
    mean = tl.div_rn(tl.sum(squares, axis=0), cols.to(tl.float32))
    normed = total * tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon))
    weight = read_values(weight_ptr, 0, cols, VALUES, V, EDGE)
    write_values(out_ptr + row * cols, widen(narrow(normed, VALUES), VALUES) * weight, 0, cols, VALUES, V, EDGE)
