"""Sizes of shared memory, apart from what needs numba."""

# Bytes of payload that a rank publishes at once, and of values that it decodes then: measured 2026-11-21, 2 cores.
HALF_BYTES = 1 << 20
PIECE_BYTES = 1 << 20
