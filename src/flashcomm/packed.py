"""Tensors as bytes that describe themselves: a file, or a message between programs that agreed on nothing before.

    header   32 bytes, below
    spec     the codec's spelling, ASCII
    dims     the leading dimensions, 8 bytes each, only where there are two or more of them
    padding  zeros up to a multiple of 16 bytes
    body     the rows that the codec encodes; those of codecs that vary (`Codec.varies`), one behind the other

    bytes    header; all numbers low byte first
    0-3      ab 66 63 0a
    4        version, 1
    5        dtype of the tensor: 0 bf16, 1 fp16, 2 fp32
    6        number of dimensions
    7        length of the spec
    8-15     length of the body
    16-23    rows: the product of the leading dimensions
    24-27    cols: values of the last dimension
    28-31    CRC-32 of everything else

The first byte is no ASCII and the fourth a line feed, so a transfer that takes bytes for text damages them visibly.

Whoever reads such bytes may have got them from anybody. So every length is compared with the bytes that are there
before anything is allocated, and the tensor must not be larger than the caller allows.

Source: our own; the CRC is that of zlib. `contrib/flashcomm.h` is a decoder in C.
"""

import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from flashcomm import codecs, kernels
from flashcomm.codecs import FLOAT_DTYPES, Codec

MAGIC = b"\xabfc\n"
VERSION = 1
MAX_BYTES = 1 << 34
"""Largest tensor that `unpack` makes unless told otherwise, in bytes."""
_FIXED = struct.Struct("<4sBBBBQQI")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _FIXED.size + _CRC.size
_ALIGN = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST = 255
"""Most dimensions, and most characters of a spelling."""
_LENGTH_BYTES = 4
"""Bytes of the length with which each row begins if a codec's rows vary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The description of a packed tensor.

    Args:
        codec: its wire format.
        dtype: of the tensor: bf16, fp16 or fp32.
        shape: of the tensor.
        body: place of the first byte of the rows.
        body_bytes: length of the rows.
    """

    codec: Codec
    dtype: torch.dtype
    shape: tuple[int, ...]
    body: int
    body_bytes: int

    @property
    def rows(self) -> int:
        """Rows of the codec: all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        """Values of a row."""
        return self.shape[-1] if self.shape else 1


def pack(x: torch.Tensor, codec: "str | Codec") -> bytes:
    """Encode a tensor into bytes that `unpack` needs nothing else to decode.

    Args:
        x: bf16, fp16 or fp32 of any shape, on any device; a row is its last dimension.
        codec: a codec or its spelling; one format, with a spelling that parses back.

    Returns:
        A header of 32 bytes, the spelling and the encoded rows.

    Raises:
        ValueError: another dtype, a codec of several formats or one that depends on a calibration, or a dimension of
            2**32 or more.

    >>> x = torch.arange(16.0)
    >>> data = pack(x, "int4g32")
    >>> len(data), data[32:39]
    (60, b'int4g32')
    >>> torch.equal(unpack(data), x)
    True
    """
    codec = codecs.parse(codec)
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"pack takes a tensor of bf16, fp16 or fp32, not {getattr(x, 'dtype', type(x))}")
    shape = tuple(x.shape)
    cols, rows = shape[-1] if shape else 1, math.prod(shape[:-1])
    if len(shape) > _MOST or cols >= 1 << 32:
        raise ValueError(f"a packed tensor has up to {_MOST} dimensions and fewer than 2**32 columns, not {shape}")
    codec.check(cols)
    payload = kernels.encode(x.detach().reshape(rows, cols), codec).cpu()
    if codec.varies and payload.numel():
        from flashcomm.transports import rows as varying

        payload = varying.pack(payload, payload)
    spec, dims = _spelling(codec), shape[:-1] if len(shape) > 2 else ()
    head = _FIXED.pack(MAGIC, VERSION, _DTYPES.index(x.dtype), len(shape), len(spec), payload.numel(), rows, cols)
    middle = spec + struct.pack(f"<{len(dims)}Q", *dims)
    middle += bytes(-(_HEADER_BYTES + len(middle)) % _ALIGN)
    body = payload.contiguous().view(-1).numpy().data
    crc = zlib.crc32(body, zlib.crc32(middle, zlib.crc32(head)))
    return b"".join((head, _CRC.pack(crc), middle, body))


def unpack(data: "bytes | bytearray | memoryview", *, max_bytes: int = MAX_BYTES) -> torch.Tensor:
    """Decode what `pack` returned.

    Args:
        data: all of its bytes, and no more.
        max_bytes: refuse a tensor that is larger; a few bytes can ask for many.

    Returns:
        The tensor, with the dtype and shape that were packed, in CPU memory; the values are those that the codec
        decodes to.

    Raises:
        ValueError: other bytes, a newer version, damage, a codec that is not installed, lengths that do not fit each
            other, or a tensor of more than `max_bytes`; nothing has been allocated then.

    >>> unpack(pack(torch.tensor([1.0, 2.0, 3.0]), "lossless"))
    tensor([1., 2., 3.])
    """
    head = read_header(data)
    codec, rows, cols = head.codec, head.rows, head.cols
    size = rows * cols * head.dtype.itemsize
    if size > max_bytes:
        raise ValueError(
            f"the tensor would take {size:,} bytes, and {max_bytes:,} are allowed: give max_bytes if you trust its "
            "source"
        )
    payload = torch.empty(rows, codec.payload_bytes(cols, head.dtype), dtype=torch.uint8, device="cpu")
    flat = payload.view(-1)
    flat[: head.body_bytes].numpy()[:] = np.frombuffer(data, np.uint8, head.body_bytes, head.body)
    if codec.varies and flat.numel():
        from flashcomm.transports import rows as varying

        if not varying.spread(payload, head.body_bytes):
            raise ValueError(f"damaged: rows of {codec} whose lengths do not add up to {head.body_bytes:,} bytes")
    return kernels.decode(payload, codec, cols=cols, dtype=head.dtype).view(head.shape)


def read_header(data: "bytes | bytearray | memoryview") -> Header:
    """Check and describe what `pack` returned, without decoding it.

    Args:
        data: all of its bytes.

    Raises:
        ValueError: as for `unpack`.

    >>> head = read_header(pack(torch.zeros(2, 3, 64, dtype=torch.float16), "mxfp4"))
    >>> str(head.codec), head.dtype, head.shape, head.body_bytes
    ('mxfp4', torch.float16, (2, 3, 64), 204)
    """
    data = memoryview(data).cast("B")
    if len(data) < _HEADER_BYTES or data[:4] != MAGIC:
        raise ValueError(f"not a packed tensor: {len(data):,} bytes that begin with {bytes(data[:4])!r}, not {MAGIC!r}")
    _, version, dtype, num_dims, spec_bytes, body_bytes, rows, cols = _FIXED.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"packed in version {version} of the format, and this flashcomm reads version {VERSION}")
    leading = num_dims - 1 if num_dims > 2 else 0
    end = _HEADER_BYTES + spec_bytes + 8 * leading
    body = end + -end % _ALIGN
    if len(data) != body + body_bytes:
        raise ValueError(f"damaged: {len(data):,} bytes, where the header tells of {body + body_bytes:,}")
    crc = zlib.crc32(data[_HEADER_BYTES:], zlib.crc32(data[: _FIXED.size]))
    if _CRC.unpack_from(data, _FIXED.size)[0] != crc:
        raise ValueError("damaged: the checksum does not fit the bytes")
    # From here on only somebody who made the checksum can be wrong.
    if dtype >= len(_DTYPES):
        raise ValueError(f"unknown dtype {dtype} in a packed tensor. Known: 0 bf16, 1 fp16, 2 fp32")
    codec = _codec(bytes(data[_HEADER_BYTES:][:spec_bytes]))
    dims = struct.unpack_from(f"<{leading}Q", data, _HEADER_BYTES + spec_bytes)
    shape = (*dims, cols) if num_dims > 2 else (rows, cols)[2 - num_dims :]
    if math.prod(shape) != rows * cols or math.prod(shape[:-1]) != rows or (not shape and cols != 1):
        raise ValueError(f"{rows:,} rows of {cols:,} values are no tensor of shape {shape}")
    codec.check(cols)
    bound = rows * codec.payload_bytes(cols, _DTYPES[dtype])
    least = rows * _LENGTH_BYTES if codec.varies and cols else bound
    if not least <= body_bytes <= bound:
        raise ValueError(f"{rows:,} rows of {cols:,} values in {codec} take {bound:,} bytes, not {body_bytes:,}")
    return Header(codec=codec, dtype=_DTYPES[dtype], shape=shape, body=body, body_bytes=body_bytes)


def _spelling(codec: Codec) -> bytes:
    spec = str(codec)
    if codec.unbound or not codecs.parses_back(codec):
        raise ValueError(
            f"{spec} depends on more than its spelling, such as a calibration, so packed bytes cannot tell what "
            "decodes them: use a codec without one"
        )
    if len(spec) > _MOST or not spec.isascii():
        raise ValueError(f"the spelling of a packed codec is ASCII of up to {_MOST} characters, not {spec!r}")
    return spec.encode()


def _codec(spec: bytes) -> Codec:
    try:
        codec = codecs.parse(spec.decode("ascii"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{spec!r} is no spelling of a codec") from error
    if codec.unbound or len(set(codec.formats)) > 1:
        raise ValueError(f"{codec} is no single format that bytes alone can be decoded by")
    return codec
