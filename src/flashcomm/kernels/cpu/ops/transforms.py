"""Walsh-Hadamard transforms and TACO's scale: `codecs.hadamard`."""

import numpy as np

from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import BF16, NAN, Op, f32, inline


@Op
def hadamard(row, blocks, size, stride, factor_bits, factors, ahead):
    """Multiply each of `blocks` runs of `size` fp32, a power of two, by a factor and transform it in place.

    If `factors` is not 0, the factor is multiplied by the run's own in factors[]. If `ahead` is not 0, memory at that
    address, two bytes per value, is prefetched meanwhile.
    """
    inner = min(size, 128)
    # Below sixteen values a vector holds several runs if they lie one behind the other.
    at_once = 1 if size >= 16 else 16 // size if stride == size and factors == 0 else 0
    block = 0
    while block < blocks:
        factor, at = simd.from_bits(factor_bits), row + block * stride * 4
        if factors:
            factor = simd.load1_fp32(factors + block * 4) * factor
        if at_once == 0 or block + at_once > blocks:
            for i in range(size):
                simd.store1_fp32(at + i * 4, simd.load1_fp32(at + i * 4) * factor)
            apart, block = 1, block + 1
            while apart < size:
                for start in range(0, size, 2 * apart):
                    for i in range(start, start + apart):
                        first, second = simd.load1_fp32(at + i * 4), simd.load1_fp32(at + (i + apart) * 4)
                        simd.store1_fp32(at + i * 4, first + second)
                        simd.store1_fp32(at + (i + apart) * 4, first - second)
                apart *= 2
            continue
        block += at_once
        for i in range(0, size, inner):
            part = at + i * 4
            if ahead:
                for line in range(part - row, part - row + inner * 4, 128):
                    simd.prefetch(ahead + line // 2)
            if inner == 128:
                simd.hadamard128(part, factor)
            elif inner == 64:
                simd.hadamard64(part, factor)
            elif inner == 32:
                simd.hadamard32(part, factor)
            elif inner == 16:
                simd.hadamard16(part, factor)
            elif inner == 8:
                simd.hadamard8(part, factor)
            elif inner == 4:
                simd.hadamard4(part, factor)
            elif inner == 2:
                simd.hadamard2(part, factor)
            else:
                simd.hadamard1(part, factor)
        apart = 128
        while apart < size:
            for start in range(0, size, 2 * apart):
                for i in range(start, start + apart, 16):
                    first, second = simd.load_fp32(at + i * 4), simd.load_fp32(at + (i + apart) * 4)
                    simd.store_fp32(at + i * 4, first + second)
                    simd.store_fp32(at + (i + apart) * 4, first - second)
            apart *= 2


@inline
def _shrink(least, most, group, count):
    """Candidates of `count` groups in fp32, four of each kind or sixteen, become those of `shrink_fp32`."""
    if group == 32:
        for j in range(0, count * 16, 64):
            simd.store_words(least + j, simd.words_key(simd.load_words(least + j)))
            simd.store_words(most + j, simd.words_key(simd.load_words(most + j)))
        return
    for j in range(0, count, 4):
        # Sixteen candidates of each of four groups become four: what is overwritten has been read.
        at = least + j * 64
        a = simd.lanes_fold16_min(simd.load_fp32(at), simd.load_fp32(at + 64))
        b = simd.lanes_fold16_min(simd.load_fp32(at + 128), simd.load_fp32(at + 192))
        simd.store_words(least + j * 16, simd.words_key(simd.as_words(simd.lanes_fold8_min(a, b))))
        at = most + j * 64
        a = simd.lanes_fold16_max(simd.load_fp32(at), simd.load_fp32(at + 64))
        b = simd.lanes_fold16_max(simd.load_fp32(at + 128), simd.load_fp32(at + 192))
        simd.store_words(most + j * 16, simd.words_key(simd.as_words(simd.lanes_fold8_max(a, b))))


@Op
def hadamard_ranges(src, kind, n, group, factor_bits, dst, least, most):
    """Multiply n bf16 or fp32 by a factor, transform each group and store it as fp32; find candidates as `shrink_fp32`.

    n is a multiple of 128, a group has 32, 64 or 128 values. A group that holds a NaN or an Inf keeps one among its
    candidates: the transform makes every value of it a NaN or an Inf.
    """
    factor = simd.from_bits(factor_bits)
    # Bytes of candidates of 128 values: see `simd`.
    width = 64 if group == 32 else 8192 // group
    if kind == BF16:
        for i in range(0, n, 128):
            at, low, high = src + i * 2, least + i // 128 * width, most + i // 128 * width
            for line in range(0, 256, 64):
                simd.prefetch(at + n * 2 + line)
            if group == 128:
                simd.hadamard128_ranges_bf16(at, factor, dst + i * 4, low, high)
            elif group == 64:
                simd.hadamard64_ranges_bf16(at, factor, dst + i * 4, low, high)
            else:
                simd.hadamard32_ranges_bf16(at, factor, dst + i * 4, low, high)
    else:
        for i in range(0, n, 128):
            at, low, high = src + i * 4, least + i // 128 * width, most + i // 128 * width
            if group == 128:
                simd.hadamard128_ranges_fp32(at, factor, dst + i * 4, low, high)
            elif group == 64:
                simd.hadamard64_ranges_fp32(at, factor, dst + i * 4, low, high)
            else:
                simd.hadamard32_ranges_fp32(at, factor, dst + i * 4, low, high)
    _shrink(least, most, group, n // group)


@Op
def hadamard_pairs(src, n, group, factor_bits, dst, least, most):
    """Do what `hadamard_ranges` does for bf16, and store the result as `PAIRS`.

    Three quarters of the next row are prefetched meanwhile, the last by `quantise_pairs`: in proportion to their time.
    """
    factor, width = simd.from_bits(factor_bits), 64 if group == 32 else 8192 // group
    for i in range(0, n, 128):
        at, low, high = src + i * 2, least + i // 128 * width, most + i // 128 * width
        for line in range(0, 192, 64):
            simd.prefetch(src + n * 2 + i // 128 * 192 + line)
        if group == 128:
            simd.hadamard128_pairs(at, factor, dst + i * 4, low, high)
        elif group == 64:
            simd.hadamard64_pairs(at, factor, dst + i * 4, low, high)
        else:
            simd.hadamard32_pairs(at, factor, dst + i * 4, low, high)
    _shrink(least, most, group, n // group)


@Op
def hadamard_to_bf16(row, n, group, dst):
    """Transform each group of a row of fp32 and write it as bf16, every NaN as the one quiet NaN.

    n is a multiple of 128, a group has 32, 64 or 128 values.
    """
    for i in range(0, n, 128):
        for line in range(i * 2, i * 2 + 256, 64):
            simd.prefetch(dst + n * 2 + line)
        if group == 128:
            bad = simd.hadamard128_back(row + i * 4, dst + i * 2)
        elif group == 64:
            bad = simd.hadamard64_back(row + i * 4, dst + i * 2)
        else:
            bad = simd.hadamard32_back(row + i * 4, dst + i * 2)
        if bad:
            # Rounding takes some NaN for numbers, so look at the fp32 again.
            for j in range(i, i + 128, group):
                if group == 128:
                    simd.hadamard128(row + j * 4, f32(1))
                elif group == 64:
                    simd.hadamard64(row + j * 4, f32(1))
                else:
                    simd.hadamard32(row + j * 4, f32(1))
            for j in range(i, i + 128):
                v = simd.load1_fp32(row + j * 4)
                if v != v:
                    simd.store_half(dst + j * 2, NAN >> 16)


@Op
def adapt(row, n, group, alpha):
    """TACO's alpha of each group: see `codecs.hadamard`."""
    for start in range(0, n, group):
        size, at = min(group, n - start), row + start * 4
        whole = size & ~15
        sums = simd.splat(f32(0))
        for i in range(0, whole, 16):
            v = simd.load_fp32(at + i * 4)
            sums = sums + v * v
        if whole < size:
            v = simd.load_fp32(at + whole * 4)
            beyond = simd.splat_words(size - whole - 1)
            inside = simd.words_where_less(beyond, simd.places(), simd.splat_words(0), simd.as_words(v * v))
            sums = sums + simd.as_lanes(inside)
        value = f32(448) / np.sqrt(simd.pairwise_sum(sums) / f32(size) + f32(1e-6))
        if value < f32(1e-3):
            value = f32(1e-3)
        if value > f32(1e3):
            value = f32(1e3)
        if value != value:
            value = simd.from_bits(NAN)
        simd.store1_fp32(alpha, value)
        alpha += 4


@Op
def invert(numbers, count):
    """Replace each fp32 by 1 over it."""
    one = simd.splat(f32(1))
    for i in range(0, count, 16):
        simd.store_fp32(numbers + i * 4, one / simd.load_fp32(numbers + i * 4))
