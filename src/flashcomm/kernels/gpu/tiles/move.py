"""The one kernel of the codecs: read tiles of values or payloads of R ranks, add in fp32, write values or a payload."""

import triton
import triton.language as tl

from flashcomm.kernels.gpu.tiles.affine import read_affine, write_affine
from flashcomm.kernels.gpu.tiles.blocks import largest_magnitude, read_block, write_block
from flashcomm.kernels.gpu.tiles.spikes import read_spike, write_spike
from flashcomm.kernels.gpu.tiles.values import numbers_at, read_values, write_values


@triton.jit
def read(ptr, start, cols, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """[V] fp32: the columns from `start` on of the row at `ptr`, which has `cols` values in the format `F`."""
    if F.kind == "values":
        return read_values(ptr, start, cols, F, V, EDGE)
    elif F.kind == "cast":
        return read_values(numbers_at(ptr, F), start, cols, F, V, EDGE)
    elif F.kind == "affine":
        return read_affine(ptr, start, cols, F, V, EDGE)
    elif F.kind == "block":
        return read_block(ptr, start, cols, F, V, EDGE)
    else:
        return read_spike(ptr, start, cols, F, V, EDGE)


@triton.jit
def write(ptr, x, start, cols, largest, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Inverse of `read`. Formats that share something over a row need `largest`: see `blocks.largest_magnitude`."""
    if F.kind == "values":
        write_values(ptr, x, start, cols, F, V, EDGE)
    elif F.kind == "cast":
        write_values(numbers_at(ptr, F), x, start, cols, F, V, EDGE)
    elif F.kind == "affine":
        write_affine(ptr, x, start, cols, F, V, EDGE)
    elif F.kind == "block":
        write_block(ptr, x, start, cols, largest, F, V, EDGE)
    else:
        write_spike(ptr, x, start, cols, F, V, EDGE)


@triton.jit
def read_sum(ptr, rank_stride, ranks, start, cols, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """[V] fp32: the sum of `read` over ranks, whose rows lie `rank_stride` apart, rank 0 first."""
    total = read(ptr, start, cols, F, V, EDGE)
    # Payloads of several ranks may lie more than 2 GiB apart, and Triton takes small strides for 32-bit numbers.
    far = tl.full([], 0, tl.int64) + rank_stride
    for rank in range(1, ranks):
        total += read(ptr + rank * far, start, cols, F, V, EDGE)
    return total


@triton.jit(do_not_specialize=["ranks"])
def move(
    source_ptr,
    source_rank_stride,
    source_row_stride,
    ranks,
    target_ptr,
    target_row_stride,
    cols,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    V: tl.constexpr,
    EDGE: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
):
    """Target row t = the sum over ranks of their source rows t; one program for each tile, or for each row.

    Strides count elements of the pointers, which are bytes of a payload.
    """
    tiles = tl.cdiv(cols, V)
    if WHOLE_ROWS:
        row = tl.program_id(0).to(tl.int64)
        source, target = source_ptr + row * source_row_stride, target_ptr + row * target_row_stride
        largest = 0
        for tile in range(tiles):
            x = read_sum(source, source_rank_stride, ranks, tile * V, cols, SOURCE, V, EDGE)
            largest = tl.maximum(largest, largest_magnitude(x, tile * V, cols, TARGET, V, EDGE))
        for tile in range(tiles):
            x = read_sum(source, source_rank_stride, ranks, tile * V, cols, SOURCE, V, EDGE)
            write(target, x, tile * V, cols, largest, TARGET, V, EDGE)
    else:
        row = (tl.program_id(0) // tiles).to(tl.int64)
        source, target = source_ptr + row * source_row_stride, target_ptr + row * target_row_stride
        start = tl.program_id(0) % tiles * V
        x = read_sum(source, source_rank_stride, ranks, start, cols, SOURCE, V, EDGE)
        write(target, x, start, cols, 0, TARGET, V, EDGE)
