"""Bit planes: codes of any width from 1 to 8 bits as whole bytes.

A width is split into planes of 4, 2 and 1 bits (8 is a plane of its own), lowest bits first: 7 = 4 + 2 + 1. Codes are
packed 128 at a time, whatever their groups. In a plane of width w the codes i, i + m, i + 2m, ... of a pack of n share
byte i, where m = ceil(n * w / 8); so a plane is written by a few shifts of contiguous runs, which vector units do at
memory speed, and neighbours never need to be separated.

Source: FlashCommunication V2 (arXiv 2508.03760), bit splitting; the packs and the order inside a byte are our own.
"""

import torch
import torch.nn.functional as F

PACK = 128
PLANES = {bits: tuple(w for w in (8, 4, 2, 1) if bits & w) for bits in range(1, 9)}


def code_bytes(n: int, bits: int) -> int:
    """Bytes that n codes take.

    >>> code_bytes(5, 3)  # two for the 2-bit plane, one for the 1-bit plane
    3
    """
    full, rest = divmod(n, PACK)
    return full * PACK * bits // 8 + sum((rest * width + 7) // 8 for width in PLANES[bits])


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., n] integer codes below 2**bits -> [..., code_bytes(n, bits)] uint8.

    >>> [hex(byte) for byte in pack(torch.tensor([1, 2, 3, 4]), 4)]  # codes 0 and 2 share byte 0
    ['0x31', '0x42']
    """
    full = codes.shape[-1] // PACK * PACK
    head = _pack(codes[..., :full].unflatten(-1, (-1, PACK)), bits).flatten(-2)
    return torch.cat([head, _pack(codes[..., full:], bits)], -1)


def unpack(packed: torch.Tensor, n: int, bits: int) -> torch.Tensor:
    """Inverse of `pack`: [..., code_bytes(n, bits)] uint8 -> [..., n] int32."""
    full, rest = divmod(n, PACK)
    cut = full * PACK * bits // 8
    head = _unpack(packed[..., :cut].unflatten(-1, (-1, PACK * bits // 8)), PACK, bits).flatten(-2)
    return torch.cat([head, _unpack(packed[..., cut:], rest, bits)], -1)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    n, shift, planes = codes.shape[-1], 0, []
    for width in PLANES[bits]:
        per_byte, m = 8 // width, (n * width + 7) // 8
        plane = F.pad((codes >> shift) & ((1 << width) - 1), (0, per_byte * m - n))
        slots = plane.unflatten(-1, (per_byte, m)).to(torch.int32)
        # Made on the device: a copy from the host would wait for the device.
        shifts = torch.arange(0, 8, width, dtype=torch.int32, device=codes.device)
        planes.append((slots << shifts[:, None]).sum(-2).to(torch.uint8))
        shift += width
    return torch.cat(planes, -1)


def _unpack(packed: torch.Tensor, n: int, bits: int) -> torch.Tensor:
    codes = torch.zeros(*packed.shape[:-1], n, dtype=torch.int32, device=packed.device)
    shift = start = 0
    for width in PLANES[bits]:
        m = (n * width + 7) // 8
        plane = packed[..., start : start + m].to(torch.int32)
        slots = [(plane >> (width * t)) & ((1 << width) - 1) for t in range(8 // width)]
        codes |= torch.cat(slots, -1)[..., :n] << shift
        shift, start = shift + width, start + m
    return codes
