"""Checks of the arguments of the verbs. Kernels write to addresses, so an argument is checked here or nowhere."""

import torch

from flashcomm.codecs import FLOAT_DTYPES, Codec


def check_values(x: torch.Tensor, what: str):
    """Refuse anything but rows of values; `what` names the caller in the error.

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


def check_payloads(payloads: torch.Tensor, codec: Codec, cols: int, dtype: torch.dtype):
    """Refuse tensors that cannot be payloads of `codec`.

    Raises:
        ValueError: not uint8 of shape [ranks, rows, payload_bytes(cols)], no ranks, or a `dtype` that values do not
            decode to.
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


def check_out(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    """Refuse an `out` that the result does not fit into.

    Raises:
        ValueError: another shape, type or device, rows that are not contiguous, or a view with a pending negation.
    """
    if out.is_neg():
        raise ValueError("out is a view with a pending negation: give a tensor whose memory holds its values")
    if out.shape != shape or out.dtype != dtype or out.device != device or (out.numel() and out.stride(1) != 1):
        raise ValueError(
            f"out must be {dtype} {list(shape)} on {device} with contiguous rows, "
            f"not {out.dtype} {list(out.shape)} with strides {list(out.stride())} on {out.device}"
        )
