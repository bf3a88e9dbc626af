"""Tiles of `codecs.bits`: codes of 1 to 8 bits as bytes, and back.

In a pack of 128 codes, seen as [8 / w, 16 w], a plane of width w is the sum over the first axis of the shifted codes.
The last pack of a row may be shorter (`EDGE` is "codes"): its codes share bytes in another way, and are looked up one
by one.
"""

import triton
import triton.language as tl

from flashcomm.kernels.gpu.tiles.base import within


@triton.jit
def code_bytes(n, BITS: tl.constexpr):
    """Bytes of n codes."""
    rest = n % 128
    total = n // 128 * (16 * BITS)
    for i in tl.static_range(4):
        if BITS & (8 >> i):
            total += (rest * (8 >> i) + 7) // 8
    return total


@triton.jit
def store_codes(ptr, codes, start, n, BITS: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Write codes [V] int32 at the places from `start` on, a multiple of 128, of the n codes at `ptr`."""
    packs = start // 128 + tl.arange(0, V // 128)[:, None]
    left = tl.maximum(n - packs * 128, 0)
    plane = packs * (16 * BITS)
    for i in tl.static_range(4):
        if BITS & (8 >> i):
            plane = _store_plane(ptr, codes, plane, left, BITS, 8 >> i, V, EDGE)


@triton.jit
def _store_plane(ptr, codes, plane, left, BITS: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Write one plane of packs with `left` codes each, at `plane` [V / 128, 1]; returns where the plane ends."""
    SLOTS: tl.constexpr = 8 // WIDTH
    codes = (codes >> (BITS & ~(2 * WIDTH - 1))) & ((1 << WIDTH) - 1)
    if EDGE == "codes":
        pack = tl.reshape(codes, [V // 128, 128])
        size = (tl.minimum(left, 128) * WIDTH + 7) // 8
        byte = tl.arange(0, 128)[None, :]
        packed = tl.zeros([V // 128, 128], tl.int32)
        for slot in tl.static_range(SLOTS):
            place = byte + slot * size
            found = tl.gather(pack, tl.minimum(place, 127), axis=1)
            packed |= tl.where(place < left, found, 0) << (WIDTH * slot)
        tl.store(ptr + plane + byte, packed.to(tl.uint8), mask=byte < size)
        return plane + size
    else:
        # Four neighbours become a word within a thread before words of several threads are added.
        lane = 8 * tl.arange(0, 4)
        words = tl.sum(tl.reshape(codes, [V // 128, SLOTS, 4 * WIDTH, 4]) << lane[None, None, None, :], axis=3)
        words = tl.sum(words << (WIDTH * tl.arange(0, SLOTS))[None, :, None], axis=1)
        packed = tl.reshape(words[:, :, None] >> lane[None, None, :], [V // 128, 16 * WIDTH])
        byte = plane + tl.arange(0, 16 * WIDTH)[None, :]
        tl.store(ptr + byte, (packed & 0xFF).to(tl.uint8), mask=within(0 * left, left, EDGE))
        return plane + 16 * WIDTH


@triton.jit
def load_codes(ptr, start, n, BITS: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Inverse of `store_codes`: [V] int32, undefined beyond n."""
    packs = start // 128 + tl.arange(0, V // 128)[:, None, None]
    left = tl.maximum(n - packs * 128, 0)
    plane = packs * (16 * BITS)
    codes = tl.zeros([V], tl.int32)
    for i in tl.static_range(4):
        if BITS & (8 >> i):
            part, plane = _load_plane(ptr, plane, left, BITS, 8 >> i, V, EDGE)
            codes |= part
    return codes


@triton.jit
def _load_plane(ptr, plane, left, BITS: tl.constexpr, WIDTH: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Inverse of `_store_plane`: this plane's part of the codes [V], and where the plane ends."""
    if EDGE == "codes":
        size = (tl.minimum(left, 128) * WIDTH + 7) // 8
        place = tl.arange(0, 128)[None, None, :]
        slot = place // tl.maximum(size, 1)
        packed = tl.load(ptr + plane + (place - slot * size), mask=place < left, other=0).to(tl.int32)
        end = plane + size
    else:
        slot = tl.arange(0, 8 // WIDTH)[None, :, None]
        packed = tl.load(
            ptr + plane + tl.arange(0, 16 * WIDTH)[None, None, :], mask=within(0 * left, left, EDGE), other=0
        ).to(tl.int32)
        end = plane + 16 * WIDTH
    part = ((packed >> (WIDTH * slot)) & ((1 << WIDTH) - 1)) << (BITS & ~(2 * WIDTH - 1))
    return tl.reshape(part, [V]), end
