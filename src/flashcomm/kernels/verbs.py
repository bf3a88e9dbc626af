"""The verbs of the codecs: the one place that picks an implementation.

    encode             x[T, H] -> payload[T, P]
    decode_sum         payloads[R, T, P] -> x[T, H]; `decode` is the case R = 1
    decode_sum_encode  payloads[R, T, P] -> payload[T, P']

All of them give the bytes of `flashcomm.codecs`. A format or a device without a fast kernel runs the specification
itself; `route` tells which and why, and the log says it once.

Shape legend: R ranks, T rows (tokens), H columns (hidden size), P payload bytes of a row.
"""

from typing import Any

import torch

from flashcomm import codecs, subnormals
from flashcomm.codecs import Codec
from flashcomm.kernels import eager
from flashcomm.kernels.arguments import check_out, check_payloads, check_values
from flashcomm.kernels.routes import common_implementation, implementation


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
    return eager.encode(x, codec, out)


def decode(
    payload: torch.Tensor, codec: "str | Codec", *, cols: int, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Decode rows that `encode` made.

    Args:
        payload: uint8 [rows, payload_bytes(cols)].
        codec: the codec that encoded it.
        cols: values in a row.
        dtype: type of the result: bf16, fp16 or fp32; rounded once, half to even.
        out: optional [rows, cols] of `dtype` with contiguous rows to write into.

    Returns:
        [rows, cols] of `dtype` on the device of `payload`.

    Raises:
        ValueError: a payload whose shape or type does not fit `codec` and `cols`.

    >>> payload = torch.tensor([[228, 128, 63, 0, 0]], dtype=torch.uint8)
    >>> decode(payload, "int2g4", cols=4, dtype=torch.float32).tolist()
    [[0.0, 1.0, 2.0, 3.0]]
    """
    if torch.compiler.is_dynamo_compiling():
        from flashcomm.kernels import graph

        return graph.decode(payload, codec, cols, dtype, out)
    return eager.decode_sum(payload[None], codec, cols, dtype, out)


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
    return eager.decode_sum(payloads, codec, cols, dtype, out)


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
        codec: format of the payloads.
        out_codec: format of the result; may differ in everything.
        cols: values in a row.
        out: optional uint8 [rows, payload_bytes(cols)] of `out_codec` to write into.

    Returns:
        uint8 [rows, payload_bytes(cols)] in `out_codec`.
    """
    codec, out_codec = codecs.parse(codec), codecs.parse(out_codec)
    check_payloads(payloads, codec, cols, torch.float32)
    shape = (payloads.shape[1], out_codec.payload_bytes(cols))
    if out is not None:
        check_out(out, shape, torch.uint8, payloads.device)
    kernels = common_implementation(codec, out_codec, payloads.device.type, cols)
    if kernels is None or payloads.numel() == 0:
        return eager.encode(eager.decode_sum(payloads, codec, cols, torch.float32, None), out_codec, out)
    if payloads.stride(2) != 1:
        payloads = payloads.contiguous()
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=payloads.device)
    kernels.decode_sum_encode(payloads, codec, out_codec, cols, out)
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
        codec: format of the payloads.
        residual: [rows, H] bf16, fp16 or fp32.
        weight: [H] of the residual's type.
        epsilon: added to the mean square before the root.

    Returns:
        The normed rows and the total, which is the next residual: both [rows, H] of the residual's type. The total's
        bits are those of the lines above; the mean is summed in another order.

    Raises:
        ValueError: tensors that do not fit together.

    Source: LlamaRMSNorm's roundings; fused with the decoding as vLLM's ``fuse_allreduce_rms`` does without a codec.
    """
    codec = codecs.parse(codec)
    check_values(residual, "decode_sum_add_norm")
    cols = residual.shape[1]
    check_payloads(payloads, codec, cols, residual.dtype)
    if weight.shape != (cols,) or weight.dtype != residual.dtype or payloads.shape[1] != residual.shape[0]:
        raise ValueError(
            f"a residual {residual.dtype} {list(residual.shape)} needs a weight [{cols}] of its type and payloads of "
            f"{residual.shape[0]} rows, not {weight.dtype} {list(weight.shape)} and {payloads.shape[1]} rows"
        )
    kernels: Any = implementation(codec, residual.device.type, cols)
    if residual.is_cuda and residual.numel() and cols <= getattr(kernels, "LARGEST_TILE", 0):
        if payloads.stride(2) != 1:
            payloads = payloads.contiguous()
        out, total = (torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) for _ in range(2))
        residual, weight = (t.resolve_neg().contiguous() for t in (residual, weight))
        kernels.decode_sum_add_norm(payloads, codec, residual, weight, epsilon, out, total)
        return out, total
    with subnormals.kept():
        total = eager.decode_sum(payloads, codec, cols, residual.dtype, None) + residual
        normed = total.float() * (total.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
        return normed.to(residual.dtype) * weight, total
