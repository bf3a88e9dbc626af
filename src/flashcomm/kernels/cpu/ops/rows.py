"""Rows in and out: widen, narrow, copy, add; and two ops that all formats need, `spread` and `forget`."""

from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import AHEAD, BF16, FP16, NAN, Op, clean, f32


@Op
def widen(src, kind, n, dst):
    """Widen n values of any kind to fp32; up to fifteen zeros follow them."""
    full = n & ~15
    if kind == BF16:
        for i in range(0, full, 16):
            simd.prefetch(src + i * 2 + AHEAD)
            simd.store_fp32(dst + i * 4, simd.load_bf16(src + i * 2))
    elif kind == FP16:
        for i in range(0, full, 16):
            simd.store_fp32(dst + i * 4, simd.load_fp16(src + i * 2))
    else:
        for i in range(0, full, 16):
            simd.store_fp32(dst + i * 4, simd.load_fp32(src + i * 4))
    if full < n:
        simd.store_fp32(dst + full * 4, simd.splat(f32(0)))
        for i in range(full, n):
            if kind == BF16:
                v = simd.load1_bf16(src + i * 2)
            elif kind == FP16:
                v = simd.load1_fp16(src + i * 2)
            else:
                v = simd.load1_fp32(src + i * 4)
            simd.store1_fp32(dst + i * 4, v)


@Op
def narrow(src, n, dst, kind, cleaning):
    """Round n fp32 half to even to any kind; every NaN becomes the one quiet NaN if `cleaning`."""
    full = n & ~31
    for i in range(0, full, 32):
        v, w = simd.load_fp32(src + i * 4), simd.load_fp32(src + i * 4 + 64)
        if cleaning:
            v, w = clean(v), clean(w)
        if kind == BF16:
            simd.store_bf16_twice(dst + i * 2, v, w)
        elif kind == FP16:
            simd.store_fp16(dst + i * 2, v)
            simd.store_fp16(dst + i * 2 + 32, w)
        else:
            simd.store_fp32(dst + i * 4, v)
            simd.store_fp32(dst + i * 4 + 64, w)
    for i in range(full, n):
        x = simd.load1_fp32(src + i * 4)
        if x != x:
            x = simd.from_bits(NAN)
        if kind == BF16:
            simd.store1_bf16(dst + i * 2, x)
        elif kind == FP16:
            simd.store1_fp16(dst + i * 2, x)
        else:
            simd.store1_fp32(dst + i * 4, x)


@Op
def accumulate(src, n, add, dst):
    """Copy n fp32 to `dst`, or add them to the fp32 there if `add` is not 0."""
    if add:
        for i in range(0, n, 16):
            simd.store_fp32(dst + i * 4, simd.load_fp32(dst + i * 4) + simd.load_fp32(src + i * 4))
    else:
        for i in range(0, n, 16):
            simd.store_fp32(dst + i * 4, simd.load_fp32(src + i * 4))


@Op
def add_wide(src, kind, n, add, dst):
    """Widen n values of any kind to fp32, and add them to the fp32 at `add` unless `add` is 0."""
    full = n & ~15
    for i in range(0, full, 16):
        if kind == BF16:
            v = simd.load_bf16(src + i * 2)
        elif kind == FP16:
            v = simd.load_fp16(src + i * 2)
        else:
            v = simd.load_fp32(src + i * 4)
        if add:
            v = simd.load_fp32(add + i * 4) + v
        simd.store_fp32(dst + i * 4, v)
    for i in range(full, n):
        if kind == BF16:
            x = simd.load1_bf16(src + i * 2)
        elif kind == FP16:
            x = simd.load1_fp16(src + i * 2)
        else:
            x = simd.load1_fp32(src + i * 4)
        if add:
            x = simd.load1_fp32(add + i * 4) + x
        simd.store1_fp32(dst + i * 4, x)


@Op
def add_bf16(src, n, add, dst):
    """The fp32 at `add` plus the bf16 at `src`, as bf16; n is a multiple of 32."""
    for i in range(0, n, 32):
        simd.prefetch(src + AHEAD + i * 2)
        first = simd.load_fp32(add + i * 4) + simd.load_bf16(src + i * 2)
        second = simd.load_fp32(add + i * 4 + 64) + simd.load_bf16(src + i * 2 + 32)
        simd.store_bf16_twice(dst + i * 2, clean(first), clean(second))


@Op
def add_two(first, second, kind, n, dst):
    """Add two rows of n bf16 or fp32; n is a multiple of 32."""
    for i in range(0, n, 32):
        if kind == BF16:
            simd.prefetch(first + AHEAD + i * 2)
            simd.prefetch(second + AHEAD + i * 2)
            # Even and odd values apart: shifting is cheaper than widening.
            a, b = simd.load_words(first + i * 2), simd.load_words(second + i * 2)
            even = simd.as_lanes(a << 16) + simd.as_lanes(b << 16)
            odd = simd.as_lanes(a & 0xFFFF0000) + simd.as_lanes(b & 0xFFFF0000)
            simd.store_bf16_pairs(dst + i * 2, clean(even), clean(odd))
        else:
            v = simd.load_fp32(first + i * 4) + simd.load_fp32(second + i * 4)
            w = simd.load_fp32(first + i * 4 + 64) + simd.load_fp32(second + i * 4 + 64)
            simd.store_fp32(dst + i * 4, clean(v))
            simd.store_fp32(dst + i * 4 + 64, clean(w))


@Op
def clean_bf16(src, n, dst):
    """Copy n bf16, and make every NaN the one quiet NaN; n is a multiple of 32."""
    infinity, nan = simd.splat_halves(0x7F80), simd.splat_halves(NAN >> 16)
    for i in range(0, n, 32):
        simd.prefetch(src + AHEAD + i * 2)
        v = simd.load_halves(src + i * 2)
        simd.store_halves(dst + i * 2, simd.halves_where_less(infinity, simd.halves_magnitude(v), nan, v))


@Op
def copy_bytes(src, n, dst):
    """Copy n bytes."""
    full = n & ~63
    for i in range(0, full, 64):
        simd.store_words(dst + i, simd.load_words(src + i))
    for i in range(full, n):
        simd.store_byte(dst + i, simd.load_byte(src + i))


@Op
def spread(per_group, times, n, out):
    """Repeat each fp32 `times` times, n values in all."""
    count = (n + times - 1) // times
    if times == 2:
        for j in range(0, count, 8):
            simd.store_fp32(out + j * 8, simd.repeat2(per_group + j * 4))
        return
    if times == 4:
        for j in range(0, count, 4):
            simd.store_fp32(out + j * 16, simd.repeat4(per_group + j * 4))
        return
    if times == 8:
        for j in range(0, count, 2):
            simd.store_fp32(out + j * 32, simd.repeat8(per_group + j * 4))
        return
    for j in range(count):
        v = simd.splat(simd.load1_fp32(per_group + j * 4))
        # A vector that reaches too far is overwritten by the next.
        for i in range(j * times, simd.long_min(j * times + times, n), 16):
            simd.store_fp32(out + i * 4, v)


@Op
def forget(flag, inverse, n, group, codes):
    """Set the codes of NaN groups to 0."""
    if simd.load_word(flag) == 0:
        return
    for start in range(0, n, group):
        v = simd.load1_fp32(inverse)
        inverse += 4
        if v != v:
            for i in range(start, simd.long_min(start + group, n)):
                simd.store_byte(codes + i, 0)


@Op
def put_byte(value, dst):
    """Store one byte."""
    simd.store_byte(dst, value)
