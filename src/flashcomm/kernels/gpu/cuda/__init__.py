"""The hot formats on NVIDIA GPUs, in CUDA C++ (`codecs.cu`), compiled in the process by NVRTC.

Beside Triton's kernels for half their instructions. **No GPU has run these kernels yet**: FLASHCOMM_CUDA=1 switches
them on.
"""

from flashcomm.kernels.gpu.cuda.launch import (
    LAYOUTS,
    VALUES,
    decode_sum,
    decode_sum_encode,
    encode,
    entropy_macros,
    macros,
    spell,
    unavailable,
    unpack_macros,
    why_not,
)

__all__ = [
    "LAYOUTS",
    "VALUES",
    "decode_sum",
    "decode_sum_encode",
    "encode",
    "entropy_macros",
    "macros",
    "spell",
    "unavailable",
    "unpack_macros",
    "why_not",
]
