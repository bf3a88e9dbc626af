"""The implementation that serves a codec on a device, and the reason if that is the specification itself."""

import gc
import importlib.util
import logging
import threading
from functools import lru_cache
from typing import Any

import torch

from flashcomm import codecs, machine, settings
from flashcomm.codecs import Cast, Codec, Plain

_log = logging.getLogger("flashcomm.kernels")

DECODED_ONLY = "compiled for this GPU to decode; the torch specification encodes"
_LEAST_TRITON = (3, 4)
"""The first Triton with `tl.gather` and the source of a kernel as `gpu` describes it."""


@lru_cache(maxsize=4096)
def route(codec: Codec, device_type: str) -> tuple[str, str]:
    """(backend, why): what serves `codec` on a kind of device, ``numba``, ``cuda``, ``triton`` or ``torch``."""
    if isinstance(codec, Plain):
        return "torch", "nothing to encode"
    if device_type == "cuda":
        if not settings.switched_on("FLASHCOMM_TRITON"):
            return "torch", "FLASHCOMM_TRITON=0"
        if why := _without_triton():
            return "torch", why
        from flashcomm.kernels import gpu
        from flashcomm.kernels.gpu import cuda

        if cuda.why_not(codec) is None:
            return "cuda", "compiled for this GPU" if cuda.spell(codec) else DECODED_ONLY
        refusal = gpu.why_not(codec)
        return ("torch", refusal) if refusal else ("triton", "compiled for this GPU")
    if device_type != "cpu":
        return "torch", f"no kernels for {device_type}: the torch specification runs on the device"
    if why := machine.why_not_compiled():
        return "torch", why
    from flashcomm.kernels import cpu

    if not cpu.supports(codec):
        return "torch", f"no CPU kernel for {codec}"
    return "numba", "compiled for this CPU"


def _without_triton() -> str | None:
    """Why Triton does not compile the kernels for GPUs; None if it does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < _LEAST_TRITON:
        least = ".".join(map(str, _LEAST_TRITON))
        return (
            f"triton {triton.__version__} cannot compile the GPU kernels, {least} and later can (torch 2.8 brings it)"
        )
    return None


def missing(codec: Codec, device_type: str) -> str | None:
    """Why the specification encodes `codec`, or runs all of it; None if there are kernels, or needs none as a cast."""
    backend, why = route(codec, device_type)
    slow = backend == "torch" or why == DECODED_ONLY
    return why if slow and not isinstance(codec, Plain | Cast) else None


@lru_cache(maxsize=4096)
def any_missing(codec: Codec, device_type: str) -> str | None:
    """Why one of the formats of `codec` has no kernel, see `missing`; None if each has one."""
    return next((why for single in codec.formats if (why := missing(single, device_type))), None)


@lru_cache(maxsize=4096)
def implementation(codec: Codec, device_type: str, cols: int):
    """The module that encodes and decodes rows of `cols` values in `codec`, or None for the specification."""
    return next(iter(_implementations(codec, device_type, cols)), None)


@lru_cache(maxsize=4096)
def common_implementation(codec: Codec, out_codec: Codec, device_type: str, cols: int):
    """The first module that serves both formats, so that a sum goes from one to the other in one pass; None if none."""
    of_out = _implementations(out_codec, device_type, cols)
    return next((module for module in _implementations(codec, device_type, cols) if module in of_out), None)


def _implementations(codec: Codec, device_type: str, cols: int) -> list[Any]:
    """The modules that serve `codec`, the best first."""
    backend, _ = route(codec, device_type)
    if backend == "numba":
        _load(codec)
        from flashcomm.kernels import cpu

        return [cpu]
    if backend == "torch":
        return []
    from flashcomm.kernels import gpu
    from flashcomm.kernels.gpu import cuda

    triton = [] if gpu.why_not(codec, cols) else [gpu]
    return [cuda, *triton] if backend == "cuda" else triton


def load(codec: Codec, device_type: str):
    """Load the compiled kernels of all formats of `codec`. Triton's are compiled for the values of a call."""
    for single in codec.formats:
        if route(single, device_type)[0] == "numba":
            _load(single)


@lru_cache(maxsize=4096)
def _load(codec: Codec):
    notice = threading.Timer(
        1.0, _log.warning, [f"flashcomm is compiling its CPU kernels for {codec} (once; numba keeps them on disk)"]
    )
    notice.daemon = True
    notice.start()
    from flashcomm.kernels import cpu

    features = getattr(codec, "features", None) or codecs.Features(
        torch.ones(2, 256, dtype=torch.float32, device="cpu")
    )
    codec, cols = codec.bind(features, 0), features.cols
    x = torch.zeros(1, cols, dtype=torch.bfloat16, device="cpu")
    payload = torch.empty(1, 1, codec.payload_bytes(cols), dtype=torch.uint8, device="cpu")
    collects = gc.isenabled()
    # The compiler's objects set off collections that look at every object of the process, a tenth of the time.
    gc.disable()
    try:
        cpu.encode(x, codec, payload[0])
        cpu.decode_sum(payload, codec, x)
        cpu.decode_sum_encode(payload, codec, codec, cols, payload[0])
    finally:
        if collects:
            gc.enable()
        notice.cancel()
