"""The affine codecs on the CPU: numba, sixteen lanes at a time, the same bytes as `flashcomm.codecs.affine`.

Separate from the specification because this is the speed and that is the meaning. Every function below takes addresses,
never arrays: one compiled kernel then serves every dtype, bit width, group size and stride, and the first call of a
process costs one compilation (kept on disk by numba) instead of one per format.

Hazard: nothing here checks its arguments; `flashcomm.kernels` does.

Shape legend: n values of one group, `group` its nominal length, `cols` values in a row, `kind` the dtype (see `KINDS`).

Source: our own. Bit planes: FlashCommunication V2 (arXiv 2508.03760), bit splitting.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import njit

from flashcomm.kernels import simd

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

_f32, _u8, _u16, _u32, _u64, _addr = np.float32, np.uint8, np.uint16, np.uint32, np.uint64, np.uintp

# Adding 1.5 * 2^23 to a small non-negative fp32 rounds it half to even and leaves the integer in its lowest bits.
_ROUND = _f32(12582912.0)
_TINY = _f32(2.0**-126)
_NAN_BF16 = _u32(0x7FC0)
# How far ahead the input is fetched. The hardware stops at 4 KiB pages, and waiting there costs a third of the time;
# anything from 1 to 4 KiB measured the same.
_AHEAD = _addr(2048)

_inline = njit(forceinline=True, error_model="numpy")


def _kernel(function):
    """Compile at the first call and keep the result on disk, or in this process where no folder can be written to."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        return njit(nogil=True, error_model="numpy")(function)


@_inline
def _load(address, kind):
    if kind == 0:
        return simd.load_bf16(address)
    elif kind == 1:
        return simd.load_fp16(address)
    return simd.load_fp32(address)


@_inline
def _load1(address, kind):
    if kind == 0:
        return simd.load1_bf16(address)
    elif kind == 1:
        return simd.load1_fp16(address)
    return simd.load1_fp32(address)


@_inline
def _store(address, kind, value):
    if kind == 0:
        simd.store_bf16(address, value)
    elif kind == 1:
        simd.store_fp16(address, value)
    else:
        simd.store_fp32(address, value)


@_inline
def _store1(address, kind, value):
    if kind == 0:
        simd.store1_bf16(address, value)
    elif kind == 1:
        simd.store1_fp16(address, value)
    else:
        simd.store1_fp32(address, value)


@_inline
def _itemsize(kind):
    return _addr(4) if kind == 2 else _addr(2)


@_inline
def _range(src, kind, n):
    """Smallest and largest of n values, and whether all are finite."""
    size = _itemsize(kind)
    full = n & ~_addr(15)
    low, high, poison = _f32(np.inf), _f32(-np.inf), _f32(0)
    if full > _addr(0):
        first = _load(src, kind)
        lows, highs, zeros = first, first, simd.splat(_f32(0))
        # x * 0 is NaN for NaN and Inf alone; the comparisons below would lose them.
        poisons = first * zeros
        for i in range(_addr(16), full, _addr(16)):
            v = _load(src + i * size, kind)
            lows, highs = simd.lane_min(v, lows), simd.lane_max(v, highs)
            poisons = poisons + v * zeros
        low, high, poison = simd.reduce_min(lows), simd.reduce_max(highs), simd.reduce_add(poisons)
    for i in range(full, n):
        v = _load1(src + i * size, kind)
        low = v if v < low else low
        high = v if v > high else high
        poison += v * _f32(0)
    return low, high, poison == _f32(0)


@_inline
def _quantise(src, kind, n, zero, inverse, codes):
    size = _itemsize(kind)
    full = n & ~_addr(15)
    zeros, inverses, rounds = simd.splat(zero), simd.splat(inverse), simd.splat(_ROUND)
    for i in range(_addr(0), full, _addr(16)):
        simd.store_code(codes + i, (_load(src + i * size, kind) - zeros) * inverses + rounds)
    for i in range(full, n):
        simd.store1_code(codes + i, (_load1(src + i * size, kind) - zero) * inverse + _ROUND)


@_inline
def _plane_bytes(n, width):
    return (n * _addr(width) + _addr(7)) >> _addr(3)


@_inline
def _pack_plane(codes, n, width, shift, dst):
    """Bits shift..shift+width of every code; code i and codes i + m, i + 2m, ... share byte i of the m bytes."""
    m = _plane_bytes(n, width)
    byte_mask = _u64((1 << width) - 1)
    mask = byte_mask * _u64(0x0101010101010101)
    full = m & ~_addr(7)
    for i in range(_addr(0), full, _addr(8)):
        word = (simd.load_word64(codes + i) >> shift) & mask
        for t in range(1, 8 // width):
            word |= ((simd.load_word64(codes + i + m * _addr(t)) >> shift) & mask) << _u64(t * width)
        simd.store_word64(dst + i, word)
    for i in range(full, m):
        word = _u64(0)
        for t in range(8 // width):
            j = i + m * _addr(t)
            if j < n:
                word |= ((_u64(simd.load_byte(codes + j)) >> shift) & byte_mask) << _u64(t * width)
        simd.store_byte(dst + i, _u8(word))
    return dst + m


@_inline
def _pack(codes, n, bits, dst):
    shift = _u64(0)
    if bits & 4:
        dst = _pack_plane(codes, n, 4, shift, dst)
        shift += _u64(4)
    if bits & 2:
        dst = _pack_plane(codes, n, 2, shift, dst)
        shift += _u64(2)
    if bits & 1:
        _pack_plane(codes, n, 1, shift, dst)


@_inline
def _unpack_plane(src, n, width, shift, codes):
    """Inverse of `_pack_plane`; ORs into codes unless this is the first plane (shift 0)."""
    m = _plane_bytes(n, width)
    byte_mask = _u64((1 << width) - 1)
    mask = byte_mask * _u64(0x0101010101010101)
    full = m & ~_addr(7)
    for i in range(_addr(0), full, _addr(8)):
        word = simd.load_word64(src + i)
        for t in range(8 // width):
            at = codes + i + m * _addr(t)
            part = ((word >> _u64(t * width)) & mask) << shift
            simd.store_word64(at, part if shift == _u64(0) else part | simd.load_word64(at))
    for i in range(full, m):
        word = _u64(simd.load_byte(src + i))
        for t in range(8 // width):
            j = i + m * _addr(t)
            if j < n:
                part = ((word >> _u64(t * width)) & byte_mask) << shift
                old = _u64(0) if shift == _u64(0) else _u64(simd.load_byte(codes + j))
                simd.store_byte(codes + j, _u8(part | old))
    return src + m


@_inline
def _unpack(src, n, bits, codes):
    shift = _u64(0)
    if bits & 4:
        src = _unpack_plane(src, n, 4, shift, codes)
        shift += _u64(4)
    if bits & 2:
        src = _unpack_plane(src, n, 2, shift, codes)
        shift += _u64(2)
    if bits & 1:
        _unpack_plane(src, n, 1, shift, codes)


@_inline
def _code_bytes(n, bits):
    total = _addr(0)
    for width in (8, 4, 2, 1):
        if bits & width:
            total += _plane_bytes(n, width)
    return total


@_inline
def _last_code(bits, symmetric):
    return _f32((1 << bits) - 2) if symmetric and bits > 1 else _f32((1 << bits) - 1)


@_inline
def _encode_group(src, kind, n, bits, symmetric, dst, meta, codes):
    low, high, finite = _range(src, kind, n)
    last = _last_code(bits, symmetric)
    if symmetric:
        span, steps = max(-low, high), last * _f32(0.5)
        zero = _f32(0)
    else:
        pattern = simd.bits_of(low)
        if low < _f32(0):
            pattern += _u32(0xFFFF)
        # Down to bf16; + 0 turns -0 into +0, so that the order of equal values leaves no trace in the bytes.
        zero = simd.from_bits(_u32(pattern & _u32(0xFFFF0000))) + _f32(0)
        span, steps = high - zero, last
    scale_bits, scale, inverse = _u32(0), _f32(0), _f32(0)
    if span > _f32(0):
        scale = max(span / steps, _TINY)
        scale_bits = _u32((simd.bits_of(scale) + _u32(0xFFFF)) >> _u32(16))
        scale = simd.from_bits(_u32(scale_bits << _u32(16)))
        inverse = _f32(1) / scale
    if symmetric:
        zero = -steps * scale
    top = last * scale
    if finite and top < _f32(np.inf) and top + zero < _f32(np.inf) and zero > _f32(-np.inf):
        zero_bits = simd.bits_of(zero) >> _u32(16)
        if bits == 8:
            _quantise(src, kind, n, zero, inverse, dst)
        else:
            _quantise(src, kind, n, zero, inverse, codes)
            # A plane's last byte may have room for codes that do not exist; they are 0.
            simd.store_word64(codes + n, _u64(0))
            _pack(codes, n, bits, dst)
    else:
        scale_bits = zero_bits = _NAN_BF16
        for i in range(_code_bytes(n, bits)):
            simd.store_byte(dst + _addr(i), _u8(0))
    simd.store_half(meta, _u16(scale_bits))
    if not symmetric:
        simd.store_half(meta + _addr(2), _u16(zero_bits))


@_inline
def _encode_row(src, kind, cols, bits, symmetric, group, dst, codes):
    size, meta_bytes = _itemsize(kind), _addr(2) if symmetric else _addr(4)
    full = cols // group
    rest = cols - full * group
    group_bytes = _code_bytes(group, bits)
    meta = dst + full * group_bytes + _code_bytes(rest, bits)
    for j in range(full):
        for ahead in range(_addr(0), group * size, _addr(64)):
            simd.prefetch(src + ahead + _AHEAD)
        _encode_group(src, kind, group, bits, symmetric, dst, meta, codes)
        src += group * size
        dst += group_bytes
        meta += meta_bytes
    if rest:
        _encode_group(src, kind, rest, bits, symmetric, dst, meta, codes)


@_inline
def _next_block(offset, shift, m, width):
    """The (byte, bit) at which a plane of m bytes keeps the sixteen codes after those at (offset, shift)."""
    offset += _addr(16)
    if offset == m:
        return _addr(0), _u32(shift + width)
    return offset, shift


@_inline
def _decode_planes(src, n, bits, scales, zeros, add, dst, kind):
    """Codes to values without a detour over memory; every plane must be a multiple of sixteen bytes."""
    size = _itemsize(kind)
    m4, m2, m1 = n >> _addr(1), n >> _addr(2), n >> _addr(3)
    src2 = src + m4 if bits & 4 else src
    src1 = src2 + m2 if bits & 2 else src2
    weight2 = _f32(16) if bits & 4 else _f32(1)
    weights2, weights1 = simd.splat(weight2), simd.splat(weight2 * _f32(4) if bits & 2 else weight2)
    at4 = at2 = at1 = _addr(0)
    shift4 = shift2 = shift1 = _u32(0)
    for i in range(_addr(0), n, _addr(16)):
        codes = simd.splat(_f32(0))
        if bits & 4:
            codes = simd.load_bits(src + at4, shift4, _u32(15))
            at4, shift4 = _next_block(at4, shift4, m4, _u32(4))
        if bits & 2:
            codes = codes + simd.load_bits(src2 + at2, shift2, _u32(3)) * weights2
            at2, shift2 = _next_block(at2, shift2, m2, _u32(2))
        if bits & 1:
            codes = codes + simd.load_bits(src1 + at1, shift1, _u32(1)) * weights1
            at1, shift1 = _next_block(at1, shift1, m1, _u32(1))
        v = codes * scales + zeros
        if add:
            v = simd.load_fp32(dst + i * size) + v
        _store(dst + i * size, kind, v)


@_inline
def _decode_group(src, meta, n, bits, symmetric, add, dst, kind, codes):
    size = _itemsize(kind)
    scale = simd.from_bits(_u32(_u32(simd.load_half(meta)) << _u32(16)))
    if symmetric:
        zero = _last_code(bits, symmetric) * _f32(-0.5) * scale
    else:
        zero = simd.from_bits(_u32(_u32(simd.load_half(meta + _addr(2))) << _u32(16)))
    scales, zeros = simd.splat(scale), simd.splat(zero)
    if bits == 8:
        codes = src
    elif n % _addr(128 // (bits & -bits)) == _addr(0):
        _decode_planes(src, n, bits, scales, zeros, add, dst, kind)
        return
    else:
        _unpack(src, n, bits, codes)
    full = n & ~_addr(15)
    for i in range(_addr(0), full, _addr(16)):
        v = simd.load_u8(codes + i) * scales + zeros
        if add:
            v = simd.load_fp32(dst + i * size) + v
        _store(dst + i * size, kind, v)
    for i in range(full, n):
        v1 = simd.load1_u8(codes + i) * scale + zero
        if add:
            v1 = simd.load1_fp32(dst + i * size) + v1
        _store1(dst + i * size, kind, v1)


@_inline
def _decode_row(src, cols, bits, symmetric, group, add, dst, kind, codes):
    size, meta_bytes = _itemsize(kind), _addr(2) if symmetric else _addr(4)
    full = cols // group
    rest = cols - full * group
    group_bytes = _code_bytes(group, bits)
    meta = src + full * group_bytes + _code_bytes(rest, bits)
    for j in range(full):
        for ahead in range(_addr(0), group_bytes, _addr(64)):
            simd.prefetch(src + ahead + _AHEAD)
        _decode_group(src, meta, group, bits, symmetric, add, dst, kind, codes)
        src += group_bytes
        dst += group * size
        meta += meta_bytes
    if rest:
        _decode_group(src, meta, rest, bits, symmetric, add, dst, kind, codes)


@_inline
def _convert_row(src, cols, dst, kind):
    size = _itemsize(kind)
    full = cols & ~_addr(15)
    for i in range(_addr(0), full, _addr(16)):
        _store(dst + i * size, kind, simd.load_fp32(src + i * _addr(4)))
    for i in range(full, cols):
        _store1(dst + i * size, kind, simd.load1_fp32(src + i * _addr(4)))


@_kernel
def _encode(x, x_stride, kind, payload, payload_stride, first, last, cols, bits, symmetric, group):
    scratch = np.empty(min(group, cols) + 64, np.uint8)
    for r in range(first, last):
        _encode_row(
            _addr(x + r * x_stride), kind, _addr(cols), bits, symmetric, _addr(group),
            _addr(payload + r * payload_stride), _addr(scratch.ctypes.data),
        )  # fmt: skip


@_kernel
def _decode_sum(
    payload, rank_stride, ranks, payload_stride, y, y_stride, kind, first, last, cols, bits, symmetric, group
):
    scratch = np.empty(min(group, cols) + 64, np.uint8)
    sums = np.empty(cols if ranks > 1 and kind != 2 else 0, np.float32)
    for r in range(first, last):
        target = _addr(y + r * y_stride)
        into, into_kind = (target, kind) if ranks == 1 or kind == 2 else (_addr(sums.ctypes.data), 2)
        for rank in range(ranks):
            _decode_row(
                _addr(payload + rank * rank_stride + r * payload_stride), _addr(cols), bits, symmetric, _addr(group),
                rank > 0, into, into_kind, _addr(scratch.ctypes.data),
            )  # fmt: skip
        if into != target:
            _convert_row(into, _addr(cols), target, kind)


@_kernel
def _decode_sum_encode(
    payload, rank_stride, ranks, payload_stride, bits, symmetric, group,
    out, out_stride, out_bits, out_symmetric, out_group, first, last, cols,
):  # fmt: skip
    scratch = np.empty(min(max(group, out_group), cols) + 64, np.uint8)
    sums = np.empty(cols, np.float32)
    for r in range(first, last):
        # Inside the loop: numba frees an array after the last line that names it.
        codes, into = _addr(scratch.ctypes.data), _addr(sums.ctypes.data)
        for rank in range(ranks):
            _decode_row(
                _addr(payload + rank * rank_stride + r * payload_stride), _addr(cols), bits, symmetric, _addr(group),
                rank > 0, into, 2, codes,
            )  # fmt: skip
        _encode_row(into, 2, _addr(cols), out_bits, out_symmetric, _addr(out_group), _addr(out + r * out_stride), codes)


@cache
def _pool(threads):
    return ThreadPoolExecutor(threads, thread_name_prefix="flashcomm-cpu")


# Below this many values a second thread costs more than it saves (measured 2026-11-20, 2 cores: 20 us to hand over).
_VALUES_PER_THREAD = 1 << 16


def _over_rows(run, rows, cols):
    """Call run(first, last) over all rows, on as many threads as torch is set to use."""
    threads = max(1, min(torch.get_num_threads(), rows, rows * cols // _VALUES_PER_THREAD))
    if threads == 1:
        run(0, rows)
        return
    edges = [rows * t // threads for t in range(threads + 1)]
    list(_pool(threads).map(run, edges[:-1], edges[1:]))


def encode(x, codec, out):
    """[rows, cols] bf16, fp16 or fp32 with unit stride in a row -> out[rows, payload_bytes(cols)] uint8."""
    rows, cols = x.shape
    fixed = (x.data_ptr(), x.stride(0) * x.element_size(), KINDS[x.dtype], out.data_ptr(), out.stride(0))
    form = (cols, codec.bits, codec.symmetric, codec.group)
    _over_rows(lambda first, last: _encode(*fixed, first, last, *form), rows, cols)


def decode_sum(payloads, codec, out):
    """payloads[ranks, rows, payload_bytes(cols)] -> out[rows, cols], summed in fp32 in rank order."""
    rows, cols = out.shape
    ranks = payloads.shape[0]
    fixed = (payloads.data_ptr(), payloads.stride(0), ranks, payloads.stride(1))
    target = (out.data_ptr(), out.stride(0) * out.element_size(), KINDS[out.dtype])
    form = (cols, codec.bits, codec.symmetric, codec.group)
    _over_rows(lambda first, last: _decode_sum(*fixed, *target, first, last, *form), rows, cols * ranks)


def decode_sum_encode(payloads, codec, out_codec, cols, out):
    """payloads[ranks, rows, bytes] in `codec` -> out[rows, bytes] in `out_codec`; the sum itself stays in fp32."""
    ranks, rows = payloads.shape[:2]
    fixed = (payloads.data_ptr(), payloads.stride(0), ranks, payloads.stride(1))
    form = (codec.bits, codec.symmetric, codec.group)
    target = (out.data_ptr(), out.stride(0), out_codec.bits, out_codec.symmetric, out_codec.group)
    _over_rows(lambda first, last: _decode_sum_encode(*fixed, *form, *target, first, last, cols), rows, cols * ranks)
