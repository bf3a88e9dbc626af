"""The codecs on GPUs, compiled by Triton."""

from flashcomm.kernels.gpu.launch import (
    LARGEST_TILE,
    TILE,
    VALUES,
    constants_of,
    decode_sum,
    decode_sum_add_norm,
    decode_sum_encode,
    describe,
    edge,
    encode,
    least_tile,
    on_device,
    options,
    tile,
    typed,
    why_not,
)
from flashcomm.kernels.gpu.tiles.base import Format

__all__ = [
    "Format", "LARGEST_TILE", "TILE", "VALUES", "constants_of", "decode_sum", "decode_sum_add_norm",
    "decode_sum_encode", "describe", "edge", "encode", "least_tile", "on_device", "options", "tile", "typed", "why_not",
]  # fmt: skip
