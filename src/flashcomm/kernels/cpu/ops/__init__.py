"""Ops: functions that work on one row, sixteen lanes at a time. `formats` strings them into programs.

    affine   ranges | affine_scales | quantise | pack          unpack | affine_meta | dequantise
    block    ranges | block_scales | round_floats | pack       unpack | block_meta | read_floats

An op works on arrays that stay in the cache: a row is some thousand values. It is one function for all formats of its
kind, so a new format compiles nothing. It is compiled when a program first needs it, in about 0.1 s.

Hazard: an op gets addresses and counts, all of them int64, and checks nothing. It reads and writes whole vectors, up to
512 bytes beyond the end of its arrays. Scratch arrays of a program have room for that; a tensor's own row is used only
where it cannot happen. Ops believe what a payload says, except for places in memory.

Scales and zero points come as one fp32 per group. `spread` repeats them to one per `unit`, so that a loop needs no
groups: a unit is 32 values of bf16 or 16 of fp32 where groups are multiples of that, otherwise 2 values or 1.

Names: src, dst and other arrays are addresses; a row has n values in `count` groups of `group`; fp32 operands arrive as
their bits, `..._bits`; `flag` is the address of an int32 that is not 0 if a group decodes to NaN.

One file per idea, as in `codecs`: `rows`, `ranges`, `planes`; `affine`, `blocks`, `spikes`, `transforms`, `peaks`,
`calibrated`, `entropy`, `lossless`, `stochastic`.

Source: our own. Bit planes: FlashCommunication V2 (arXiv 2508.03760), bit splitting.
"""

from flashcomm.kernels.cpu.ops.affine import affine_meta, affine_scales, dequantise, quantise, quantise_pairs
from flashcomm.kernels.cpu.ops.base import BF16, FP16, FP32, PAIRS, Op, compiled
from flashcomm.kernels.cpu.ops.blocks import (
    meta_e4m3,
    meta_e5m0,
    meta_e8m0,
    read_floats,
    round_floats,
    scales_e4m3,
    scales_e5m0,
    scales_e8m0,
    scales_fp32,
)
from flashcomm.kernels.cpu.ops.calibrated import lengthen, mark_nan, pick_table, put_back, take_out, unmark_nan
from flashcomm.kernels.cpu.ops.entropy_plan import plan_row
from flashcomm.kernels.cpu.ops.entropy_read import read_codes, read_row
from flashcomm.kernels.cpu.ops.entropy_write import write_row
from flashcomm.kernels.cpu.ops.lossless import pack_row, unpack_row
from flashcomm.kernels.cpu.ops.peaks import level_codes, level_scale, level_values, put_peaks, take_peaks
from flashcomm.kernels.cpu.ops.planes import pack, pack_rest, unpack, unpack_rest
from flashcomm.kernels.cpu.ops.ranges import (
    magnitudes_bf16,
    magnitudes_fp32,
    ranges_bf16,
    ranges_fp32,
    shrink_bf16,
    shrink_fp32,
    shrink_magnitudes,
)
from flashcomm.kernels.cpu.ops.rows import (
    accumulate,
    add_bf16,
    add_two,
    add_wide,
    clean_bf16,
    copy_bytes,
    forget,
    narrow,
    put_byte,
    spread,
    widen,
)
from flashcomm.kernels.cpu.ops.spikes import (
    find_spikes,
    find_spikes_bf16,
    put_spikes,
    shrink_spikes,
    spike_meta,
    spike_scales,
    two_largest,
    two_smallest,
)
from flashcomm.kernels.cpu.ops.stochastic import dither, quantise_dithered, round_floats_dithered
from flashcomm.kernels.cpu.ops.transforms import (
    adapt,
    hadamard,
    hadamard_pairs,
    hadamard_ranges,
    hadamard_to_bf16,
    invert,
)
