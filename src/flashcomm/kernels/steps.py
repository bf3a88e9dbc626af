"""What the CPU kernels do to one row, step by step, sixteen lanes at a time; `cpu` strings steps into programs.

    affine   ranges | affine_scales | quantise | pack          unpack | affine_meta | dequantise
    block    ranges | block_scales | round_floats | pack       unpack | block_meta | read_floats

Every step works on arrays that stay in the cache: a row is some thousand values. A step is one function for all formats
of its kind, so a new format compiles nothing, and a step is compiled when a program first needs it, in about 0.1 s.

Hazard: a step gets addresses and counts, all of them int64, and checks nothing. It reads and writes whole vectors, up
to 512 bytes beyond the end of what it is given, which each of `cpu`'s scratch arrays has room for; a tensor's own row
is used only where that cannot happen. What a payload says is believed, except for places in memory.

Scales and zero points come as one fp32 per group, and `spread` repeats them so that a loop needs no groups: one per 32
values of bf16 or per 16 of fp32 where groups are multiples of that, else one per 2 or per value. That is the `unit`.

Names: src, dst and other arrays are addresses; n values of a row in groups of `group`, `count` groups in all; fp32
operands arrive as their bits, `..._bits`.

Source: our own. Bit planes: FlashCommunication V2 (arXiv 2508.03760), bit splitting.
"""

import inspect
import threading

import numpy as np
from numba import cfunc, njit, types

from flashcomm.kernels import simd

BF16, FP16, FP32 = 0, 1, 2

_f32 = np.float32

# Adding 1.5 * 2^23 to a small non-negative fp32 rounds it half to even and leaves the integer in its lowest bits.
_ROUND = _f32(12582912.0)
_TINY = _f32(2.0**-126)
_MAGNITUDE, _NAN = 0x7FFFFFFF, 0x7FC00000
# 2.0**127: a block whose element times scale might not be finite.
_TOO_LARGE = 0x7F000000
# 1.25 * 2.0**126.
_SPIKE_TOO_LARGE = 0x7EA00000
# How far ahead the input is fetched. The hardware stops at 4 KiB pages, and waiting there costs a third of the time;
# anything from 1 to 4 KiB measured the same.
_AHEAD = 2048

_compiling = threading.Lock()
_inline = njit(forceinline=True, error_model="numpy", no_cpython_wrapper=True)


class Step:
    """A function of int64 operands that becomes machine code when its address is first asked for."""

    def __init__(self, function):
        self._function = function
        self.operands = len(inspect.signature(function).parameters)
        self._compiled = None

    @property
    def address(self) -> int:
        """Where the machine code is."""
        with _compiling:
            if self._compiled is None:
                self._compiled = compiled(
                    lambda cache: cfunc(self._signature(), error_model="numpy", cache=cache)(self._function)
                )
        return self._compiled.address

    def _signature(self):
        return types.void(*[types.int64] * self.operands)


def compiled(compile):
    """`compile(cache)` with the result kept on disk, or in this process where no folder can be written to."""
    try:
        return compile(True)
    except RuntimeError:
        return compile(False)


@Step
def widen(src, kind, n, dst):
    """N values of any kind as fp32; up to fifteen zeros behind them."""
    full = n & ~15
    if kind == BF16:
        for i in range(0, full, 16):
            simd.prefetch(src + i * 2 + _AHEAD)
            simd.store_fp32(dst + i * 4, simd.load_bf16(src + i * 2))
    elif kind == FP16:
        for i in range(0, full, 16):
            simd.store_fp32(dst + i * 4, simd.load_fp16(src + i * 2))
    else:
        for i in range(0, full, 16):
            simd.store_fp32(dst + i * 4, simd.load_fp32(src + i * 4))
    if full < n:
        simd.store_fp32(dst + full * 4, simd.splat(_f32(0)))
        for i in range(full, n):
            if kind == BF16:
                v = simd.load1_bf16(src + i * 2)
            elif kind == FP16:
                v = simd.load1_fp16(src + i * 2)
            else:
                v = simd.load1_fp32(src + i * 4)
            simd.store1_fp32(dst + i * 4, v)


@_inline
def _clean(v, clean):
    """`v` with every NaN the one quiet NaN, if `clean`."""
    bits = simd.as_words(v)
    if clean:
        bits = simd.words_where_less(simd.splat_words(0x7F800000), bits & _MAGNITUDE, simd.splat_words(_NAN), bits)
    return simd.as_lanes(bits)


@Step
def narrow(src, n, dst, kind, clean):
    """Values of fp32 as any kind, each rounded half to even; every NaN the one quiet NaN if `clean`."""
    full = n & ~31
    for i in range(0, full, 32):
        v, w = _clean(simd.load_fp32(src + i * 4), clean), _clean(simd.load_fp32(src + i * 4 + 64), clean)
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
            x = simd.from_bits(_NAN)
        if kind == BF16:
            simd.store1_bf16(dst + i * 2, x)
        elif kind == FP16:
            simd.store1_fp16(dst + i * 2, x)
        else:
            simd.store1_fp32(dst + i * 4, x)


@Step
def accumulate(src, n, add, dst):
    """N fp32 values to another place, or added to what is there if `add`."""
    if add:
        for i in range(0, n, 16):
            simd.store_fp32(dst + i * 4, simd.load_fp32(dst + i * 4) + simd.load_fp32(src + i * 4))
    else:
        for i in range(0, n, 16):
            simd.store_fp32(dst + i * 4, simd.load_fp32(src + i * 4))


@Step
def shrink_bf16(src, n, group, least, most):
    """Eight candidates for the smallest and the largest of each group of bf16: a multiple of 32, or 16, or 8 itself.

    They are integer keys, which order like the numbers and have no NaN that a comparison could lose: it lies beyond the
    infinities. Four groups go into one vector; room for three more than there are is needed.
    """
    count = n // group
    if group == 8:
        for j in range(0, n, 32):
            v = simd.halves_key(simd.load_halves(src + j * 2))
            simd.store_halves(least + j * 2, v)
            simd.store_halves(most + j * 2, v)
        return
    if group == 16:
        for j in range(0, n, 64):
            a = simd.halves_key(simd.load_halves(src + j * 2))
            b = simd.halves_key(simd.load_halves(src + j * 2 + (64 if j + 32 < n else 0)))
            simd.store_halves(least + j, simd.fold16_min(a, b))
            simd.store_halves(most + j, simd.fold16_max(a, b))
        return
    for j in range(0, count, 4):
        at0 = src + j * group * 2
        # Fewer than four left: take the last one several times.
        at1 = at0 + (group * 2 if j + 1 < count else 0)
        at2 = at1 + (group * 2 if j + 2 < count else 0)
        at3 = at2 + (group * 2 if j + 3 < count else 0)
        least0 = most0 = simd.halves_key(simd.load_halves(at0))
        least1 = most1 = simd.halves_key(simd.load_halves(at1))
        least2 = most2 = simd.halves_key(simd.load_halves(at2))
        least3 = most3 = simd.halves_key(simd.load_halves(at3))
        for i in range(64, group * 2, 64):
            v0, v1 = simd.halves_key(simd.load_halves(at0 + i)), simd.halves_key(simd.load_halves(at1 + i))
            v2, v3 = simd.halves_key(simd.load_halves(at2 + i)), simd.halves_key(simd.load_halves(at3 + i))
            least0, least1 = simd.half_min(v0, least0), simd.half_min(v1, least1)
            least2, least3 = simd.half_min(v2, least2), simd.half_min(v3, least3)
            most0, most1 = simd.half_max(v0, most0), simd.half_max(v1, most1)
            most2, most3 = simd.half_max(v2, most2), simd.half_max(v3, most3)
        least0 = simd.fold16_min(simd.fold32_min(least0, least1), simd.fold32_min(least2, least3))
        most0 = simd.fold16_max(simd.fold32_max(most0, most1), simd.fold32_max(most2, most3))
        simd.store_halves(least + j * 16, least0)
        simd.store_halves(most + j * 16, most0)


@Step
def shrink_magnitudes(src, n, group, most):
    """Like `shrink_bf16`, for the largest magnitude alone."""
    count = n // group
    if group == 8:
        for j in range(0, n, 32):
            simd.store_halves(most + j * 2, simd.halves_magnitude(simd.load_halves(src + j * 2)))
        return
    if group == 16:
        for j in range(0, n, 64):
            a = simd.halves_magnitude(simd.load_halves(src + j * 2))
            b = simd.halves_magnitude(simd.load_halves(src + j * 2 + (64 if j + 32 < n else 0)))
            simd.store_halves(most + j, simd.fold16_max(a, b))
        return
    for j in range(0, count, 4):
        at0 = src + j * group * 2
        at1 = at0 + (group * 2 if j + 1 < count else 0)
        at2 = at1 + (group * 2 if j + 2 < count else 0)
        at3 = at2 + (group * 2 if j + 3 < count else 0)
        most0, most1 = simd.halves_magnitude(simd.load_halves(at0)), simd.halves_magnitude(simd.load_halves(at1))
        most2, most3 = simd.halves_magnitude(simd.load_halves(at2)), simd.halves_magnitude(simd.load_halves(at3))
        for i in range(64, group * 2, 64):
            most0 = simd.half_max(simd.halves_magnitude(simd.load_halves(at0 + i)), most0)
            most1 = simd.half_max(simd.halves_magnitude(simd.load_halves(at1 + i)), most1)
            most2 = simd.half_max(simd.halves_magnitude(simd.load_halves(at2 + i)), most2)
            most3 = simd.half_max(simd.halves_magnitude(simd.load_halves(at3 + i)), most3)
        simd.store_halves(most + j * 16, simd.fold16_max(simd.fold32_max(most0, most1), simd.fold32_max(most2, most3)))


@Step
def magnitudes_bf16(most, count, amax):
    """What `shrink_magnitudes` left -> the bits of the largest magnitude of each group as fp32."""
    for j in range(0, count, 32):
        at = most + j * 16
        a = simd.fold8_max(simd.load_halves(at), simd.load_halves(at + 64))
        b = simd.fold8_max(simd.load_halves(at + 128), simd.load_halves(at + 192))
        c = simd.fold8_max(simd.load_halves(at + 256), simd.load_halves(at + 320))
        d = simd.fold8_max(simd.load_halves(at + 384), simd.load_halves(at + 448))
        simd.store_halves_wide(amax + j * 4, simd.fold2_max(simd.fold4_max(a, b), simd.fold4_max(c, d)))
    simd.store_words(amax + count * 4, simd.splat_words(0))


@Step
def magnitudes_fp32(src, n, group, amax):
    """The bits of the largest magnitude of each group of fp32, of any size; the last group may be short."""
    full = n // group
    if group % 16 == 0:
        for j in range(full):
            at = src + j * group * 4
            most = simd.load_words(at) & _MAGNITUDE
            for i in range(64, group * 4, 64):
                most = simd.word_max(simd.load_words(at + i) & _MAGNITUDE, most)
            simd.store_word(amax + j * 4, simd.words_max(most))
        done = full
    else:
        done = 0
    for start in range(done * group, n, group):
        largest = 0
        for i in range(start, min(start + group, n)):
            largest = max(largest, simd.load_word(src + i * 4) & _MAGNITUDE)
        simd.store_word(amax + done * 4, largest)
        done += 1
    simd.store_words(amax + done * 4, simd.splat_words(0))


@Step
def ranges_bf16(least, most, count, keys, low, high):
    """What `shrink_bf16` left -> the smallest and the largest of each group: fp32, or `keys` as they are."""
    for j in range(0, count, 32):
        at = least + j * 16
        a = simd.fold8_min(simd.load_halves(at), simd.load_halves(at + 64))
        b = simd.fold8_min(simd.load_halves(at + 128), simd.load_halves(at + 192))
        c = simd.fold8_min(simd.load_halves(at + 256), simd.load_halves(at + 320))
        d = simd.fold8_min(simd.load_halves(at + 384), simd.load_halves(at + 448))
        least_of_all = simd.fold2_min(simd.fold4_min(a, b), simd.fold4_min(c, d))
        simd.store_halves_wide(low + j * 4, least_of_all if keys else simd.halves_key(least_of_all))
        at = most + j * 16
        a = simd.fold8_max(simd.load_halves(at), simd.load_halves(at + 64))
        b = simd.fold8_max(simd.load_halves(at + 128), simd.load_halves(at + 192))
        c = simd.fold8_max(simd.load_halves(at + 256), simd.load_halves(at + 320))
        d = simd.fold8_max(simd.load_halves(at + 384), simd.load_halves(at + 448))
        most_of_all = simd.fold2_max(simd.fold4_max(a, b), simd.fold4_max(c, d))
        simd.store_halves_wide(high + j * 4, most_of_all if keys else simd.halves_key(most_of_all))
    # Scales are made sixteen at a time; the last of them may belong to no group.
    simd.store_words(low + count * 4, simd.splat_words(0))
    simd.store_words(high + count * 4, simd.splat_words(0))


@Step
def shrink_fp32(src, n, group, least, most):
    """Like `shrink_bf16`, of fp32 in groups that are a multiple of 16: four candidates of each."""
    count = n // group
    for j in range(0, count, 4):
        at0 = src + j * group * 4
        at1 = at0 + (group * 4 if j + 1 < count else 0)
        at2 = at1 + (group * 4 if j + 2 < count else 0)
        at3 = at2 + (group * 4 if j + 3 < count else 0)
        least0 = most0 = simd.words_key(simd.load_words(at0))
        least1 = most1 = simd.words_key(simd.load_words(at1))
        least2 = most2 = simd.words_key(simd.load_words(at2))
        least3 = most3 = simd.words_key(simd.load_words(at3))
        for i in range(64, group * 4, 64):
            v0, v1 = simd.words_key(simd.load_words(at0 + i)), simd.words_key(simd.load_words(at1 + i))
            v2, v3 = simd.words_key(simd.load_words(at2 + i)), simd.words_key(simd.load_words(at3 + i))
            least0, least1 = simd.word_min(v0, least0), simd.word_min(v1, least1)
            least2, least3 = simd.word_min(v2, least2), simd.word_min(v3, least3)
            most0, most1 = simd.word_max(v0, most0), simd.word_max(v1, most1)
            most2, most3 = simd.word_max(v2, most2), simd.word_max(v3, most3)
        least0, least2 = simd.words_fold16_min(least0, least1), simd.words_fold16_min(least2, least3)
        most0, most2 = simd.words_fold16_max(most0, most1), simd.words_fold16_max(most2, most3)
        simd.store_words(least + j * 16, simd.words_fold8_min(least0, least2))
        simd.store_words(most + j * 16, simd.words_fold8_max(most0, most2))


@Step
def ranges_fp32(least, most, src, n, group, low, high):
    """What `shrink_fp32` left, and groups that it did not see: the short last one, or all of an unusual size."""
    done = n // group if group % 16 == 0 else 0
    for j in range(0, done, 16):
        at = least + j * 16
        a = simd.words_fold4_min(simd.load_words(at), simd.load_words(at + 64))
        b = simd.words_fold4_min(simd.load_words(at + 128), simd.load_words(at + 192))
        simd.store_words(low + j * 4, simd.words_key(simd.words_fold2_min(a, b)))
        at = most + j * 16
        a = simd.words_fold4_max(simd.load_words(at), simd.load_words(at + 64))
        b = simd.words_fold4_max(simd.load_words(at + 128), simd.load_words(at + 192))
        simd.store_words(high + j * 4, simd.words_key(simd.words_fold2_max(a, b)))
    for start in range(done * group, n, group):
        lowest, highest = 0x7FFFFFFF, -0x80000000
        for i in range(start, min(start + group, n)):
            pattern = simd.load_word(src + i * 4)
            key = pattern ^ (pattern >> 63 & _MAGNITUDE)
            lowest, highest = min(lowest, key), max(highest, key)
        simd.store_word(low + done * 4, lowest ^ (lowest >> 63 & _MAGNITUDE))
        simd.store_word(high + done * 4, highest ^ (highest >> 63 & _MAGNITUDE))
        done += 1
    simd.store_words(low + done * 4, simd.splat_words(0))
    simd.store_words(high + done * 4, simd.splat_words(0))


@Step
def copy_bytes(src, n, dst):
    """N bytes from here to there."""
    full = n & ~63
    for i in range(0, full, 64):
        simd.store_words(dst + i, simd.load_words(src + i))
    for i in range(full, n):
        simd.store_byte(dst + i, simd.load_byte(src + i))


@Step
def affine_scales(low, high, count, symmetric, last_bits, zero, inverse, flag, meta):
    """Ranges -> zero points, reciprocals of the scales, and the bytes of both.

    The reciprocal is NaN for a group that decodes to NaN; `flag` is not 0 if there is one.
    """
    last = simd.from_bits(last_bits)
    nothing, one, tiny = simd.splat(_f32(0)), simd.splat(_f32(1)), simd.splat(_TINY)
    none, nan = simd.splat_words(0), simd.splat_words(_NAN)
    steps = simd.splat(last * _f32(0.5)) if symmetric else simd.splat(last)
    all_bad = none
    for j in range(0, count, 16):
        least = simd.load_fp32(low + j * 4)
        most = simd.load_fp32(high + j * 4)
        if symmetric:
            zeros = nothing
            span = simd.lane_max(nothing - least, most)
        else:
            # Down to bf16; + 0 turns -0 into +0, so that the order of equal values leaves no trace in the bytes.
            up = simd.where_less_words(least, nothing, simd.splat_words(0xFFFF), none)
            zeros = simd.as_lanes((simd.as_words(least) + up) & 0xFFFF0000) + nothing
            span = most - zeros
        scale_bits = (simd.as_words(simd.lane_max(span / steps, tiny)) + 0xFFFF) & 0xFFFF0000
        scale_bits = simd.where_less_words(nothing, span, scale_bits, none)
        scale = simd.as_lanes(scale_bits)
        if symmetric:
            zeros = (nothing - steps) * scale
        top = scale * last
        # v * 0 is 0 for a finite v alone.
        wrong = least * nothing + most * nothing + top * nothing + (top + zeros) * nothing + zeros * nothing
        bad = simd.words_where_equal(simd.as_words(wrong) & _MAGNITUDE, none, none, nan)
        all_bad = all_bad | bad
        recip = simd.words_where_equal(scale_bits, none, none, simd.as_words(one / scale))
        simd.store_words(inverse + j * 4, simd.words_where_equal(bad, nan, nan, recip))
        scale_bits = simd.words_where_equal(bad, nan, nan, scale_bits)
        zero_bits = simd.words_where_equal(bad, nan, nan, simd.as_words(zeros))
        simd.store_words(zero + j * 4, zero_bits)
        if symmetric:
            simd.store_words_u16(meta + j * 2, scale_bits >> 16)
        else:
            simd.store_words(meta + j * 4, scale_bits >> 16 | zero_bits & 0xFFFF0000)
    simd.store_word(flag, simd.words_max(all_bad))


@Step
def affine_meta(meta, count, symmetric, last_bits, zero, scale):
    """The bytes of `affine_scales` -> scales and zero points."""
    minus_half = simd.splat(simd.from_bits(last_bits) * _f32(-0.5))
    for j in range(0, count, 16):
        if symmetric:
            scales = simd.as_lanes(simd.load_words_u16(meta + j * 2) << 16)
            zeros = scales * minus_half
        else:
            both = simd.load_words(meta + j * 4)
            scales, zeros = simd.as_lanes(both << 16), simd.as_lanes(both & 0xFFFF0000)
        simd.store_fp32(scale + j * 4, scales)
        simd.store_fp32(zero + j * 4, zeros)


@Step
def spread(per_group, times, n, out):
    """Each fp32 so many times, until there are n."""
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
        # What goes too far is overwritten by the next.
        for i in range(j * times, min(j * times + times, n), 16):
            simd.store_fp32(out + i * 4, v)


@_inline
def _quantise(x, zeros, inverses, highest, limited):
    """One code per lane, in the lowest byte; the next is 0."""
    v = (x - zeros) * inverses + simd.splat(_ROUND)
    if limited:
        v = simd.lane_max(simd.lane_min(v, highest), simd.splat(_ROUND))
    return simd.as_words(v)


@Step
def quantise(src, kind, n, unit, zero, inverse, limit_bits, codes):
    """round((x - zero) * inverse), one byte each, kept within 0 and the limit unless that is 0."""
    highest, limited = simd.splat(_ROUND + simd.from_bits(limit_bits)), limit_bits != 0
    if kind == BF16:
        for i in range(0, n, 32):
            simd.prefetch(src + n * 2 + i * 2)
            if unit == 32:
                zeros = simd.splat(simd.load1_fp32(zero + i // 8))
                inverses = simd.splat(simd.load1_fp32(inverse + i // 8))
            else:
                zeros, inverses = simd.load_fp32(zero + i * 2), simd.load_fp32(inverse + i * 2)
            # Two bf16 share a word, and so do their codes.
            pair = simd.load_words(src + i * 2)
            even = _quantise(simd.as_lanes(pair << 16), zeros, inverses, highest, limited)
            odd = _quantise(simd.as_lanes(pair & 0xFFFF0000), zeros, inverses, highest, limited)
            simd.store_words_u16(codes + i, even | odd << 8)
        return
    for i in range(0, n, 16):
        if unit == 16:
            zeros = simd.splat(simd.load1_fp32(zero + i // 4))
            inverses = simd.splat(simd.load1_fp32(inverse + i // 4))
        else:
            zeros, inverses = simd.load_fp32(zero + i * 4), simd.load_fp32(inverse + i * 4)
        simd.store_words_u8(codes + i, _quantise(simd.load_fp32(src + i * 4), zeros, inverses, highest, limited))


@Step
def forget(flag, inverse, n, group, codes):
    """Codes of NaN groups become 0."""
    if simd.load_word(flag) == 0:
        return
    for start in range(0, n, group):
        v = simd.load1_fp32(inverse)
        inverse += 4
        if v != v:
            for i in range(start, min(start + group, n)):
                simd.store_byte(codes + i, 0)


@Step
def pack(codes, n, bits, dst):
    """N codes of one byte each, n a multiple of 128 -> bit planes."""
    for i in range(0, n, 128):
        shift = 0
        if bits & 4:
            simd.pack4(codes + i, shift, dst)
            dst += 64
            shift = 4
        if bits & 2:
            simd.pack2(codes + i, shift, dst)
            dst += 32
            shift += 2
        if bits & 1:
            simd.pack1(codes + i, shift, dst)
            dst += 16


@Step
def pack_rest(codes, n, width, shift, dst):
    """One plane of n < 128 codes."""
    m = (n * width + 7) >> 3
    for i in range(m):
        byte = 0
        for t in range(8 // width):
            j = i + m * t
            if j < n:
                byte |= (simd.load_byte(codes + j) >> shift & (1 << width) - 1) << t * width
        simd.store_byte(dst + i, byte)


@Step
def unpack(src, n, bits, codes):
    """Inverse of `pack`."""
    for i in range(0, n, 128):
        simd.prefetch(src + _AHEAD)
        shift = 0
        if bits & 4:
            simd.unpack4_first(src, shift, codes + i)
            src += 64
            shift = 4
        if bits & 2:
            if shift:
                simd.unpack2_more(src, shift, codes + i)
            else:
                simd.unpack2_first(src, shift, codes + i)
            src += 32
            shift += 2
        if bits & 1:
            if shift:
                simd.unpack1_more(src, shift, codes + i)
            else:
                simd.unpack1_first(src, shift, codes + i)
            src += 16


@Step
def unpack_rest(src, n, width, shift, codes):
    """Inverse of `pack_rest`; planes from the lowest bits on."""
    m = (n * width + 7) >> 3
    for i in range(m):
        byte = simd.load_byte(src + i)
        for t in range(8 // width):
            j = i + m * t
            if j < n:
                old = simd.load_byte(codes + j) if shift else 0
                simd.store_byte(codes + j, old | (byte >> t * width & (1 << width) - 1) << shift)


@Step
def dequantise(codes, n, unit, scale, zero, add, dst, kind):
    """Code * scale + zero as bf16, or as fp32, added to what is there if `add`."""
    if kind == BF16:
        for i in range(0, n, 32):
            simd.prefetch(codes + n + i)
            if unit == 32:
                scales = simd.splat(simd.load1_fp32(scale + i // 8))
                zeros = simd.splat(simd.load1_fp32(zero + i // 8))
            else:
                scales, zeros = simd.load_fp32(scale + i * 2), simd.load_fp32(zero + i * 2)
            pair = simd.load_words_u16(codes + i)
            even = simd.to_lanes(pair & 255) * scales + zeros
            odd = simd.to_lanes(pair >> 8) * scales + zeros
            simd.store_bf16_pairs(dst + i * 2, even, odd)
        return
    for i in range(0, n, 16):
        if unit == 16:
            scales, zeros = simd.splat(simd.load1_fp32(scale + i // 4)), simd.splat(simd.load1_fp32(zero + i // 4))
        else:
            scales, zeros = simd.load_fp32(scale + i * 4), simd.load_fp32(zero + i * 4)
        v = simd.load_u8(codes + i) * scales + zeros
        if add:
            v = simd.load_fp32(dst + i * 4) + v
        simd.store_fp32(dst + i * 4, v)


@Step
def scales_e8m0(amax, count, limit_bits, inverse, flag, meta):
    """Largest magnitudes -> reciprocals of the scales and their bytes, as `affine_scales`."""
    none, nan = simd.splat_words(0), simd.splat_words(_NAN)
    offset = 0x7FFFFF + (127 << 23) - limit_bits
    all_bad = none
    for j in range(0, count, 16):
        largest = simd.load_words(amax + j * 4)
        bad = simd.words_where_less(largest, simd.splat_words(_TOO_LARGE), none, nan)
        all_bad = all_bad | bad
        code = simd.word_max(simd.word_max(largest + offset, none) >> 23, simd.splat_words(1))
        recip = (simd.splat_words(254) - code) << 23
        simd.store_words(inverse + j * 4, simd.words_where_equal(bad, nan, nan, recip))
        simd.store_words_u8(meta + j, simd.words_where_equal(bad, nan, simd.splat_words(255), code))
    simd.store_word(flag, simd.words_max(all_bad))


@Step
def scales_e5m0(amax, count, limit_bits, inverse, flag, codes, row):
    """Like `scales_e8m0`: five-bit codes, a byte each, and the byte of the row."""
    none, nan = simd.splat_words(0), simd.splat_words(_NAN)
    offset = 0x7FFFFF + (127 << 23) - limit_bits
    all_bad, tops = none, simd.splat_words(1)
    for j in range(0, count, 16):
        largest = simd.load_words(amax + j * 4)
        bad = simd.words_where_less(largest, simd.splat_words(_TOO_LARGE), none, nan)
        code = simd.word_max(simd.word_max(largest + offset, none) >> 23, simd.splat_words(1))
        # 0 marks a NaN group until the row's largest is known.
        code = simd.words_where_equal(bad, nan, none, code)
        simd.store_words(inverse + j * 4, code)
        all_bad = all_bad | bad
        tops = simd.word_max(tops, code)
    top = simd.words_max(tops)
    simd.store_byte(row, top)
    tops = simd.splat_words(top)
    for j in range(0, count, 16):
        code = simd.load_words(inverse + j * 4)
        below = simd.word_min(tops - code, simd.splat_words(30))
        simd.store_words_u8(codes + j, simd.words_where_equal(code, none, simd.splat_words(31), below))
        recip = (simd.splat_words(254) - simd.word_max(tops - below, simd.splat_words(1))) << 23
        simd.store_words(inverse + j * 4, simd.words_where_equal(code, none, nan, recip))
    simd.store_word(flag, simd.words_max(all_bad))


@Step
def scales_fp32(amax, count, limit_bits, inverse, flag, meta):
    """Like `scales_e8m0` with fp32 scales."""
    none, nan = simd.splat_words(0), simd.splat_words(_NAN)
    limits, tiny, one = simd.splat(simd.from_bits(limit_bits)), simd.splat(_TINY), simd.splat(_f32(1))
    all_bad = none
    for j in range(0, count, 16):
        largest = simd.load_words(amax + j * 4)
        bad = simd.words_where_less(largest, simd.splat_words(_TOO_LARGE), none, nan)
        all_bad = all_bad | bad
        scale = simd.lane_max(simd.as_lanes(largest) / limits, tiny)
        simd.store_words(inverse + j * 4, simd.words_where_equal(bad, nan, nan, simd.as_words(one / scale)))
        simd.store_words(meta + j * 4, simd.words_where_equal(bad, nan, nan, simd.as_words(scale)))
    simd.store_word(flag, simd.words_max(all_bad))


@Step
def scales_e4m3(amax, count, limit_bits, inverse, flag, meta, row):
    """Like `scales_e8m0` with one FP8 byte per group and an fp32 per row."""
    none, nan = simd.splat_words(0), simd.splat_words(_NAN)
    limit = simd.from_bits(limit_bits)
    limits, one = simd.splat(limit), simd.splat(_f32(1))
    all_bad = tops = none
    for j in range(0, count, 16):
        largest = simd.load_words(amax + j * 4)
        bad = simd.words_where_less(largest, simd.splat_words(_TOO_LARGE), none, nan)
        largest = simd.words_where_equal(bad, nan, simd.splat_words(-1), largest)
        simd.store_words(inverse + j * 4, largest)
        all_bad = all_bad | bad
        tops = simd.word_max(tops, largest)
    # The smallest E4M3 is 2**-9, and its product with the row's scale must not fall below 2**-126.
    row_scale = max(simd.from_bits(simd.words_max(tops)) / (limit * _f32(448)), _f32(2.0**-117))
    simd.store_word(row, simd.bits_of(row_scale))
    rows, smallest = simd.splat(row_scale), simd.splat(_f32(2.0**-6))
    for j in range(0, count, 16):
        largest = simd.load_words(inverse + j * 4)
        ratio = simd.as_lanes(largest) / limits / rows
        # Up to three bits behind the leading one; below 2**-6 up to a multiple of 2**-9.
        normal = ((simd.as_words(ratio) + 0xFFFFF) >> 20) - (120 << 3)
        scaled = ratio * _f32(512)
        floor = simd.to_words(scaled)
        tiny = floor + simd.where_less_words(simd.to_lanes(floor), scaled, simd.splat_words(1), none)
        code = simd.where_less_words(ratio, smallest, tiny, normal)
        code = simd.word_max(simd.word_min(code, simd.splat_words(126)), simd.splat_words(1))
        simd.store_words_u8(meta + j, simd.words_where_less(largest, none, simd.splat_words(127), code))
        value = simd.as_lanes((code << 20) + (120 << 23))
        recip = one / (simd.lane_min(value, (value + value) - smallest) * rows)
        simd.store_words(inverse + j * 4, simd.words_where_less(largest, none, nan, simd.as_words(recip)))
    simd.store_word(flag, simd.words_max(all_bad))


@Step
def meta_e8m0(meta, count, scale):
    """The bytes of `scales_e8m0` -> scales, NaN for a group that is."""
    for j in range(0, count, 16):
        code = simd.load_words_u8(meta + j)
        bits = simd.words_where_equal(code, simd.splat_words(255), simd.splat_words(_NAN), code << 23)
        simd.store_words(scale + j * 4, bits)


@Step
def meta_e5m0(codes, row, count, scale):
    """The codes and the byte of `scales_e5m0` -> scales."""
    tops = simd.splat_words(simd.load_byte(row) & 255)
    for j in range(0, count, 16):
        below = simd.load_words_u8(codes + j)
        bits = simd.word_max(tops - below, simd.splat_words(1)) << 23
        bits = simd.words_where_equal(below, simd.splat_words(31), simd.splat_words(_NAN), bits)
        simd.store_words(scale + j * 4, bits)


@Step
def meta_e4m3(meta, row, count, scale):
    """The bytes of `scales_e4m3` -> scales."""
    rows, smallest = simd.splat(simd.load1_fp32(row)), simd.splat(_f32(2.0**-6))
    for j in range(0, count, 16):
        code = simd.load_words_u8(meta + j)
        value = simd.as_lanes((code << 20) + (120 << 23))
        value = simd.lane_min(value, (value + value) - smallest) * rows
        bits = simd.words_where_equal(code, simd.splat_words(127), simd.splat_words(_NAN), simd.as_words(value))
        simd.store_words(scale + j * 4, bits)


@_inline
def _round_float(x, inverses, form):
    """One code per lane."""
    drop, up, lowest, offset, lasts, sign_shift, sign_bit = form
    word = simd.as_words(x * inverses)
    # The power of two at which x's binade starts, and the one whose last bit is worth a step in that binade: the sum
    # of that and |x| is rounded half to even to a whole number of steps, which are its lowest bits.
    binade = simd.word_max(word & 0x7F800000, lowest)
    grid = binade + up
    steps = simd.as_words(simd.as_lanes(word & _MAGNITUDE) + simd.as_lanes(grid)) - grid
    code = simd.word_min(steps + ((binade >> drop) - offset), lasts)
    return code | word >> sign_shift & sign_bit


@Step
def round_floats(src, kind, n, unit, inverse, bits, mantissa, lowest, last, codes):
    """X * inverse to the nearest small float, one byte each: see `codecs.elements`."""
    drop = 23 - mantissa
    binade = lowest + 127 << 23
    form = (
        drop, drop << 23, simd.splat_words(binade), binade >> drop, simd.splat_words(last), 32 - bits, 1 << bits - 1,
    )  # fmt: skip
    if kind == BF16:
        for i in range(0, n, 32):
            simd.prefetch(src + n * 2 + i * 2)
            if unit == 32:
                inverses = simd.splat(simd.load1_fp32(inverse + i // 8))
            else:
                inverses = simd.load_fp32(inverse + i * 2)
            pair = simd.load_words(src + i * 2)
            even = _round_float(simd.as_lanes(pair << 16), inverses, form)
            odd = _round_float(simd.as_lanes(pair & 0xFFFF0000), inverses, form)
            simd.store_words_u16(codes + i, even | odd << 8)
        return
    for i in range(0, n, 16):
        inverses = simd.splat(simd.load1_fp32(inverse + i // 4)) if unit == 16 else simd.load_fp32(inverse + i * 4)
        simd.store_words_u8(codes + i, _round_float(simd.load_fp32(src + i * 4), inverses, form))


@_inline
def _read_float(code, scales, form):
    """The fp32 of one code per lane."""
    magnitude, up, binade, smallest, sign_shift = form
    # Read as if the exponent field 0 were a binade of its own; for it, twice that less the smallest normal number is
    # right, and for all others that is larger.
    value = simd.as_lanes(((code & magnitude) << up) + binade)
    value = simd.lane_min(value, simd.twice_minus(value, smallest))
    return simd.as_lanes(simd.as_words(value) | code << sign_shift & 0x80000000) * scales


@Step
def read_floats(codes, n, unit, scale, bits, mantissa, lowest, add, dst, kind):
    """Element * scale as bf16, or as fp32, added to what is there if `add`."""
    smallest = simd.splat(simd.from_bits(lowest + 127 << 23))
    form = ((1 << bits - 1) - 1, 23 - mantissa, lowest + 126 << 23, smallest, 32 - bits)
    if kind == BF16:
        for i in range(0, n, 32):
            simd.prefetch(codes + n + i)
            scales = simd.splat(simd.load1_fp32(scale + i // 8)) if unit == 32 else simd.load_fp32(scale + i * 2)
            pair = simd.load_words_u16(codes + i)
            even, odd = _read_float(pair & 255, scales, form), _read_float(pair >> 8, scales, form)
            simd.store_bf16_pairs(dst + i * 2, even, odd)
        return
    for i in range(0, n, 16):
        scales = simd.splat(simd.load1_fp32(scale + i // 4)) if unit == 16 else simd.load_fp32(scale + i * 4)
        v = _read_float(simd.load_words_u8(codes + i), scales, form)
        if add:
            v = simd.load_fp32(dst + i * 4) + v
        simd.store_fp32(dst + i * 4, v)


_DOWN, _FAR_UP, _FAR_DOWN = -0x10000, 0x7FFFFFFF, -0x80000000


@_inline
def _signed(bits):
    """Integers that order like the fp32 numbers of these patterns: magnitudes, negative ones below 0."""
    sign = simd.splat_words(0) - (bits >> 31)
    return ((bits & _MAGNITUDE) ^ sign) - sign


@_inline
def _unsigned(key):
    """Inverse of `_signed`."""
    sign = simd.splat_words(0) - (key >> 31)
    return simd.as_lanes(((key ^ sign) - sign) | sign & 0x80000000)


@_inline
def _up(key):
    """Keys of bf16, away from the smallest."""
    return (simd.word_min(key, simd.splat_words(0x7FFF0000)) + 0xFFFF) & _DOWN


@Step
def shrink_spikes(src, n, group, smallest, second, largest, before):
    """Four candidates for the two smallest and the two largest of each group of fp32, a multiple of 16.

    They are keys with the place in the lower half, so that among equals the first wins; see `codecs.spike`.
    """
    count = n // group
    far_up, far_down, last = simd.splat_words(_FAR_UP), simd.splat_words(_FAR_DOWN), simd.splat_words(0xFFFF)
    for j in range(0, count, 4):
        at0, stride0 = src + j * group * 4, group * 4
        least_a = least_b = second_a = second_b = far_up
        most_a = most_b = before_a = before_b = far_down
        for k in range(0, 4, 2):
            at = at0 + (min(j + k, count - 1) - j) * stride0
            next_at = at0 + (min(j + k + 1, count - 1) - j) * stride0
            least0 = least1 = second0 = second1 = far_up
            most0 = most1 = before0 = before1 = far_down
            for i in range(0, group, 16):
                place = simd.places() + i
                key0, key1 = _signed(simd.load_words(at + i * 4)), _signed(simd.load_words(next_at + i * 4))
                down0, down1 = key0 & _DOWN | place, key1 & _DOWN | place
                up0, up1 = _up(key0) | last - place, _up(key1) | last - place
                second0 = simd.word_min(second0, simd.word_max(least0, down0))
                second1 = simd.word_min(second1, simd.word_max(least1, down1))
                least0, least1 = simd.word_min(least0, down0), simd.word_min(least1, down1)
                before0 = simd.word_max(before0, simd.word_min(most0, up0))
                before1 = simd.word_max(before1, simd.word_min(most1, up1))
                most0, most1 = simd.word_max(most0, up0), simd.word_max(most1, up1)
            if k == 0:
                second_a = simd.second16_min(least0, least1, second0, second1)
                least_a = simd.words_fold16_min(least0, least1)
                before_a = simd.second16_max(most0, most1, before0, before1)
                most_a = simd.words_fold16_max(most0, most1)
            else:
                second_b = simd.second16_min(least0, least1, second0, second1)
                least_b = simd.words_fold16_min(least0, least1)
                before_b = simd.second16_max(most0, most1, before0, before1)
                most_b = simd.words_fold16_max(most0, most1)
        simd.store_words(second + j * 16, simd.second8_min(least_a, least_b, second_a, second_b))
        simd.store_words(smallest + j * 16, simd.words_fold8_min(least_a, least_b))
        simd.store_words(before + j * 16, simd.second8_max(most_a, most_b, before_a, before_b))
        simd.store_words(largest + j * 16, simd.words_fold8_max(most_a, most_b))


@Step
def two_smallest(smallest, second, count):
    """What `shrink_spikes` left -> the smallest and the second smallest of each group, in place."""
    for j in range(0, count, 16):
        at, other = smallest + j * 16, second + j * 16
        a, b = simd.load_words(at), simd.load_words(at + 64)
        c, d = simd.load_words(at + 128), simd.load_words(at + 192)
        second_ab = simd.second4_min(a, b, simd.load_words(other), simd.load_words(other + 64))
        second_cd = simd.second4_min(c, d, simd.load_words(other + 128), simd.load_words(other + 192))
        ab, cd = simd.words_fold4_min(a, b), simd.words_fold4_min(c, d)
        simd.store_words(second + j * 4, simd.second2_min(ab, cd, second_ab, second_cd))
        simd.store_words(smallest + j * 4, simd.words_fold2_min(ab, cd))


@Step
def two_largest(largest, before, count):
    """What `shrink_spikes` left -> the largest and the second largest of each group, in place."""
    for j in range(0, count, 16):
        at, other = largest + j * 16, before + j * 16
        a, b = simd.load_words(at), simd.load_words(at + 64)
        c, d = simd.load_words(at + 128), simd.load_words(at + 192)
        before_ab = simd.second4_max(a, b, simd.load_words(other), simd.load_words(other + 64))
        before_cd = simd.second4_max(c, d, simd.load_words(other + 128), simd.load_words(other + 192))
        ab, cd = simd.words_fold4_max(a, b), simd.words_fold4_max(c, d)
        simd.store_words(before + j * 4, simd.second2_max(ab, cd, before_ab, before_cd))
        simd.store_words(largest + j * 4, simd.words_fold2_max(ab, cd))


@Step
def find_spikes(src, n, group, places, low, high, a, b):
    """Places (two bytes per group) and values of the smallest and the largest of each group.

    low[], a[], high[] and b[] hold the keys of the smallest, the second smallest, the largest and the second largest
    where `shrink_spikes` has seen the group; of all others they are found here. Afterwards low[] and high[] are fp32.
    """
    done = n // group if group % 16 == 0 else 0
    for j in range((n + group - 1) // group):
        start = j * group
        at, size = src + start * 4, min(group, n - start)
        known = j < done
        if known:
            first, last = simd.load_word(low + j * 4) & 0xFFFF, 0xFFFF - (simd.load_word(high + j * 4) & 0xFFFF)
            # Between two bf16, the largest may be the second smallest, or the other way round.
            second, before = simd.load_word(a + j * 4) & 0xFFFF, 0xFFFF - (simd.load_word(b + j * 4) & 0xFFFF)
            known = second != last and before != first
        else:
            lowest, highest = _FAR_UP, _FAR_DOWN
            for i in range(size):
                pattern = simd.load_word(at + i * 4)
                key = -(pattern & _MAGNITUDE) if pattern < 0 else pattern
                lowest = min(lowest, key & _DOWN | i)
                highest = max(highest, (min(key, 0x7FFF0000) + 0xFFFF) & _DOWN | 0xFFFF - i)
            first, last = lowest & 0xFFFF, 0xFFFF - (highest & 0xFFFF)
        if not known:
            lowest, highest = _FAR_UP, _FAR_DOWN
            for i in range(size):
                if i != first and i != last:
                    pattern = simd.load_word(at + i * 4)
                    key = -(pattern & _MAGNITUDE) if pattern < 0 else pattern
                    lowest = min(lowest, key & _DOWN)
                    highest = max(highest, (min(key, 0x7FFF0000) + 0xFFFF) & _DOWN)
            simd.store_word(a + j * 4, lowest)
            simd.store_word(b + j * 4, highest)
        smallest, largest = simd.load_word(at + first * 4), simd.load_word(at + last * 4)
        if max(smallest & _MAGNITUDE, largest & _MAGNITUDE) > _SPIKE_TOO_LARGE:
            # Which NaN is the largest is nobody's business.
            smallest = largest = _NAN
            first = last = 0
        simd.store_byte(places + 2 * j, first)
        simd.store_byte(places + 2 * j + 1, last)
        simd.store_word(low + j * 4, smallest)
        simd.store_word(high + j * 4, largest)


@_inline
def _first_and_others(at, group, smallest, largest):
    """The places of two values in a group of bf16, and the smallest and the largest of all others in 32 lanes."""
    lowest = -(smallest & 0x7FFF) if smallest < 0 else smallest
    highest = -(largest & 0x7FFF) if largest < 0 else largest
    first = last = -1
    least = most = simd.halves_signed(simd.load_halves(at))
    for i in range(0, group, 32):
        v = simd.halves_signed(simd.load_halves(at + i * 2))
        lows, highs, spikes = simd.halves_equal(v, lowest), simd.halves_equal(v, highest), 0
        if first < 0 and lows:
            first, spikes = i + simd.lowest_bit(lows), lows & -lows
        if last < 0 and highs:
            last, spikes = i + simd.lowest_bit(highs), spikes | highs & -highs
        without_low, without_high = simd.halves_replace(v, spikes, 0x7FFF), simd.halves_replace(v, spikes, -0x8000)
        least = simd.half_min(without_low, least) if i else without_low
        most = simd.half_max(without_high, most) if i else without_high
    return first, last, least, most


@Step
def find_spikes_bf16(src, n, group, places, low, high, least, most):
    """The places of the smallest and the largest of each group of bf16, which are known, and eight candidates, as in
    `shrink_bf16`, for those of all others. Groups are multiples of 32, none is short.
    """
    count = n // group
    for j in range(0, count, 2):
        least0 = least1 = most0 = most1 = simd.load_halves(src + j * group * 2)
        for k in range(j, min(j + 2, count)):
            at = src + k * group * 2
            # The next row: the steps before and after this one leave less time for it.
            for i in range(0, group * 2, 64):
                simd.prefetch(at + i + n * 2)
            smallest, largest = simd.load_word(low + k * 4) >> 16, simd.load_word(high + k * 4) >> 16
            first, last, others_low, others_high = _first_and_others(at, group, smallest, largest)
            smallest, largest = simd.load_half(at + first * 2) << 16, simd.load_half(at + last * 2) << 16
            if max(smallest & _MAGNITUDE, largest & _MAGNITUDE) > _SPIKE_TOO_LARGE:
                smallest = largest = _NAN
                first = last = 0
            simd.store_byte(places + 2 * k, first)
            simd.store_byte(places + 2 * k + 1, last)
            simd.store_word(low + k * 4, smallest)
            simd.store_word(high + k * 4, largest)
            if k == j:
                least0, most0 = others_low, others_high
            else:
                least1, most1 = others_low, others_high
        # Eight candidates of two groups, twice over; the next two groups' overwrite the second half.
        least0, most0 = simd.fold32_min(least0, least1), simd.fold32_max(most0, most1)
        simd.store_halves(least + j * 16, simd.fold16_min(least0, least0))
        simd.store_halves(most + j * 16, simd.fold16_max(most0, most0))


@_inline
def _to_bf16(v):
    bits = simd.as_words(v)
    return simd.as_lanes((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000)


@_inline
def _lowest_binade(low, high):
    """8 times the exponent field at which the scales' bytes start."""
    largest = simd.word_max(simd.as_words(low) & _MAGNITUDE, simd.as_words(high) & _MAGNITUDE) >> 23
    return simd.word_max(largest - 30, simd.splat_words(1)) << 3


@_inline
def _anchor(low, high):
    nothing = simd.splat(_f32(0))
    return simd.where_less(nothing, low, low, simd.where_less(high, nothing, high, nothing))


@Step
def spike_scales(low, high, a, b, count, bits, symmetric, zero, inverse, flag, spikes, meta):
    """What `find_spikes` found -> zero points, reciprocals and bytes: spikes[], then in meta[] scales and centres."""
    nothing, one, half = simd.splat(_f32(0)), simd.splat(_f32(1)), simd.splat(_f32(0.5))
    none, nan, tiny = simd.splat_words(0), simd.splat_words(_NAN), simd.splat(_TINY)
    part = simd.from_bits(bits - 6 + 127 << 23)
    last = _f32((1 << bits) - 2 if symmetric and bits > 1 else (1 << bits) - 1)
    all_bad = none
    for j in range(0, count, 16):
        lows, highs = _to_bf16(simd.load_fp32(low + j * 4)), _to_bf16(simd.load_fp32(high + j * 4))
        low_bits, high_bits = simd.load_words(low + j * 4), simd.load_words(high + j * 4)
        largest = simd.word_max(low_bits & _MAGNITUDE, high_bits & _MAGNITUDE)
        bad = simd.words_where_less(simd.splat_words(_SPIKE_TOO_LARGE), largest, nan, none)
        all_bad = all_bad | bad
        alone = simd.words_where_equal(simd.load_words(a + j * 4), simd.splat_words(_FAR_UP), nan, none) | bad
        lows = simd.as_lanes(simd.words_where_equal(bad, nan, none, simd.as_words(lows)))
        highs = simd.as_lanes(simd.words_where_equal(bad, nan, none, simd.as_words(highs)))
        least = _unsigned(simd.words_where_equal(alone, nan, none, simd.load_words(a + j * 4) & _DOWN))
        most = _unsigned(simd.words_where_equal(alone, nan, none, simd.load_words(b + j * 4) & _DOWN))
        anchors = nothing if symmetric else _anchor(lows, highs)
        middle = least * half + most * half - anchors
        if symmetric:
            least = simd.as_lanes(simd.as_words(least) & _MAGNITUDE)
            most = simd.as_lanes(simd.as_words(most) & _MAGNITUDE)
            needed = simd.lane_max(least, most) * _f32(2) / (last + _f32(1))
        else:
            away = simd.as_lanes(simd.as_words(middle) & _MAGNITUDE) / (part * _f32(127))
            needed = simd.lane_max((most - least) / (part * _f32(63)), away)
        needed = simd.as_lanes(simd.words_where_equal(alone, nan, none, simd.as_words(needed)))
        lowest = _lowest_binade(lows, highs)
        code = simd.word_max((simd.as_words(simd.lane_max(needed, tiny)) + 0xFFFFF >> 20) - lowest, none) + 1
        code = simd.where_less_words(nothing, needed, code, none)
        scale = simd.as_lanes(simd.words_where_equal(code, none, none, lowest + code - 1 << 20))
        recip = simd.words_where_equal(code, none, none, simd.as_words(one / scale))
        # A scale of 0 makes this NaN, and then the second operand is taken.
        steps = simd.lane_min(simd.lane_max(middle / (scale * part), simd.splat(_f32(-127))), simd.splat(_f32(127)))
        steps = simd.words_where_equal(code, none, none, simd.as_words(steps + simd.splat(_ROUND)) - 0x4B400000)
        zeros = anchors + simd.to_lanes(steps) * (scale * part) - scale * (last * _f32(0.5))
        if symmetric:
            zeros = scale * (last * _f32(-0.5))
        simd.store_fp32(zero + j * 4, zeros)
        simd.store_words(inverse + j * 4, simd.words_where_equal(bad, nan, nan, recip))
        low_bits = simd.words_where_equal(bad, nan, nan, simd.as_words(lows))
        simd.store_words(spikes + j * 4, low_bits >> 16 | simd.as_words(highs) & 0xFFFF0000)
        simd.store_words_u8(meta + j, code)
        simd.store_words_u8(meta + count + 16 + j, steps + 128)
    simd.store_word(flag, simd.words_max(all_bad))


@Step
def spike_meta(spikes, scales, centres, count, bits, symmetric, zero, scale, low, high):
    """The bytes of `spike_scales` -> scales, zero points and spikes."""
    none, nan = simd.splat_words(0), simd.splat_words(_NAN)
    nothing = simd.splat(_f32(0))
    part = simd.from_bits(bits - 6 + 127 << 23)
    last = _f32((1 << bits) - 2 if symmetric and bits > 1 else (1 << bits) - 1)
    for j in range(0, count, 16):
        pair = simd.load_words(spikes + j * 4)
        lows, highs = simd.as_lanes(pair << 16), simd.as_lanes(pair & 0xFFFF0000)
        code = simd.load_words_u8(scales + j)
        values = simd.as_lanes(simd.words_where_equal(code, none, none, _lowest_binade(lows, highs) + code - 1 << 20))
        if symmetric:
            zeros = values * (last * _f32(-0.5))
        else:
            steps = simd.to_lanes(simd.load_words_u8(centres + j) - 128)
            zeros = _anchor(lows, highs) + steps * (values * part) - values * (last * _f32(0.5))
        # low * 0 is NaN where the group is.
        bad = simd.words_where_equal(simd.as_words(lows * nothing) & _MAGNITUDE, none, none, nan)
        simd.store_fp32(scale + j * 4, values)
        simd.store_words(zero + j * 4, simd.words_where_equal(bad, nan, nan, simd.as_words(zeros)))
        simd.store_fp32(low + j * 4, lows)
        simd.store_words(high + j * 4, simd.words_where_equal(bad, nan, nan, simd.as_words(highs)))


@Step
def put_spikes(places, low, high, n, group, dst, kind):
    """The spikes of each group, in bf16 or fp32, into their places; none beyond the group's last value."""
    for j in range((n + group - 1) // group):
        end = min(group, n - j * group) - 1
        first = j * group + min(simd.load_byte(places + 2 * j) & 255, end)
        last = j * group + min(simd.load_byte(places + 2 * j + 1) & 255, end)
        if kind == BF16:
            simd.store_half(dst + first * 2, simd.load_word(low + j * 4) >> 16)
            simd.store_half(dst + last * 2, simd.load_word(high + j * 4) >> 16)
        else:
            simd.store_word(dst + first * 4, simd.load_word(low + j * 4))
            simd.store_word(dst + last * 4, simd.load_word(high + j * 4))


@Step
def hadamard(row, blocks, size, stride, factor_bits, factors, ahead):
    """Each of `blocks` runs of `size` fp32, a power of two, times a factor and then transformed in place.

    The factor is also multiplied by the run's own in factors[], if that is not 0. Memory that is needed next, two bytes
    per value, is fetched meanwhile, if `ahead` is not 0.
    """
    inner = min(size, 128)
    # Below sixteen values a vector holds several runs, if they follow each other.
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


@Step
def adapt(row, n, group, alpha):
    """TACO's alpha of each group: see `codecs.hadamard`."""
    for start in range(0, n, group):
        size, at = min(group, n - start), row + start * 4
        whole = size & ~15
        sums = simd.splat(_f32(0))
        for i in range(0, whole, 16):
            v = simd.load_fp32(at + i * 4)
            sums = sums + v * v
        if whole < size:
            v = simd.load_fp32(at + whole * 4)
            beyond = simd.splat_words(size - whole - 1)
            inside = simd.words_where_less(beyond, simd.places(), simd.splat_words(0), simd.as_words(v * v))
            sums = sums + simd.as_lanes(inside)
        value = _f32(448) / np.sqrt(simd.pairwise_sum(sums) / _f32(size) + _f32(1e-6))
        if value < _f32(1e-3):
            value = _f32(1e-3)
        if value > _f32(1e3):
            value = _f32(1e3)
        if value != value:
            value = simd.from_bits(_NAN)
        simd.store1_fp32(alpha, value)
        alpha += 4


@Step
def invert(numbers, count):
    """1 over each fp32, in place."""
    one = simd.splat(_f32(1))
    for i in range(0, count, 16):
        simd.store_fp32(numbers + i * 4, one / simd.load_fp32(numbers + i * 4))


@_inline
def _copy_run(src, n, size, dst):
    """N values of so many bytes each, exactly."""
    step = 64 // size
    if n >= step:
        for i in range(0, n - step + 1, step):
            simd.store_words(dst + i * size, simd.load_words(src + i * size))
        # The last vector overlaps the one before it.
        simd.store_words(dst + (n - step) * size, simd.load_words(src + (n - step) * size))
    else:
        for i in range(0, n * size, 2):
            simd.store_half(dst + i, simd.load_half(src + i))


@Step
def take_out(src, kind, n, features, kept, rest, sent):
    """A row in two: the values at the sorted places features[] as bf16, and all others, closed up."""
    size = 2 if kind == BF16 else 4
    start = 0
    for k in range(kept + 1):
        stop = simd.load_long(features + k * 8) if k < kept else n
        _copy_run(src + start * size, stop - start, size, rest + (start - k) * size)
        if k < kept:
            bits = simd.load_half(src + stop * 2) << 16 if kind == BF16 else simd.load_word(src + stop * 4)
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if bits & _MAGNITUDE <= 0x7F800000 else 0x7FC0
            simd.store_half(sent + k * 2, bits)
        start = stop + 1


@Step
def put_back(rest, sent, features, kept, n, dst, kind):
    """Inverse of `take_out`."""
    size = 2 if kind == BF16 else 4
    start = 0
    for k in range(kept + 1):
        stop = simd.load_long(features + k * 8) if k < kept else n
        _copy_run(rest + (start - k) * size, stop - start, size, dst + start * size)
        start = stop + 1
    for k in range(kept):
        place, bits = simd.load_long(features + k * 8), simd.load_half(sent + k * 2)
        if kind == BF16:
            simd.store_half(dst + place * 2, bits)
        else:
            simd.store_word(dst + place * 4, bits << 16)


@Step
def lengthen(row, n, upto):
    """Copies of the last bf16 of a row behind it, which change no range."""
    for i in range(n, upto):
        simd.store_half(row + i * 2, simd.load_half(row + n * 2 - 2))


@Step
def mark_nan(src, n, code, codes):
    """The code of each NaN and Inf becomes `code`."""
    inf, marks = simd.splat_words(0x7F800000), simd.splat_words(code)
    for i in range(0, n, 16):
        bits, old = simd.load_words(src + i * 4) & _MAGNITUDE, simd.load_words_u8(codes + i)
        simd.store_words_u8(codes + i, simd.words_where_less(bits, inf, old, marks))


@Step
def unmark_nan(codes, n, code, row):
    """The value of each `code` becomes NaN."""
    for i in range(0, n, 16):
        is_code, bits = simd.load_words_u8(codes + i), simd.load_words(row + i * 4)
        simd.store_words(
            row + i * 4, simd.words_where_equal(is_code, simd.splat_words(code), simd.splat_words(_NAN), bits)
        )


@Step
def pick_table(number, tables, count, table_bytes, factor_bits, n, scale, zero):
    """Of `count` tables of scales the one whose number stands in a byte, and the zero points: scales times a factor."""
    table = tables + min(simd.load_byte(number) & 255, count - 1) * table_bytes
    factor = simd.from_bits(factor_bits)
    for i in range(0, n, 16):
        v = simd.load_fp32(table + i * 4)
        simd.store_fp32(scale + i * 4, v)
        simd.store_fp32(zero + i * 4, v * factor)


@Step
def put_byte(value, dst):
    """One byte."""
    simd.store_byte(dst, value)
