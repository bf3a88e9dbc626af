"""Streams of entropy-coded rows: codes, planes and records to bits, and back.

Two streams of a pair run towards each other, so that several are decoded at a time without offsets.

Hazard: a broken payload reads as some row, and nothing outside of the payload is read.

Source: our own.
"""

import torch

from flashcomm.codecs import bits as planes
from flashcomm.codecs import groups
from flashcomm.codecs.entropy_layout import (
    EDGES_ALL,
    LADDER,
    NAN,
    PEEK,
    RAW,
    constants,
    layout,
    plane_bits,
    raw_of,
    runs_of,
    split,
)
from flashcomm.codecs.entropy_rate import choose


def write(x: torch.Tensor, size: int) -> torch.Tensor:
    """fp32 [T, H] -> payloads of `size` bytes, uint8 [T, size]."""
    rows, cols = x.shape
    c, shape = constants(x.device), layout(cols, size)
    k, coded, reach = choose(x, size)
    raw = raw_of(coded.table)
    number, lowest = split(coded.q, raw)
    base = coded.table - 4 * raw
    limit = c.limits[base][:, None]
    lengths, words = (t[base].gather(1, number.clamp_max(64)) for t in (c.lengths, c.words))
    escapes = number >= limit
    # One place more, for what is not there.
    end = 8 * size
    bit = torch.zeros(rows, end + 1, dtype=torch.uint8, device=x.device)

    def put(first, direction, n, value, high_first):
        """Write the n lowest bits of each value, one after the other from `first` on."""
        for i in range(PEEK if high_first else 24):
            here = value >> ((n - 1 - i).clamp_min(0) if high_first else i) & 1
            at = torch.where(i < n, first + direction * i, end)
            bit.scatter_(1, at, here.to(torch.uint8))

    plane_bytes = (plane_bits(cols, x.device)[raw] >> 3)[:, None]
    front = 8 * (shape.header + plane_bytes)
    runs = runs_of(cols, shape)
    total = [lengths[:, a:b].sum(1, keepdim=True) for a, b in runs]
    records = escapes.sum(1, keepdim=True) * coded.width[:, None]
    middle = front + (total[0] + total[1] + records + 7 >> 3 << 3) if len(runs) > 2 else torch.full_like(front, end)
    for i, (a, b) in enumerate(runs):
        offset = lengths[:, a:b].cumsum(1) - lengths[:, a:b]
        start = (front, middle - 1, middle, torch.full_like(front, end - 1))[i]
        direction = 1 - 2 * (i % 2)
        put(start + direction * offset, direction, lengths[:, a:b], words[:, a:b], True)
    order = escapes.cumsum(1) - 1
    width = torch.where(escapes, coded.width[:, None], 0)
    put(front + total[0] + order * width, 1, width, number - limit, False)
    payload = (
        bit[:, :end].unflatten(1, (size, 8)).to(torch.int32) << torch.arange(8, dtype=torch.int32, device=x.device)
    ).sum(2)
    zero = (coded.q == 0).all(1)
    head = k | coded.table << 12 | coded.width << 18
    payload[:, :3] = groups.to_bytes(head[:, None], 3)
    if len(runs) > 2:
        payload[:, 3 : shape.header] = groups.to_bytes(middle - front >> 3, shape.header - 3)
    length = planes.code_bytes(cols, 1)
    for n in range(RAW):
        packed = planes.pack(lowest >> n & 1, 1)
        part = payload[:, shape.header + n * length :][:, :length]
        part.copy_(torch.where((raw > n)[:, None], packed[:, : part.shape[1]].to(part.dtype), part))
    payload = payload.masked_fill(zero[:, None] | reach.bad[:, None], 0)
    payload[:, :2] = torch.where(
        reach.bad[:, None], groups.to_bytes(torch.full_like(k, NAN)[:, None], 2), payload[:, :2]
    )
    return payload.to(torch.uint8)


def read(payload: torch.Tensor, cols: int) -> torch.Tensor:
    """uint8 [T, size] -> values, fp32 [T, cols]."""
    _rows, size = payload.shape
    c, shape = constants(payload.device), layout(cols, size)
    head = groups.from_bytes(payload[:, :3], 3)[:, 0].long()
    k, table, width = head & 0xFFF, (head >> 12 & 0x3F).clamp_max(len(EDGES_ALL)), head >> 18 & 0x1F
    raw = raw_of(table)
    base = table - 4 * raw
    plane_bytes = plane_bits(cols, payload.device)[raw] >> 3
    front = (shape.header + plane_bytes).clamp_max(size)
    runs = runs_of(cols, shape)
    bit = (payload[:, :, None].int() >> torch.arange(8, dtype=torch.int32, device=payload.device) & 1).flatten(1)
    middle = torch.full_like(front, size)
    if len(runs) > 2:
        pair = groups.from_bytes(payload[:, 3 : shape.header], shape.header - 3)[:, 0].long() & 0xFFFFFFFF
        middle = torch.minimum(front + pair, middle)
    number, behind = [], front
    for i, (a, b) in enumerate(runs):
        start = (front, middle, middle, torch.full_like(front, size))[i] * 8
        got, after = _stream(bit, start, i % 2 == 1, b - a, base)
        number.append(got)
        behind = after if i == 0 else behind
    number = torch.cat(number, 1)
    escapes = number == 64
    place = behind[:, None] + (escapes.cumsum(1) - 1) * width[:, None]
    excess = torch.zeros_like(number)
    bit = torch.nn.functional.pad(bit, (0, 1))
    for i in range(24):
        at = torch.where((i < width)[:, None] & (place + i < 8 * size), place + i, 8 * size)
        excess = excess | bit.gather(1, at.clamp(0, 8 * size)).long() << i
    number = torch.where(escapes, excess + c.limits[base][:, None], number)
    z = number >> 1 ^ -(number & 1)
    lowest = torch.zeros_like(z)
    length = planes.code_bytes(cols, 1)
    for n in range(RAW):
        packed = torch.nn.functional.pad(payload[:, shape.header + n * length :][:, :length], (0, length))[:, :length]
        lowest |= torch.where((raw > n)[:, None], planes.unpack(packed, cols, 1).long() << n, 0)
    q = (z << raw[:, None]) + lowest - ((1 << raw[:, None]) >> 1)
    value = q.float() * c.steps[k.clamp_max(LADDER)][:, None]
    value = value.masked_fill((k == 0)[:, None], 0.0)
    return value.masked_fill((k > LADDER)[:, None], float("nan"))


def _stream(
    bit: torch.Tensor, start: torch.Tensor, back: bool, count: int, base: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` codes of a stream from bit `start` of each row on, and the bit behind them.

    All places of a row are read at once: where the next code starts is known of each, so by doubling, after n rounds
    the first 2**n codes are.
    """
    c, (rows, end) = constants(bit.device), bit.shape
    place = torch.arange(end, dtype=torch.int64, device=bit.device)
    window = torch.zeros(rows, end, dtype=torch.int64, device=bit.device)
    if back:
        bit, start = bit.flip(1), end - start
    padded = torch.nn.functional.pad(bit, (0, PEEK))
    for i in range(PEEK):
        window |= padded[:, i : i + end].long() << PEEK - 1 - i
    code = c.place[base].gather(1, window)
    following = (place + c.lengths[base].gather(1, code)).clamp_max(end - 1)
    at = start.clamp(0, end - 1)[:, None]
    while at.shape[1] < count:
        at = torch.cat([at, following.gather(1, at)], 1)
        following = following.gather(1, following)
    at = at[:, :count]
    got = code.gather(1, at) if count else at
    after = at[:, -1] + c.lengths[base].gather(1, got[:, -1:])[:, 0] if count else start
    return got, after
