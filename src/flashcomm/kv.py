"""Key/value caches as bytes that describe themselves: what a prefill sends to a decode, or a store keeps.

    header   32 bytes, below
    K        a packed tensor (`flashcomm.packed`), by channel or by token
    V        a packed tensor, by token

    by channel    [..., heads, channels, tokens]: a row is a channel over all tokens
    by token      [..., tokens, heads * channels]: a row is a token over all heads

    bytes    header; all numbers low byte first
    0-3      ab 6b 76 0a
    4        version, 1
    5        1 if K is by channel, 0 if by token
    6-7      heads
    8-15     length of K's packed tensor
    16-23    length of V's packed tensor
    24-27    0
    28-31    CRC-32 of bytes 0 to 27; each packed tensor has its own

Channels of K differ in magnitude, a few of them much, and keep it over all tokens. So a group of neighbours that share
a range, or exponents, is one of tokens in one channel, as in KIVI. `ec` and `nf` formats are an exception: a row of
theirs has one step and a fixed number of bits. By token the large channels of a row may take more bits than the small
ones; by channel every channel takes the same, which costs six times the KL (docs/negative-results.md has the figures).

Source: per-channel keys and per-token values are KIVI's (arXiv 2402.02750) and KVQuant's (arXiv 2401.18079); entropy
coding of caches is CacheGen's (arXiv 2310.07240). The bytes are our own.
"""

import struct
import zlib
from typing import NamedTuple

import torch

from flashcomm import codecs, packed
from flashcomm.codecs import Codec, Entropy, Peaks

MAGIC = b"\xabkv\n"
VERSION = 1
_FIXED = struct.Struct("<4sBBHQQI")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _FIXED.size + _CRC.size


class KV(NamedTuple):
    """Keys and values of the same tokens, of one layer or of several."""

    k: torch.Tensor
    """[..., heads, tokens, channels]."""
    v: torch.Tensor
    """[..., heads, tokens, channels]; its number of channels may be another."""


def encode(k: torch.Tensor, v: torch.Tensor, codec: "str | Codec" = "lossless") -> bytes:
    """Encode keys and values, such as those of a layer of transformers' ``DynamicCache``.

    Args:
        k: [..., heads, tokens, channels] bf16, fp16 or fp32, any strides, any device.
        v: the same but for the number of channels.
        codec: a codec or its spelling; a pair is K's codec and V's, such as ``int8g64:ec4``. ``lossless`` keeps every
            bit of bf16, ``lossless_fp16`` of fp16, ``none`` of any dtype.

    Returns:
        A header of 32 bytes and two packed tensors.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or what `flashcomm.pack` refuses.

    >>> k, v = torch.ones(2, 3, 4, dtype=torch.bfloat16), torch.zeros(2, 3, 6, dtype=torch.bfloat16)
    >>> data = encode(k, v, "int8:int4")
    >>> data[:8].hex(" "), [tuple(x.shape) for x in decode(data)]
    ('ab 6b 76 0a 01 01 02 00', [(2, 3, 4), (2, 3, 6)])
    >>> [torch.equal(old, new) for old, new in zip((k, v), decode(encode(k, v)))]
    [True, True]
    """
    of_k, of_v = _codecs(codec)
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or x.dim() < 3:
            raise ValueError(
                f"{name} is [..., heads, tokens, channels], not {getattr(x, 'shape', type(x))}: without heads, "
                "unsqueeze(-3)"
            )
    if k.shape[:-1] != v.shape[:-1] or k.dtype != v.dtype or k.device != v.device:
        raise ValueError(
            "k and v differ only in channels, the last dimension, and these differ in more: "
            f"{k.dtype} {tuple(k.shape)} on {k.device} and {v.dtype} {tuple(v.shape)} on {v.device}"
        )
    heads = k.shape[-3]
    if not 0 < heads < 1 << 16:
        raise ValueError(f"{heads:,} heads: 1 to 65,535 are allowed")
    by_channel = not isinstance(of_k, Entropy | Peaks)
    parts = packed.pack(k.mT if by_channel else _by_token(k), of_k), packed.pack(_by_token(v), of_v)
    head = _FIXED.pack(MAGIC, VERSION, by_channel, heads, *map(len, parts), 0)
    return b"".join((head, _CRC.pack(zlib.crc32(head)), *parts))


def decode(data: "bytes | bytearray | memoryview", *, max_bytes: int = packed.MAX_BYTES) -> KV:
    """Decode what `encode` returned.

    Args:
        data: all of its bytes, and no more.
        max_bytes: refuse tensors that are larger together; a few bytes can ask for many.

    Returns:
        K and V, with the dtype and shapes that were encoded, in CPU memory.

    Raises:
        ValueError: other bytes, a newer version, damage, lengths or shapes that do not fit each other, or tensors of
            more than `max_bytes`; nothing has been allocated then.
    """
    data = memoryview(data).cast("B")
    by_channel, heads, parts = _read_header(data)
    of_k, of_v = map(packed.read_header, parts)
    _check_shapes(of_k, of_v, heads, by_channel)
    size = (of_k.rows * of_k.cols + of_v.rows * of_v.cols) * of_k.dtype.itemsize
    if size > max_bytes:
        raise ValueError(
            f"K and V would take {size:,} bytes, and {max_bytes:,} are allowed: give max_bytes if you trust their "
            "source"
        )
    k, v = (packed.unpack(part, max_bytes=max_bytes) for part in parts)
    return KV(k.mT.contiguous() if by_channel else _by_head(k, heads), _by_head(v, heads))


def serialize(kv: torch.Tensor, codec: "str | Codec" = "lossless") -> bytes:
    """Encode a chunk of LMCache, as a ``Serializer`` would.

    Args:
        kv: [2, layers, tokens, features], LMCache's ``KV_2LTD``: K of all layers, then V; dtypes as for `encode`.
        codec: as for `encode`.

    Raises:
        ValueError: another shape, or what `encode` refuses.

    >>> chunk = torch.arange(48.0).view(2, 3, 2, 4)
    >>> torch.equal(deserialize(serialize(chunk, "none")), chunk)
    True
    """
    if not isinstance(kv, torch.Tensor) or kv.dim() != 4 or kv.shape[0] != 2:
        raise ValueError(f"a chunk is [2, layers, tokens, features], not {getattr(kv, 'shape', type(kv))}")
    # The features of all heads stand side by side, which is one head for us: its channels are theirs.
    k, v = kv.unsqueeze(-3)
    return encode(k, v, codec)


def deserialize(data: "bytes | bytearray | memoryview", *, max_bytes: int = packed.MAX_BYTES) -> torch.Tensor:
    """Decode what `serialize` returned; arguments and errors as for `decode`.

    Returns:
        [2, layers, tokens, features] in CPU memory.

    Raises:
        ValueError: K and V that are no chunk, such as those of a layer, too.
    """
    k, v = decode(data, max_bytes=max_bytes)
    if k.shape != v.shape or k.dim() != 4 or k.shape[1] != 1:
        raise ValueError(f"K {tuple(k.shape)} and V {tuple(v.shape)} are no chunk of LMCache: use decode")
    return torch.stack((k, v)).squeeze(-3)


def bits_per_value(data: "bytes | memoryview") -> float:
    """Bits that encoded keys and values take per value, headers included.

    >>> x = torch.zeros(1, 512, 64)
    >>> bits_per_value(encode(x, x, "none")), bits_per_value(encode(x, x, "int4g64"))
    (32.017578125, 4.517578125)
    """
    heads = [packed.read_header(part) for part in _read_header(memoryview(data).cast("B"))[2]]
    return 8 * len(data) / max(sum(head.rows * head.cols for head in heads), 1)


def _codecs(codec: "str | Codec") -> tuple[Codec, Codec]:
    """K's format and V's."""
    found = codecs.parse(codec)
    if len(found.formats) != 2:
        raise ValueError(f"{found} has {len(found.formats)} formats: give one, or K's and V's, such as int8g64:ec4")
    # The formats of a codec that is one format are that format twice.
    return found.formats[0], found.formats[1]


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """[..., heads, tokens, channels] -> [..., tokens, heads * channels]."""
    return x.transpose(-3, -2).flatten(-2)


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Inverse of `_by_token`."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2).contiguous()


def _read_header(data: memoryview) -> tuple[bool, int, tuple[memoryview, memoryview]]:
    """Check the header; returns whether K is by channel, the number of heads, and the packed tensors of K and V."""
    if len(data) < _HEADER_BYTES or data[:4] != MAGIC:
        raise ValueError(f"no keys and values: {len(data):,} bytes that begin with {bytes(data[:4])!r}, not {MAGIC!r}")
    _, version, by_channel, heads, k_bytes, v_bytes, zeros = _FIXED.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"keys and values in version {version} of the format, and this flashcomm reads {VERSION}")
    if _CRC.unpack_from(data, _FIXED.size)[0] != zlib.crc32(data[: _FIXED.size]) or by_channel > 1 or zeros:
        raise ValueError("damaged: the header of keys and values does not fit its checksum")
    if len(data) != _HEADER_BYTES + k_bytes + v_bytes:
        told = _HEADER_BYTES + k_bytes + v_bytes
        raise ValueError(f"damaged: {len(data):,} bytes of keys and values, where the header tells of {told:,}")
    body = data[_HEADER_BYTES:]
    return by_channel == 1, heads, (body[:k_bytes], body[k_bytes:])


def _check_shapes(k: packed.Header, v: packed.Header, heads: int, by_channel: bool):
    """Refuse tensors that `encode` never makes."""
    of_k = (*k.shape[:-3], k.shape[-1]) if by_channel else k.shape[:-1]
    whole = heads > 0 and v.cols % heads == 0 and (by_channel or k.cols % heads == 0)
    if by_channel:
        whole = whole and len(k.shape) >= 3 and k.shape[-3] == heads
    if not whole or len(v.shape) < 2 or k.dtype != v.dtype or of_k != v.shape[:-1]:
        raise ValueError(
            f"K of {k.dtype} {k.shape} and V of {v.dtype} {v.shape} are no keys and values of {heads} heads"
        )
