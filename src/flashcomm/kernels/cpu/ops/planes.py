"""Codes of one byte each as bit planes, and back: `codecs.bits`."""

from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import AHEAD, Op


@Op
def pack(codes, n, bits, dst):
    """Pack n codes of one byte each, n a multiple of 128, into bit planes."""
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


@Op
def pack_rest(codes, n, width, shift, dst):
    """Pack one plane of n < 128 codes."""
    m = (n * width + 7) >> 3
    for i in range(m):
        byte = 0
        for t in range(8 // width):
            j = i + m * t
            if j < n:
                byte |= (simd.load_byte(codes + j) >> shift & (1 << width) - 1) << t * width
        simd.store_byte(dst + i, byte)


@Op
def unpack(src, n, bits, codes):
    """Inverse of `pack`."""
    for i in range(0, n, 128):
        simd.prefetch(src + AHEAD)
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


@Op
def unpack_rest(src, n, width, shift, codes):
    """Inverse of `pack_rest`; must be called for the plane of the lowest bits first."""
    m = (n * width + 7) >> 3
    for i in range(m):
        byte = simd.load_byte(src + i)
        for t in range(8 // width):
            j = i + m * t
            if j < n:
                old = simd.load_byte(codes + j) if shift else 0
                simd.store_byte(codes + j, old | (byte >> t * width & (1 << width) - 1) << shift)
