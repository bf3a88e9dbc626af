"""The formats as programs: which steps encode a row of values, and which decode a payload.

`append_encode` and `append_decode` add the steps of one codec to a program; a codec of a new class registers one
function with each. What a step does to a row is in `ops`.

Hazard: nothing here checks its arguments; `flashcomm.kernels.verbs` does.

Source: our own.
"""

from dataclasses import replace
from functools import lru_cache, singledispatch

import numpy as np
import torch

from flashcomm.codecs import bits as planes
from flashcomm.codecs import groups
from flashcomm.codecs.affine import Affine
from flashcomm.codecs.base import Codec
from flashcomm.codecs.blocks import Block
from flashcomm.codecs.calibrated import Features, Keep, Static
from flashcomm.codecs.cast import Cast
from flashcomm.codecs.entropy import Entropy
from flashcomm.codecs.hadamard import Hadamard
from flashcomm.codecs.lossless import LAYOUTS, Lossless
from flashcomm.codecs.peaks import BLOCK, Peaks, levels, reach, table
from flashcomm.codecs.spike import Spike
from flashcomm.codecs.stochastic import Stochastic
from flashcomm.kernels.cpu import huffman, ops, steps
from flashcomm.kernels.cpu.ops import BF16, FP16, FP32, PAIRS
from flashcomm.kernels.cpu.program import ADDING, KINDS, ROOM, SUMS, Operand, Program, Row


@singledispatch
def append_encode(codec: Codec, p: Program, x: Row, target: Operand) -> None:
    """Append the steps that encode the row `x` into the payload at `target`."""
    raise NotImplementedError(f"no CPU kernel for {codec}")


@singledispatch
def append_decode(codec: Codec, p: Program, source: Operand, y: Row) -> None:
    """Append the steps that decode the payload at `source` into `y`, or add it to `y` if `y` is the sums."""
    raise NotImplementedError(f"no CPU kernel for {codec}")


@append_encode.register
def _encode_cast(codec: Cast, p: Program, x: Row, target: Operand):
    if x.kind == BF16 and codec.wire == torch.bfloat16 and p.cols % 32 == 0:
        p.add(ops.clean_bf16, x.at, p.cols, target)
        return
    row = x if x.kind == FP32 else steps.wide(p, x)
    p.add(ops.narrow, row.at, p.cols, target, KINDS[codec.wire], 1)


@append_decode.register
def _decode_cast(codec: Cast, p: Program, source: Operand, y: Row):
    steps.convert(p, source, KINDS[codec.wire], y)


@append_encode.register
def _encode_affine(codec: Affine, p: Program, x: Row, target: Operand, noise: Operand | None = None):
    group, count = min(codec.group, p.cols), groups.count(p.cols, codec.group)
    x = x if x.kind == PAIRS else steps.readable(p, x, group)
    low, high = steps.ranges(p, x, group)
    zero, inverse, flag, meta = (p.array() for _ in range(4))
    last, meta_bytes = steps.bits(codec.last), (2 if codec.symmetric else 4) * count
    p.add(ops.affine_scales, low, high, count, codec.symmetric, last, zero, inverse, flag, meta)
    p.add(ops.copy_bytes, meta, meta_bytes, target + planes.code_bytes(p.cols, codec.bits))
    if x.kind == PAIRS:
        p.add(ops.quantise_pairs, x.at, p.cols, group, zero, inverse, codec.bits, x.ahead, target)
        return
    unit, (zeros, inverses) = steps.spread(p, x.kind, group, zero, inverse)
    codes = target if codec.bits == 8 and p.cols % 16 == 0 else p.array()
    if noise:
        p.add(ops.quantise_dithered, x.at, p.cols, unit, zeros, inverses, last, noise, codes)
    else:
        p.add(ops.quantise, x.at, x.kind, p.cols, unit, zeros, inverses, 0, codes)
    p.add(ops.forget, flag, inverse, p.cols, group, codes)
    if codes is not target:
        steps.pack(p, codes, p.cols, codec.bits, target)


@append_decode.register
def _decode_affine(codec: Affine, p: Program, source: Operand, y: Row):
    group, count = min(codec.group, p.cols), groups.count(p.cols, codec.group)
    meta, zero, scale = (p.array() for _ in range(3))
    p.add(ops.copy_bytes, source + planes.code_bytes(p.cols, codec.bits), (2 if codec.symmetric else 4) * count, meta)
    p.add(ops.affine_meta, meta, count, codec.symmetric, steps.bits(codec.last), zero, scale)
    codes = steps.unpack(p, source, p.cols, codec.bits)
    row = steps.writable(p, y, group)
    unit, (scales, zeros) = steps.spread(p, row.kind, group, scale, zero)
    adding = ADDING if row.at == SUMS else y.plus
    p.add(ops.dequantise, codes, p.cols, unit, scales, zeros, adding, row.at, row.kind)
    steps.deliver(p, row, y)


@append_encode.register
def _encode_block(codec: Block, p: Program, x: Row, target: Operand, noise: Operand | None = None):
    group, count = min(codec.group, p.cols), groups.count(p.cols, codec.group)
    element, _ = codec.parts
    x = steps.readable(p, x, group)
    amax = steps.magnitudes(p, x, group)
    inverse, flag, meta = (p.array() for _ in range(3))
    behind = target + planes.code_bytes(p.cols, element.bits)
    operands = (amax, count, steps.bits(codec.limit), inverse, flag, meta)
    if codec.scale == "e8m0":
        p.add(ops.scales_e8m0, *operands)
        p.add(ops.copy_bytes, meta, count, behind)
    elif codec.scale == "fp32":
        p.add(ops.scales_fp32, *operands)
        p.add(ops.copy_bytes, meta, 4 * count, behind)
    elif codec.scale == "e4m3":
        p.add(ops.scales_e4m3, *operands, behind + count)
        p.add(ops.copy_bytes, meta, count, behind)
    else:
        p.add(ops.scales_e5m0, *operands, behind + planes.code_bytes(count, 5))
        steps.pack(p, meta, count, 5, behind)
    unit, (inverses,) = steps.spread(p, x.kind, group, inverse)
    codes = target if element.bits == 8 and p.cols % 16 == 0 else p.array()
    form = (element.mantissa, element.lowest, element.last)
    if noise:
        p.add(ops.round_floats_dithered, x.at, p.cols, unit, inverses, *form, noise, codes)
    else:
        p.add(ops.round_floats, x.at, x.kind, p.cols, unit, inverses, element.bits, *form, codes)
    p.add(ops.forget, flag, inverse, p.cols, group, codes)
    if codes is not target:
        steps.pack(p, codes, p.cols, element.bits, target)


@append_decode.register
def _decode_block(codec: Block, p: Program, source: Operand, y: Row):
    group, count = min(codec.group, p.cols), groups.count(p.cols, codec.group)
    element, _ = codec.parts
    behind = source + planes.code_bytes(p.cols, element.bits)
    meta, scale = p.array(), p.array()
    if codec.scale == "e5m0":
        below = steps.unpack(p, behind, count, 5)
        p.add(ops.meta_e5m0, below, behind + planes.code_bytes(count, 5), count, scale)
    elif codec.scale == "fp32":
        p.add(ops.copy_bytes, behind, 4 * count, scale)
    else:
        p.add(ops.copy_bytes, behind, count, meta)
        if codec.scale == "e8m0":
            p.add(ops.meta_e8m0, meta, count, scale)
        else:
            p.add(ops.meta_e4m3, meta, behind + count, count, scale)
    codes = steps.unpack(p, source, p.cols, element.bits)
    row = steps.writable(p, y, group)
    unit, (scales,) = steps.spread(p, row.kind, group, scale)
    form = (element.bits, element.mantissa, element.lowest, ADDING if row.at == SUMS else 0)
    p.add(ops.read_floats, codes, p.cols, unit, scales, *form, row.at, row.kind)
    steps.deliver(p, row, y)


@append_encode.register
def _encode_stochastic(codec: Stochastic, p: Program, x: Row, target: Operand):
    x, noise = steps.wide(p, x), p.array()
    p.add(ops.dither, x.at, p.cols, codec.group, noise)
    if isinstance(codec.base, Affine):
        _encode_affine(codec.base, p, x, target, noise)
    else:
        _encode_block(codec.base, p, x, target, noise)


@append_decode.register
def _decode_stochastic(codec: Stochastic, p: Program, source: Operand, y: Row):
    append_decode(codec.base, p, source, y)


@append_encode.register
def _encode_spike(codec: Spike, p: Program, x: Row, target: Operand):
    base, group, count = codec.base, min(codec.group, p.cols), groups.count(p.cols, codec.group)
    places, zero, inverse, flag, spikes, meta, codes = (p.array() for _ in range(7))
    if x.kind == BF16 and group % 32 == p.cols % group == 0:
        low, high = steps.ranges(p, x, group)
        a, b, least, most = (p.array() for _ in range(4))
        p.add(ops.find_spikes_bf16, x.at, p.cols, group, places, low, high, least, most)
        p.add(ops.ranges_bf16, least, most, count, 1, a, b)
    else:
        x = steps.wide(p, x)
        low, high, a, b = (p.array() for _ in range(4))
        if group % 16 == 0:
            p.add(ops.shrink_spikes, x.at, p.cols, group, low, a, high, b)
            p.add(ops.two_smallest, low, a, p.cols // group)
            p.add(ops.two_largest, high, b, p.cols // group)
        p.add(ops.find_spikes, x.at, p.cols, group, places, low, high, a, b)
    form = (count, base.bits, base.symmetric)
    p.add(ops.spike_scales, low, high, a, b, *form, zero, inverse, flag, spikes, meta)
    unit, (zeros, inverses) = steps.spread(p, x.kind, group, zero, inverse)
    p.add(ops.quantise, x.at, x.kind, p.cols, unit, zeros, inverses, steps.bits(base.last), codes)
    p.add(ops.forget, flag, inverse, p.cols, group, codes)
    sections = codec.sections(p.cols)
    steps.pack(p, codes, p.cols, base.bits, target)
    p.add(ops.copy_bytes, spikes, sections[1], target + sections[0])
    p.add(ops.copy_bytes, meta, sections[2], target + sum(sections[:2]))
    p.add(ops.copy_bytes, meta + count + 16, sections[3], target + sum(sections[:3]))
    steps.pack(p, places, 2 * count, codec.place_bits, target + sum(sections[:4]))


@append_decode.register
def _decode_spike(codec: Spike, p: Program, source: Operand, y: Row):
    base, group, count = codec.base, min(codec.group, p.cols), groups.count(p.cols, codec.group)
    spikes, scale_codes, centres, zero, scale, low, high = (p.array() for _ in range(7))
    sections = codec.sections(p.cols)
    for i, array in ((1, spikes), (2, scale_codes), (3, centres)):
        p.add(ops.copy_bytes, source + sum(sections[:i]), sections[i], array)
    form = (count, base.bits, base.symmetric)
    p.add(ops.spike_meta, spikes, scale_codes, centres, *form, zero, scale, low, high)
    codes = steps.unpack(p, source, p.cols, base.bits)
    # Spikes replace values, so they must be in place before anything is added to a sum.
    row = p.row() if y.at == SUMS else steps.writable(p, y, group)
    unit, (scales, zeros) = steps.spread(p, row.kind, group, scale, zero)
    p.add(ops.dequantise, codes, p.cols, unit, scales, zeros, 0, row.at, row.kind)
    places = steps.unpack(p, source + sum(sections[:4]), 2 * count, codec.place_bits)
    p.add(ops.put_spikes, places, low, high, p.cols, group, row.at, row.kind)
    steps.deliver(p, row, y)


def _in_registers(codec: Hadamard, cols: int) -> int:
    """Number of a row's first values whose groups are transformed in registers, 128 values at a time."""
    return cols // 128 * 128 if codec.group in (32, 64, 128) and not codec.adaptive else 0


@append_encode.register
def _encode_hadamard(codec: Hadamard, p: Program, x: Row, target: Operand):
    count, row, alpha, done = groups.count(p.cols, codec.group), p.row(), 0, _in_registers(codec, p.cols)
    ahead, low, high, width = x.at + p.cols * (2 if x.kind != FP32 else 4), p.array(), p.array(), 4
    if done == p.cols and x.kind == BF16 and isinstance(codec.base, Affine):
        # Two bf16 share a word, so even and odd values are apart at no cost, and stay so until codes are packed.
        least, most = p.array(), p.array()
        p.add(ops.hadamard_pairs, x.at, p.cols, codec.group, steps.bits(1.0 / codec.group), row.at, least, most)
        p.add(ops.ranges_fp32, least, most, row.at, p.cols, codec.group, low, high)
        pairs = replace(row, kind=PAIRS, ranges=(low, high), ahead=ahead + p.cols * 3 // 2)
        append_encode(codec.base, p, pairs, target)
        return
    if done:
        x = steps.wide(p, x) if x.kind == FP16 else x
        least, most, width = p.array(), p.array(), 2 if x.kind == BF16 else 4
        p.add(ops.hadamard_ranges, x.at, x.kind, done, codec.group, steps.bits(1.0 / codec.group), row.at, least, most)
        p.add(ops.ranges_fp32, least, most, row.at, done, codec.group, low, high)
        row = replace(row, ranges=(low, high))
    if done < p.cols:
        p.add(ops.widen, x.at + done * width, x.kind, p.cols - done, row.at + done * 4)
    if codec.adaptive:
        alpha = p.array()
        p.add(ops.adapt, row.at, p.cols, codec.group, alpha)
        p.add(ops.copy_bytes, alpha, 4 * count, target + codec.base.payload_bytes(p.cols))
    if done < p.cols:
        steps.transform(p, row, codec.group, alpha, ahead, forward=True, first=done // codec.group)
    if 0 < done < p.cols:
        first, least, most = row.at + done * 4, p.array(), p.array()
        if p.cols - done >= codec.group:
            p.add(ops.shrink_fp32, first, p.cols - done, codec.group, least, most)
        before = done // codec.group * 4
        p.add(ops.ranges_fp32, least, most, first, p.cols - done, codec.group, low + before, high + before)
    append_encode(codec.base, p, row, target)


@append_decode.register
def _decode_hadamard(codec: Hadamard, p: Program, source: Operand, y: Row):
    count, alpha, done = groups.count(p.cols, codec.group), 0, _in_registers(codec, p.cols)
    row = steps.workplace(p, y)
    append_decode(codec.base, p, source, row)
    if done == p.cols and y.kind == BF16:
        p.add(ops.hadamard_to_bf16, row.at, p.cols, codec.group, y.at)
        return
    if codec.adaptive:
        alpha = p.array()
        p.add(ops.copy_bytes, source + codec.base.payload_bytes(p.cols), 4 * count, alpha)
        p.add(ops.invert, alpha, count)
    steps.transform(p, row, codec.group, alpha, 0 if y.at == SUMS else y.at, forward=False)
    steps.deliver(p, row, y, clean=True)


@append_encode.register
def _encode_keep(codec: Keep, p: Program, x: Row, target: Operand):
    codec.check(p.cols)
    x = x if x.kind == BF16 else steps.wide(p, x)
    rest, features = Row(p.array(), x.kind, True), np.array(codec.kept, np.int64)
    sent = target + codec.base.payload_bytes(p.cols - len(features))
    p.add(ops.take_out, x.at, x.kind, p.cols, p.constant(features), len(features), rest.at, sent)
    with p.shortened(len(features)):
        append_encode(codec.base, p, rest, target)


@append_decode.register
def _decode_keep(codec: Keep, p: Program, source: Operand, y: Row):
    codec.check(p.cols)
    row = y if y.kind == BF16 else steps.workplace(p, y)
    rest, features = Row(p.array(), row.kind, True), np.array(codec.kept, np.int64)
    with p.shortened(len(features)):
        append_decode(codec.base, p, source, rest)
    sent = source + codec.base.payload_bytes(p.cols - len(features))
    p.add(ops.put_back, rest.at, sent, p.constant(features), len(features), p.cols, row.at, row.kind)
    steps.deliver(p, row, y)


@lru_cache(maxsize=4096)
def _tables(features: Features, bits: int) -> np.ndarray:
    """The scales of all ranks and of the sum; each row has room for one more vector."""
    return np.pad(Static(bits, features).tables().numpy(), ((0, 0), (0, 16)))


def _features(codec: Static) -> Features:
    assert codec.features is not None
    return codec.features


@append_encode.register
def _encode_static(codec: Static, p: Program, x: Row, target: Operand):
    codec.check(p.cols)
    x, codes = steps.wide(p, x), p.array()
    scale = _tables(_features(codec), codec.bits)[codec.table]
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    operands = p.constant(scale * np.float32(-codec.last / 2)), p.constant(inverse)
    p.add(ops.quantise, x.at, FP32, p.cols, 1, *operands, steps.bits(codec.last), codes)
    p.add(ops.mark_nan, x.at, p.cols, int(codec.last) + 1, codes)
    steps.pack(p, codes, p.cols, codec.bits, target)
    p.add(ops.put_byte, codec.table, target + planes.code_bytes(p.cols, codec.bits))


@append_decode.register
def _decode_static(codec: Static, p: Program, source: Operand, y: Row):
    codec.check(p.cols)
    tables, scale, zero = _tables(_features(codec), codec.bits), p.array(), p.array()
    number = source + planes.code_bytes(p.cols, codec.bits)
    factor = steps.bits(-codec.last / 2)
    p.add(ops.pick_table, number, p.constant(tables), len(tables), tables.strides[0], factor, p.cols, scale, zero)
    codes = steps.unpack(p, source, p.cols, codec.bits)
    row = steps.workplace(p, y)
    p.add(ops.dequantise, codes, p.cols, 1, scale, zero, 0, row.at, FP32)
    p.add(ops.unmark_nan, codes, p.cols, int(codec.last) + 1, row.at)
    steps.deliver(p, row, y)


@append_encode.register
def _encode_entropy(codec: Entropy, p: Program, x: Row, target: Operand):
    row, shape, book = p.row(), p.constant(huffman.shape(p.cols, codec.payload_bytes(p.cols))), huffman.book()
    codes, numbers, state, work, one, two = (p.array() for _ in range(6))
    p.add(ops.widen, x.at, x.kind, p.cols, row.at)
    p.add(ops.plan_row, row.at, shape, book, codes, numbers, state)
    p.add(ops.write_row, shape, book, codes, state, numbers, work, one, two + 4 * p.cols, target)


@append_decode.register
def _decode_entropy(codec: Entropy, p: Program, source: Operand, y: Row):
    shape, book = p.constant(huffman.shape(p.cols, codec.payload_bytes(p.cols))), huffman.book()
    copy, numbers, lowest, state, escapes, _ = (p.array() for _ in range(6))
    p.add(ops.read_row, source, shape, book, copy, numbers, lowest, state)
    row = steps.writable(p, y, 32)
    adding = ADDING if row.at == SUMS else y.plus
    p.add(ops.read_codes, shape, book, copy, numbers, lowest, state, escapes, adding, row.at, row.kind)
    steps.deliver(p, row, y)


@append_encode.register
def _encode_lossless(codec: Lossless, p: Program, x: Row, target: Operand):
    kind, at = KINDS[codec.wire], x.at
    if x.kind != kind:
        row, at = steps.wide(p, x), p.array()
        p.add(ops.narrow, row.at, p.cols, at, kind, 1)
    sizes = p.cols, LAYOUTS[codec.wire].mantissa, codec.payload_bytes(p.cols)
    p.add(ops.pack_row, at, *sizes, *(p.array() for _ in range(4)), target)


@append_decode.register
def _decode_lossless(codec: Lossless, p: Program, source: Operand, y: Row):
    kind = KINDS[codec.wire]
    at = y.at if y.kind == kind and not y.plus else p.array()
    sizes = p.cols, LAYOUTS[codec.wire].mantissa, codec.payload_bytes(p.cols)
    p.add(ops.unpack_row, source, *sizes, *(p.array() for _ in range(3)), at)
    if at is not y.at:
        steps.convert(p, at, kind, y)


@append_encode.register
def _encode_peaks(codec: Peaks, p: Program, x: Row, target: Operand):
    row, count, sections = p.row(), codec.count(p.cols), codec.sections(p.cols)
    work, best, flag, inverse, places, codes = (p.array() for _ in range(6))
    least, most, stride = p.array(), p.array(), count + ROOM
    scale, behind = target + sections[0], target + sum(sections[:3])
    p.add(ops.widen, x.at, x.kind, p.cols, row.at)
    p.add(ops.take_peaks, row.at, p.cols, count, work, best, flag, scale + 2, places, stride)
    whole = p.cols // 128 * 128
    if whole:
        p.add(ops.hadamard_ranges, row.at, FP32, whole, BLOCK, steps.bits(1 / BLOCK), row.at, least, most)
    if whole < p.cols:
        steps.transform(p, row, BLOCK, 0, 0, forward=True, first=whole // BLOCK)
    p.add(ops.level_scale, row.at, p.cols, steps.bits(reach(codec.bits)), flag, inverse, scale)
    half = 2 ** (codec.bits - 1)
    known = p.constant(np.array([half + level for level in table(codec.bits)], np.int32))
    p.add(ops.level_codes, row.at, p.cols, inverse, known, codec.bits, flag, codes)
    steps.pack(p, codes, p.cols, codec.bits, target)
    for i, width in enumerate(codec.place_widths(p.cols)):
        steps.pack(p, places + i * stride, count, width, behind)
        behind = behind + planes.code_bytes(count, width)


@append_decode.register
def _decode_peaks(codec: Peaks, p: Program, source: Operand, y: Row):
    count, sections, places = codec.count(p.cols), codec.sections(p.cols), p.array()
    scale, behind, stride = source + sections[0], source + sum(sections[:3]), count + ROOM
    widths = codec.place_widths(p.cols)
    for i, width in enumerate(widths):
        p.add(ops.copy_bytes, steps.unpack(p, behind, count, width), count, places + i * stride)
        behind = behind + planes.code_bytes(count, width)
    codes, direct = steps.unpack(p, source, p.cols, codec.bits), y.kind == BF16 and p.cols % 128 == 0
    row = p.row() if direct else steps.workplace(p, y)
    p.add(ops.level_values, codes, p.cols, p.constant(np.array(levels(codec.bits), np.float32)), scale, row.at)
    if direct:
        p.add(ops.hadamard_to_bf16, row.at, p.cols, BLOCK, y.at)
        row = y
    else:
        steps.transform(p, row, BLOCK, 0, 0 if y.at == SUMS else y.at, forward=False)
    p.add(ops.put_peaks, scale + 2, count, places, stride, len(widths), p.cols, scale, row.at, row.kind)
    steps.deliver(p, row, y, clean=True)


def supports(codec: Codec) -> bool:
    """Whether `codec` and every codec that it wraps have steps."""
    # By its very type: a subclass may mean other bytes.
    return type(codec) in append_encode.registry and (not isinstance(codec, Hadamard | Keep) or supports(codec.base))
