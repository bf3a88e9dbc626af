"""The kernels that a server needs, loaded before it serves; on GPUs each is called once, so that none is compiled then.

A kernel is compiled for two formats, a length of rows, and whether addresses and distances are multiples of 16 bytes. A
payload's are, for all numbers of rows, if the bytes of a row are. If not, they are for some numbers of rows and not for
others, a single row has no distance to another, and each kind is a variant.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch

from flashcomm import codecs
from flashcomm.codecs import Codec, Plain
from flashcomm.kernels import eager, verbs
from flashcomm.kernels.routes import DECODED_ONLY, any_missing, load

_ALIGNED = 16


def warm_up(
    codec: "str | Codec" = "int8g128",
    hidden: int | None = None,
    *,
    device: "str | torch.device" = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> list[str]:
    """Load what `codec` needs on a device, so that no call compiles while a server serves.

    On the CPU the first time on a machine compiles it: two to four seconds, and the log says so. On a GPU this compiles
    every kernel of the collectives on rows of `hidden` values: three in Triton and four in CUDA C++ for most sizes, a
    second or less for each, whatever the number of ranks and of tokens; of rows whose payload is no multiple of 16
    bytes, up to sixteen.

    Args:
        codec: wire format, or a pair.
        hidden: values of a token; only a GPU needs it.
        device: ``cpu`` or a GPU.
        dtype: of the values; only a GPU needs it.

    Returns:
        The kernels of a GPU, one for each call that was made; none on the CPU, or where the specification serves.

    Raises:
        ValueError: a GPU without `hidden`.
    """
    codec, device = codecs.parse(codec), torch.device(device)
    if device.type == "cpu":
        load(codec, "cpu")
        return []
    if not hidden:
        raise ValueError("kernels of GPUs are compiled for a length of rows: give hidden, the values of a token")
    if any_missing(codec, device.type) not in (None, DECODED_ONLY) or isinstance(codec, Plain):
        return []
    return _call_all(codec, hidden, dtype, device)


def _call_all(codec: Codec, cols: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Call every kernel that collectives on rows of `cols` values in `codec` need; return what they are."""
    first, second = codec.formats
    widths = [cols * dtype.itemsize, *(single.payload_bytes(cols, dtype) for single in codec.formats)]
    made = []
    for rows in (1, 2) if any(width % _ALIGNED for width in widths) else (2,):
        for single in dict.fromkeys((first, second)):
            made += _encode(single, rows, cols, dtype, device)
            for ranks in (1, 2):
                made += _decode(single, ranks, rows, cols, dtype, device)
        made += _decode_sum_encode(first, second, rows, cols, device)
    return made


def _encode(codec: Codec, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    values, payloads = cols * dtype.itemsize, codec.payload_bytes(cols, dtype)
    for x, target in itertools.product(_places(1, rows, values, device), _places(1, rows, payloads, device)):
        eager.encode(x[0].view(dtype), codec, target[0])
        yield f"{codec}: encode"


def _decode(codec: Codec, ranks: int, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    payloads, values = codec.payload_bytes(cols, dtype), cols * dtype.itemsize
    for source, out in itertools.product(_places(ranks, rows, payloads, device), _places(1, rows, values, device)):
        eager.decode_sum(source, codec, cols, dtype, out[0].view(dtype))
        yield f"{codec}: {'decode' if ranks == 1 else 'decode_sum'}"


def _decode_sum_encode(first: Codec, second: Codec, rows: int, cols: int, device: torch.device) -> Iterator[str]:
    widths = [single.payload_bytes(cols, torch.float32) for single in (first, second)]
    sources, targets = (_places(ranks, rows, width, device) for ranks, width in zip((2, 1), widths, strict=True))
    for source, target in itertools.product(sources, targets):
        verbs.decode_sum_encode(source, first, second, cols=cols, out=target[0])
        yield f"{first} to {second}: decode_sum_encode"


def _places(ranks: int, rows: int, width: int, device: torch.device) -> Sequence[torch.Tensor]:
    """uint8 [ranks, rows, width], at each kind of address and with each kind of distance between ranks."""
    kinds = [0, width] if width % _ALIGNED else [0]
    storage = torch.zeros(2 * width + ranks * width * (_ALIGNED + 1), dtype=torch.uint8, device=device)
    return [
        storage[start:].as_strided((ranks, rows, width), (_ALIGNED * width + apart, width, 1))
        for start, apart in itertools.product(kinds, kinds if ranks > 1 else [0])
    ]
