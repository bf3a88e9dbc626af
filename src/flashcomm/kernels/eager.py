"""`encode` and `decode_sum` on the tensors of a running program.

Separate from `verbs`, which adds what a compiled graph needs, so that the operators of such a graph (`graph`) can call
these.
"""

import torch

from flashcomm import codecs, subnormals
from flashcomm.codecs import Codec
from flashcomm.kernels.arguments import check_out, check_payloads, check_storage, check_values
from flashcomm.kernels.routes import implementation


def encode(x: torch.Tensor, codec: "str | Codec", out: torch.Tensor | None) -> torch.Tensor:
    """Encode each row of `x`: `verbs.encode`."""
    codec = codecs.parse(codec)
    check_values(x, "encode")
    check_storage(x)
    if x.is_neg():
        # Kernels read memory, where the values have the other sign.
        x = x.resolve_neg()
    shape = (x.shape[0], codec.payload_bytes(x.shape[1], x.dtype))
    if out is not None:
        check_out(out, shape, torch.uint8, x.device)
    kernels = implementation(codec, x.device.type, x.shape[1])
    if kernels is None or x.numel() == 0:
        with subnormals.kept():
            payload = codec.encode(x)
        return payload if out is None else out.copy_(payload)
    if x.stride(1) != 1:
        x = x.contiguous()
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=x.device)
    kernels.encode(x, codec, out)
    return out


def decode_sum(
    payloads: torch.Tensor, codec: "str | Codec", cols: int, dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    """Decode the rows of several ranks and add them: `verbs.decode_sum`, and `verbs.decode` for one rank."""
    codec = codecs.parse(codec)
    check_payloads(payloads, codec, cols, dtype)
    if payloads.stride(2) != 1:
        payloads = payloads.contiguous()
    if out is not None:
        check_out(out, (payloads.shape[1], cols), dtype, payloads.device)
    kernels = implementation(codec, payloads.device.type, cols)
    if kernels is None or payloads.numel() == 0:
        with subnormals.kept():
            result = codecs.decode_sum(payloads, codec, cols, dtype)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty(payloads.shape[1], cols, dtype=dtype, device=payloads.device)
    kernels.decode_sum(payloads, codec, out)
    return out
