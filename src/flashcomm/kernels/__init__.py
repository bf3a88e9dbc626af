"""The three verbs of the codecs at the speed of the device: the one place that picks an implementation.

    encode             x[T, H] -> payload[T, P]
    decode_sum         payloads[R, T, P] -> x[T, H]; `decode` is the case R = 1
    decode_sum_encode  payloads[R, T, P] -> payload[T, P']

All of them give the bytes of `flashcomm.codecs`; a format or a device without a fast kernel runs the specification
itself, which `route` tells and the log says once.
"""

import importlib.util
import logging
import os
import threading
from functools import lru_cache
from typing import Any

import torch

from flashcomm import codecs
from flashcomm.codecs import FLOAT_DTYPES, Cast, Codec, Plain

_log = logging.getLogger("flashcomm.kernels")


@lru_cache(maxsize=4096)
def route(codec: Codec, device_type: str) -> tuple[str, str]:
    """(backend, why): which implementation serves `codec` on a kind of device, ``numba``, ``triton`` or ``torch``."""
    if isinstance(codec, Plain):
        return "torch", "nothing to encode"
    if device_type == "cuda":
        if os.environ.get("FLASHCOMM_TRITON", "1") == "0":
            return "torch", "FLASHCOMM_TRITON=0"
        if importlib.util.find_spec("triton") is None:
            return "torch", "triton is not installed (pip install triton)"
        from flashcomm.kernels import gpu

        refusal = gpu.why_not(codec)
        return ("torch", refusal) if refusal else ("triton", "compiled for this GPU")
    if device_type != "cpu":
        return "torch", f"no kernels for {device_type}: the torch specification runs on the device"
    if importlib.util.find_spec("numba") is None:
        return "torch", "numba is not installed (pip install numba)"
    from flashcomm.kernels import cpu

    if not cpu.supports(codec):
        return "torch", f"no CPU kernel for {codec}"
    return "numba", "compiled for this CPU"


def missing(codec: Codec, device_type: str) -> str | None:
    """Why `codec` runs on the specification although it is more than a cast; None where it has a kernel."""
    backend, why = route(codec, device_type)
    return why if backend == "torch" and not isinstance(codec, Plain | Cast) else None


@lru_cache(maxsize=4096)
def any_missing(codec: Codec, device_type: str) -> str | None:
    """Of the steps of `codec`, why the first without a kernel has none."""
    return next((why for step in codec.steps if (why := missing(step, device_type))), None)


@lru_cache(maxsize=4096)
def _backend(codec: Codec, device_type: str, cols: int):
    """The module that serves `codec` in rows of `cols` values, or None for the specification."""
    backend, _ = route(codec, device_type)
    if backend == "torch":
        return None
    if backend == "triton":
        from flashcomm.kernels import gpu

        return None if gpu.why_not(codec, cols) else gpu
    _warm_up(codec)
    from flashcomm.kernels import cpu

    return cpu


def warm_up(codec: "str | Codec" = "int8g128"):
    """Load what `codec` needs on the CPU, or compile it where this machine has not yet: two to four seconds.

    The first collective does it too; a server calls this before it takes requests. The log says so if it lasts.
    """
    for step in codecs.parse(codec).steps:
        if route(step, "cpu")[0] == "numba":
            _warm_up(step)


@lru_cache(maxsize=4096)
def _warm_up(codec: Codec):
    notice = threading.Timer(
        1.0, _log.warning, [f"flashcomm is compiling its CPU kernels for {codec} (once; numba keeps them on disk)"]
    )
    notice.daemon = True
    notice.start()
    from flashcomm.kernels import cpu

    features = getattr(codec, "features", None) or codecs.Features(torch.ones(2, 256))
    codec, cols = codec.bind(features, 0), features.cols
    x = torch.zeros(1, cols, dtype=torch.bfloat16)
    payload = torch.empty(1, 1, codec.payload_bytes(cols), dtype=torch.uint8)
    cpu.encode(x, codec, payload[0])
    cpu.decode_sum(payload, codec, x)
    cpu.decode_sum_encode(payload, codec, codec, cols, payload[0])
    notice.cancel()


def check_values(x: torch.Tensor, what: str):
    """Refuse what is not rows of values.

    Raises:
        ValueError: `x` is not a 2-D tensor of bf16, fp16 or fp32.
    """
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        given = f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else repr(type(x))
        raise ValueError(f"{what} takes a [rows, cols] tensor of bf16, fp16 or fp32, not {given}")


def check_storage(x: torch.Tensor):
    """Refuse wrappers (DTensor, a functional collective's unfinished result), which have no memory of their own.

    Raises:
        ValueError: `x` is such a wrapper.
    """
    if x.numel() and x.data_ptr() == 0:
        raise ValueError(f"{type(x).__name__} has no memory of its own: pass its local tensor, or wait for it first")


def encode(x: torch.Tensor, codec: "str | Codec", *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Encode each row of `x` into its bytes on the wire.

    Args:
        x: [rows, cols] bf16, fp16 or fp32, any strides, any device.
        codec: a codec or its spelling.
        out: optional uint8 [rows, payload_bytes(cols)] with contiguous rows to write into.

    Returns:
        uint8 [rows, payload_bytes(cols)] on the device of `x`.

    Raises:
        ValueError: not a 2-D floating-point tensor, an unknown codec, or a pair of codecs.

    >>> encode(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), "int2g4").tolist()
    [[228, 128, 63, 0, 0]]
    """
    if torch.compiler.is_dynamo_compiling():
        from flashcomm.kernels import graph

        return graph.encode(x, codec, out)
    codec = codecs.parse(codec)
    check_values(x, "encode")
    check_storage(x)
    shape = (x.shape[0], codec.payload_bytes(x.shape[1], x.dtype))
    _check_out(out, shape, torch.uint8, x.device)
    backend = _backend(codec, x.device.type, x.shape[1])
    if backend is None or x.numel() == 0:
        payload = codec.encode(x)
        return payload if out is None else out.copy_(payload)
    if x.stride(1) != 1:
        x = x.contiguous()
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=x.device)
    backend.encode(x, codec, out)
    return out


def decode(
    payload: torch.Tensor, codec: "str | Codec", *, cols: int, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Decode rows that `encode` made.

    Args:
        payload: uint8 [rows, payload_bytes(cols)].
        codec: the codec that encoded it.
        cols: values in a row.
        dtype: of the result: bf16, fp16 or fp32; rounded once, half to even.
        out: optional [rows, cols] of `dtype` with contiguous rows to write into.

    Returns:
        [rows, cols] of `dtype` on the device of `payload`.

    Raises:
        ValueError: payload of another shape or type than `codec` and `cols` need.

    >>> payload = torch.tensor([[228, 128, 63, 0, 0]], dtype=torch.uint8)
    >>> decode(payload, "int2g4", cols=4, dtype=torch.float32).tolist()
    [[0.0, 1.0, 2.0, 3.0]]
    """
    if torch.compiler.is_dynamo_compiling():
        from flashcomm.kernels import graph

        return graph.decode(payload, codec, cols, dtype, out)
    return decode_sum(payload[None], codec, cols=cols, dtype=dtype, out=out)


def decode_sum(
    payloads: torch.Tensor, codec: "str | Codec", *, cols: int, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Decode the same rows of several ranks and add them in fp32, rank 0 first.

    Args:
        payloads: uint8 [ranks, rows, payload_bytes(cols)]; ranks and rows may be strided.
        codec, cols, dtype, out: as for `decode`.

    Returns:
        [rows, cols] of `dtype`.
    """
    codec = codecs.parse(codec)
    check_payloads(payloads, codec, cols, dtype)
    payloads = _contiguous_rows(payloads)
    _check_out(out, (payloads.shape[1], cols), dtype, payloads.device)
    backend = _backend(codec, payloads.device.type, cols)
    if backend is None or payloads.numel() == 0:
        if isinstance(codec, Plain) and payloads.shape[0] == 1:
            result = codec.decode(payloads[0], cols, dtype)
        else:
            result = codecs.decode_sum(payloads, codec, cols, dtype)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty(payloads.shape[1], cols, dtype=dtype, device=payloads.device)
    backend.decode_sum(payloads, codec, out)
    return out


def decode_sum_encode(
    payloads: torch.Tensor,
    codec: "str | Codec",
    out_codec: "str | Codec",
    *,
    cols: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode, add in fp32 in rank order, encode: the reduction of a two-step all-reduce, in one pass.

    Args:
        payloads: uint8 [ranks, rows, payload_bytes(cols)] in `codec`.
        codec: of the payloads.
        out_codec: of the result; may differ in everything.
        cols: values in a row.
        out: optional uint8 [rows, payload_bytes(cols)] of `out_codec` to write into.

    Returns:
        uint8 [rows, payload_bytes(cols)] in `out_codec`.
    """
    codec, out_codec = codecs.parse(codec), codecs.parse(out_codec)
    check_payloads(payloads, codec, cols, torch.float32)
    payloads = _contiguous_rows(payloads)
    _check_out(out, (payloads.shape[1], out_codec.payload_bytes(cols)), torch.uint8, payloads.device)
    backend, out_backend = (_backend(c, payloads.device.type, cols) for c in (codec, out_codec))
    if backend is None or backend is not out_backend or payloads.numel() == 0:
        total = decode_sum(payloads, codec, cols=cols, dtype=torch.float32)
        return encode(total, out_codec, out=out)
    if out is None:
        shape = (payloads.shape[1], out_codec.payload_bytes(cols))
        out = torch.empty(shape, dtype=torch.uint8, device=payloads.device)
    backend.decode_sum_encode(payloads, codec, out_codec, cols, out)
    return out


def decode_sum_add_norm(
    payloads: torch.Tensor,
    codec: "str | Codec",
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    epsilon: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode, add in rank order, add the residual and take the RMS norm: the end of a layer's all-reduce, in one pass.

    In torch, each line rounded to the residual's type::

        total = decode_sum(payloads, codec, cols=H, dtype=residual.dtype) + residual
        normed = total.float() * (total.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
        normed = normed.to(residual.dtype) * weight

    Args:
        payloads: uint8 [ranks, rows, payload_bytes(H)].
        codec: of the payloads.
        residual: [rows, H] bf16, fp16 or fp32.
        weight: [H] of the residual's type.
        epsilon: of the norm.

    Returns:
        The normed rows and the total, which is the next residual: both [rows, H] of the residual's type. The total's
        bits are those of the lines above; the mean is added up in another order.

    Raises:
        ValueError: tensors that do not fit together.

    Source: LlamaRMSNorm's roundings; fused with the decoding as vLLM's ``fuse_allreduce_rms`` does without a codec.
    """
    codec = codecs.parse(codec)
    check_values(residual, "decode_sum_add_norm")
    cols = residual.shape[1]
    check_payloads(payloads, codec, cols, residual.dtype)
    payloads = _contiguous_rows(payloads)
    if weight.shape != (cols,) or weight.dtype != residual.dtype or payloads.shape[1] != residual.shape[0]:
        raise ValueError(
            f"a residual {residual.dtype} {list(residual.shape)} needs a weight [{cols}] of its type and payloads of "
            f"{residual.shape[0]} rows, not {weight.dtype} {list(weight.shape)} and {payloads.shape[1]} rows"
        )
    backend: Any = _backend(codec, residual.device.type, cols)
    if backend is not None and residual.is_cuda and residual.numel() and cols <= backend.LARGEST_TILE:
        out, total = (torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) for _ in range(2))
        backend.decode_sum_add_norm(payloads, codec, residual.contiguous(), weight.contiguous(), epsilon, out, total)
        return out, total
    total = decode_sum(payloads, codec, cols=cols, dtype=residual.dtype) + residual
    normed = total.float() * (total.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return normed.to(residual.dtype) * weight, total


def _check_out(out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    """Kernels write to addresses, so what they write into is checked here or nowhere."""
    if out is None:
        return
    if out.shape != shape or out.dtype != dtype or out.device != device or (out.numel() and out.stride(1) != 1):
        raise ValueError(
            f"out must be {dtype} {list(shape)} on {device} with contiguous rows, "
            f"not {out.dtype} {list(out.shape)} with strides {list(out.stride())} on {out.device}"
        )


def check_payloads(payloads: torch.Tensor, codec: Codec, cols: int, dtype: torch.dtype):
    """Refuse what are not payloads of `codec`.

    Raises:
        ValueError: not uint8 of shape [ranks, rows, payload_bytes(cols)], no ranks, or no type that values decode to.
    """
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"values decode to bf16, fp16 or fp32, not {dtype}")
    width = codec.payload_bytes(cols, dtype)
    if payloads.dtype != torch.uint8 or payloads.dim() != 3 or payloads.shape[-1] != width:
        raise ValueError(
            f"{cols} values in {codec} are rows of {width} bytes (uint8), "
            f"not {payloads.dtype} of shape {list(payloads.shape[1:] if payloads.dim() == 3 else payloads.shape)}"
        )
    if payloads.shape[0] == 0:
        raise ValueError("a sum needs the payload of at least one rank")


def _contiguous_rows(payloads: torch.Tensor) -> torch.Tensor:
    return payloads if payloads.stride(2) == 1 else payloads.contiguous()
