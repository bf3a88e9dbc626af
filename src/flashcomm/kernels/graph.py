"""`encode` and `decode` as operators of torch, for compiled graphs.

`torch.compile` cannot look into kernels that are not torch's. It sees one operator, with the shape of its result and
nothing else. Hidden sizes become constants of the graph, numbers of rows need not.

Imported when a function is first compiled, because the compiler takes seconds to load. The operators call `eager`,
which knows nothing of graphs.
"""

from typing import Any

import torch

from flashcomm import codecs
from flashcomm.codecs import Codec
from flashcomm.kernels import eager
from flashcomm.kernels.arguments import check_payloads, check_values


def _name_in_graphs(self: Codec) -> str:
    try:
        return codecs.name_of(self)
    except AttributeError as error:
        # Torch makes the object when the graph runs, and passes one that has no attributes yet.
        raise ValueError(
            f"a compiled function makes a codec of class {type(self).__name__}, which the graph cannot name: give its "
            "spelling, such as codec='int4g32', or make the codec outside of the function"
        ) from error


# A function whose result is a constant of the graph takes strings. Before torch 2.13 only a method of an object that is
# no tensor can know that object, so this one is added to all codecs.
_name_of_spelling: Any = torch.compiler.assume_constant_result(codecs.name_of)
setattr(Codec, _name_in_graphs.__name__, torch.compiler.assume_constant_result(_name_in_graphs))


def name_of(codec: "str | Codec") -> str:
    """The string that stands for `codec` in the graph, see `codecs.name_of`."""
    if isinstance(codec, str):
        return _name_of_spelling(codec)
    # The graph is for this object alone: without it, torch before 2.13 would go on with the codec that it met first.
    id(codec)
    return codec._name_in_graphs()  # pyright: ignore[reportAttributeAccessIssue]


def encode(x: torch.Tensor, codec: "str | Codec", out: torch.Tensor | None) -> torch.Tensor:
    """Call `kernels.encode` in a graph."""
    return into(out, torch.ops.flashcomm.encode(x, name_of(codec)))


def decode(
    payload: torch.Tensor, codec: "str | Codec", cols: int, dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    """Call `kernels.decode` in a graph."""
    return into(out, torch.ops.flashcomm.decode(payload, name_of(codec), cols, dtype))


def into(out: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    """Copy `result` to `out` if there is one, since the operators themselves write to none of their arguments.

    Raises:
        ValueError: `out` is not like the result.
    """
    if out is None:
        return result
    if out.shape != result.shape or out.dtype != result.dtype or out.device != result.device:
        _refuse(out, result)
    return out.copy_(result)


def refuse_out_unlike_the_result(out: torch.Tensor, result: torch.Tensor):
    """Raise an error that says what `out` should be."""
    raise ValueError(
        f"out must be {result.dtype} {list(result.shape)} on {result.device}, "
        f"not {out.dtype} {list(out.shape)} on {out.device}"
    )


# With ``fullgraph=True`` torch prints its name. An error raised inside a graph would send the compiler into `encode`.
_refuse: Any = torch.compiler.disable(refuse_out_unlike_the_result)


@torch.library.custom_op("flashcomm::encode", mutates_args=())
def _encode(x: torch.Tensor, codec: str) -> torch.Tensor:
    return eager.encode(x, codecs.named(codec), None)


@_encode.register_fake
def _(x: torch.Tensor, codec: str) -> torch.Tensor:
    check_values(x, "encode")
    width = codecs.named(codec).payload_bytes(int(x.shape[1]), x.dtype)
    return x.new_empty(x.shape[0], width, dtype=torch.uint8)


@torch.library.custom_op("flashcomm::decode", mutates_args=())
def _decode(payload: torch.Tensor, codec: str, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return eager.decode_sum(payload[None], codecs.named(codec), cols, dtype, None)


@_decode.register_fake
def _(payload: torch.Tensor, codec: str, cols: int, dtype: torch.dtype) -> torch.Tensor:
    check_payloads(payload[None], codecs.named(codec), int(cols), dtype)
    return payload.new_empty(payload.shape[0], int(cols), dtype=dtype)
