"""Rows without loss: every bit kept, lengths, the window, sums equal to those of ``bf16``, and memory."""

import ctypes
import mmap
import os
import platform
import subprocess
import sys

import pytest
import torch

import values
from flashcomm import kernels
from flashcomm.codecs import Cast, Lossless, decode_sum, decode_sum_encode, lossless, parse
from promises import same

WIRES = {"lossless": torch.bfloat16, "lossless_fp16": torch.float16}
COLS = (1, 2, 7, 11, 13, 63, 64, 65, 100, 256, 576, 1100)


def from_bits(patterns, wire):
    return torch.as_tensor(patterns).to(torch.int16).view(wire)


def rows(cols, wire):
    """Rows that are hard in some way, [T, cols]."""
    generator = torch.Generator().manual_seed(cols)
    normal = torch.randn(12, cols, generator=generator)
    normal[1, cols // 2] = 23_740.0
    normal[2] *= 1e-6
    normal[3] = normal[3] * 10.0 ** torch.randint(-4, 5, (cols,), generator=generator)
    normal[4, ::2] = 0
    normal[5] = normal[5] * (normal[5] > 1.5)
    normal[6] = -1.5
    normal[7] = torch.exp2(torch.arange(cols) % 8.0)
    normal[8] = torch.exp2(torch.arange(cols) % 15.0 - 7)
    normal[9] = 0
    normal[10] = -0.0
    normal[11] = float("nan")
    alternating = torch.zeros(3, cols, dtype=torch.int32)
    alternating[:, ::2] = 0x7FFF
    alternating[1, 1::2] = 0x3C01
    alternating[2, ::3] = 0x8001
    random = torch.randint(0, 65536, (6, cols), generator=generator)
    return torch.cat([normal.to(wire), from_bits(alternating, wire), from_bits(random, wire)])


def assert_every_bit_survives(codec, x):
    cols = x.shape[1]
    payload = codec.encode(x)
    assert same(kernels.encode(x, codec), payload), f"{codec} {list(x.shape)}: the kernel's bytes"
    length = codec.lengths(payload)
    assert (length >= 4).all() and (length <= codec.payload_bytes(cols)).all()
    behind = torch.arange(payload.shape[1]) >= length[:, None]
    assert not payload[behind].any()
    # What is not sent must not matter.
    payload[behind] = 0xAB
    assert same(codec.decode(payload, cols, x.dtype), x), f"{codec} {list(x.shape)}: the specification's values"
    assert same(kernels.decode(payload, codec, cols=cols, dtype=x.dtype), x), f"{codec} {list(x.shape)}: the kernel's"


@pytest.mark.parametrize("name", WIRES)
def test_every_pattern_survives_in_rows_of_any_length(name):
    codec, wire = parse(name), WIRES[name]
    patterns = torch.arange(65536)
    for cols in (1, 64, 100):
        assert_every_bit_survives(codec, from_bits(patterns[: 65536 // cols * cols].view(-1, cols), wire))
    # Each pattern among equal ones, whose exponent is the window's.
    assert_every_bit_survives(codec, from_bits(torch.where(torch.arange(17) == 5, patterns[:, None], 0x3C00), wire))


@pytest.mark.parametrize("name", WIRES)
def test_hard_rows_survive(name):
    for cols in COLS:
        assert_every_bit_survives(parse(name), rows(cols, WIRES[name]))


@pytest.mark.parametrize("name", WIRES)
def test_rows_do_not_depend_on_their_neighbours(name):
    codec, x = parse(name), rows(576, WIRES[name])
    assert same(kernels.encode(x, codec), torch.cat([codec.encode(row[None]) for row in x]))


def test_lengths():
    codec = parse("lossless")
    assert codec.varies and not parse("int8g128").varies
    for cols in (64, 65, 576):
        zeros, equal = torch.zeros(1, cols).bfloat16(), torch.full((1, cols), -1.5).bfloat16()
        random = from_bits(torch.arange(cols)[None] * 2654435761 % 65536, torch.bfloat16)
        packed = 5 + cols + 3 * -(-cols // 8)
        found = codec.lengths(torch.cat([codec.encode(x) for x in (zeros, equal, -zeros, random)])).tolist()
        assert found == [4, packed, packed, 4 + 2 * cols]
        equal[0, :3] = torch.tensor([1e-3, 1e3, float("nan")])
        assert codec.lengths(codec.encode(equal)).item() == packed + 3
    assert codec.payload_bytes(576) == 1156
    assert codec.payload_bytes(0) == 0
    assert codec.lengths(codec.encode(torch.zeros(3, 0))).tolist() == [0, 0, 0]
    assert parse("int8g128").lengths(torch.zeros(2, 34, dtype=torch.uint8)).tolist() == [34, 34]


def test_a_row_that_would_not_shrink_is_raw():
    codec, packed, raw = parse("lossless"), 5 + 64 + 3 * 8, 4 + 2 * 64
    for escapes in (raw - packed - 1, raw - packed):
        x = torch.ones(1, 64)
        # Half of them below the window, half above.
        x[0, :escapes] = torch.exp2(40 * (torch.arange(escapes) % 2).float() - 20)
        assert codec.lengths(codec.encode(x.bfloat16())).item() == packed + escapes
        assert_every_bit_survives(codec, x.bfloat16())
    assert packed + escapes == raw
    assert codec.encode(x.bfloat16())[0, 4:].view(torch.bfloat16).tolist() == x[0].tolist()


@pytest.mark.parametrize("name", WIRES)
def test_no_other_window_holds_more_than_half_of_a_row(name):
    """Against all windows, on rows whose best window is anywhere."""
    form = lossless.LAYOUTS[WIRES[name]]
    generator = torch.Generator().manual_seed(0)
    exponent = torch.randint(0, 1 << form.exponent, (300, 1), generator=generator)
    exponent = exponent + torch.randint(-6, 7, (300, 97), generator=generator)
    stray = torch.rand(300, 97, generator=generator) < torch.rand(300, 1, generator=generator)
    exponent = torch.where(stray, torch.randint(0, 1 << form.exponent, (300, 97), generator=generator), exponent)
    exponent = exponent.clamp(0, (1 << form.exponent) - 1)
    base = lossless._base(exponent.int())
    inside = ((exponent >= base) & (exponent < base + 7)).sum(1)
    best = torch.stack([((exponent >= b) & (exponent < b + 7)).sum(1) for b in range(256)]).amax(0)
    assert (best > 48).sum() > 50
    assert (inside == best)[best > 48].all()


@pytest.mark.parametrize(("name", "most"), [("lossless", 11.6), ("lossless_fp16", 14.6)])
@pytest.mark.parametrize("cols", [576, 4096])
def test_bits_of_rows_like_those_of_a_real_model(name, most, cols):
    """Features of different spread, tokens too, two outlier features, and one token far larger than others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, cols, generator=generator) * torch.exp(0.4 * torch.randn(cols, generator=generator))
    x *= torch.exp(0.5 * torch.randn(64, 1, generator=generator))
    x[:, [247, 507]] *= 60
    x[3] *= 1e3
    codec = parse(name)
    used = codec.lengths(kernels.encode(x.to(WIRES[name]), codec)).double().mean().item()
    assert most - 0.5 < 8 * used / cols <= most


@pytest.mark.parametrize("dtype", values.DTYPES)
def test_sums_have_the_bits_of_bf16(dtype):
    """Casts, NaN and Inf included, over one rank and several."""
    codec, cast = parse("lossless"), parse("bf16")
    for x in [*values.special(dtype).values(), values.every_pattern(dtype)]:
        cols, terms = x.shape[1], torch.stack([x, x.flip(0), x.flip(1)])
        for ranks in (2, 3):
            payloads = torch.stack([codec.encode(term) for term in terms[:ranks]])
            casts = torch.stack([cast.encode(term) for term in terms[:ranks]])
            for out in values.DTYPES:
                want = decode_sum(casts, cast, cols, out)
                assert same(decode_sum(payloads, codec, cols, out), want)
                assert same(kernels.decode_sum(payloads, codec, cols=cols, dtype=out), want)
            reduced = kernels.decode_sum_encode(payloads, codec, codec, cols=cols)
            assert same(reduced, decode_sum_encode(payloads, codec, codec, cols))
            want = cast.decode(decode_sum_encode(casts, cast, cast, cols), cols, torch.bfloat16)
            assert same(codec.decode(reduced, cols, torch.bfloat16), want)


def test_nan_payloads_survive_alone_and_are_one_nan_in_other_types():
    x = from_bits([[0x7F81, -0x7F, 0x7FC1, 0x3F80]], torch.bfloat16)
    codec = parse("lossless")
    payload = codec.encode(x)
    assert same(decode_sum(payload[None], codec, 4, torch.bfloat16), x)
    for dtype in (torch.float16, torch.float32):
        assert same(
            kernels.decode(payload, codec, cols=4, dtype=dtype),
            Cast(torch.bfloat16).decode(x.view(torch.uint8), 4, dtype),
        )
        # Tensors of another type are cast.
        assert same(
            codec.decode(codec.encode(x.to(dtype)), 4, torch.bfloat16),
            parse("bf16").decode(parse("bf16").encode(x.to(dtype)), 4, torch.bfloat16),
        )


def test_casts_are_bounded_by_their_step():
    x = torch.tensor([[1.0, 1 + 2.0**-9, 1e38, 3.4e38, 0.0, 1e-45, float("inf"), float("nan"), 7e4, 1e-7]])
    step = parse("lossless").step(x)[0].tolist()
    assert step[:3] == [2.0**-7, 2.0**-7, 2.0**119]
    assert step[4:6] == [2.0**-133] * 2
    assert [s != s for s in step] == [i in (3, 6, 7) for i in range(10)]
    assert parse("lossless").step(x.bfloat16())[0, :3].tolist() == [0, 0, 0]
    step = parse("lossless_fp16").step(x)[0].tolist()
    assert step[:2] == [2.0**-10] * 2
    assert step[4:6] == [2.0**-24] * 2
    assert [s != s for s in step] == [i in (2, 3, 6, 7, 8) for i in range(10)]
    assert parse("lossless_fp16").decode(parse("lossless_fp16").encode(x), 10, torch.float32)[0, 8] == float("inf")


def test_rows_may_be_cut_into_pieces_of_at_least_256_values():
    codec = parse("lossless")
    assert [codec.segment(cols) for cols in (0, 1, 100, 256, 257, 576, 1024, 4096, 14336)] == [
        *(0, 1, 100, 256, 257, 288, 256, 256, 256)
    ]
    x = rows(576, torch.bfloat16)
    cut = x.reshape(-1, 288)
    assert same(codec.decode(codec.encode(cut), 288, x.dtype).view(x.shape), x)


def broken(codec, cols):
    """Payloads of random bytes, some with lengths that can be, some with escapes only, [T, P]."""
    generator = torch.Generator().manual_seed(cols)
    payload = torch.randint(0, 256, (60, codec.payload_bytes(cols)), generator=generator).to(torch.uint8)
    payload[20:, 2:4] = 0
    payload[40:, 1] = 0
    payload[::3, 5 + cols :] = 0xFF
    return payload


def test_the_specification_reads_broken_payloads():
    for name, wire in WIRES.items():
        for cols in (1, 9, 64, 100, 576):
            codec, payload = parse(name), broken(parse(name), cols)
            assert codec.decode(payload, cols, wire).shape == (60, cols)
            assert codec.lengths(payload).shape == (60,)


def fenced(x):
    """A copy of `x` whose last byte is the last one before a page that nobody may touch."""
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=pages * mmap.PAGESIZE - size)
    return whole.copy_(x.contiguous().view(-1).view(torch.uint8)).view(x.dtype).view(x.shape)


def work_between_fences():
    for name, wire in WIRES.items():
        for cols in (1, 9, 64, 96):
            codec = parse(name)
            for row in rows(cols, wire).split(1):
                payload = kernels.encode(fenced(row), codec, out=fenced(codec.encode(row).fill_(1)))
                out = fenced(torch.empty_like(row))
                assert same(kernels.decode(fenced(payload), codec, cols=cols, dtype=wire, out=out), row)
            for payload in broken(codec, cols).split(1):
                for dtype in values.DTYPES:
                    out = fenced(torch.empty(1, cols, dtype=dtype))
                    kernels.decode(fenced(payload), codec, cols=cols, dtype=dtype, out=out)


@pytest.mark.skipif(platform.system() != "Linux", reason="mprotect as Linux has it")
def test_kernels_stay_within_their_memory():
    """Broken payloads too. A process, as it crashes otherwise."""
    like = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import test_lossless; test_lossless.work_between_fences()"
    done = subprocess.run([sys.executable, "-c", code], env=like, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be():
    with pytest.raises(ValueError, match="bf16 or fp16, not torch.float32"):
        Lossless(torch.float32)
    for suffix in ("spike", "hadamard", "keep16"):
        with pytest.raises(ValueError, match="not known or not possible on lossless"):
            parse(f"lossless+{suffix}")
    with pytest.raises(ValueError, match="did you mean|lossless_fp16"):
        parse("lossles")


def test_a_gpu_runs_the_specification_and_says_so():
    assert kernels.route(parse("lossless"), "cpu") == ("numba", "compiled for this CPU")
    assert kernels.route(parse("lossless"), "cuda") == ("torch", "no GPU kernel for lossless")
