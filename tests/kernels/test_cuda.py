"""The CUDA C++ kernels give the specification's bytes: their source runs on the CPU."""

import pytest
import torch

import values
from flashcomm import codecs

pytest.importorskip("triton")
import cuda_on_cpu
from flashcomm.kernels.gpu import cuda

_BASES = ("int8g128", "int4g128", "int4g32", "mxfp4", "mxfp8_e4m3", "fp8g128")
HOT = [*_BASES, *(f"{base}+hadamard" for base in _BASES)]
_E4M3 = [spec for spec in HOT if "fp8" in spec]

needs_compiler = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")
NAMES = {torch.bfloat16: "Values<BF16>", torch.float16: "Values<FP16>", torch.float32: "Values<FP32>"}


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def rows(dtype, cols, count=4):
    """Spikes, a NaN, an Inf, huge, tiny, subnormal, zeros, constants, powers of two: [count, cols]."""
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(count, cols, generator=generator)
    third = cols // 3
    x[0, 5::37] *= 1000
    x[0, third], x[0, 2 * third], x[0, -1] = float("nan"), float("inf"), -0.0
    x[1, :third] *= 1e38 if dtype != torch.float16 else 2e4
    x[1, 2 * third :] *= 1e-39 if dtype != torch.float16 else 1e-7
    x[2, :third], x[2, third : 2 * third] = 0.0, 1.2345
    x[2, 2 * third :] = x[2, 2 * third :].sign() * 2.0 ** (x[2, 2 * third :] * 4).round()
    # Every magnitude, by groups of 32.
    power = torch.randint(-149, 128, (cols // 32 + 1,), generator=generator).repeat_interleave(32)[:cols]
    x[3] = torch.ldexp(x[3], power) if dtype != torch.float16 else x[3] * 2.0 ** (power / 8).round()
    return x.to(dtype)


def with_stride(shape, dtype, stride_bytes, offset_bytes=0, fill=0xAA):
    """A tensor whose rows begin `stride_bytes` apart, in bytes that were all `fill`."""
    width = torch.empty(0, dtype=dtype).element_size()
    count, cols = shape
    storage = torch.full((count * stride_bytes + offset_bytes + 64,), fill, dtype=torch.uint8)
    storage = storage[-storage.data_ptr() % 16 :]
    return (
        storage[offset_bytes : offset_bytes + count * stride_bytes]
        .view(dtype)
        .as_strided((count, cols), (stride_bytes // width, 1), storage[offset_bytes:].storage_offset() // width)
    )


def kinds(spec):
    """Macros of the kernels that these tests launch: all types and layouts, as far as they meet."""
    form = cuda.spell(codecs.parse(spec))
    for layout in cuda.LAYOUTS:
        for name in NAMES.values() if layout != "Wide<4>" else ["Values<BF16>"]:
            yield cuda.macros(name, form, layout, False)
            yield cuda.macros(form, name, layout, False)
        yield cuda.macros(form, form, layout, True)
    yield cuda.macros(form, "Values<BF16>", "Wide<16>", True)
    yield cuda.macros(form, "Values<FP32>", "Thin", True)


class OnCpu:
    """The verbs of `kernels.gpu.cuda`, of one format, on CPU tensors."""

    def __init__(self, spec, **options):
        self.codec = codecs.parse(spec)
        self.form = cuda.spell(self.codec)
        self.kernels = cuda_on_cpu.kernels(tuple(kinds(spec)), **options)

    def encode(self, x, out=None):
        if out is None:
            out = torch.full((x.shape[0], self.codec.payload_bytes(x.shape[1])), 0xAA, dtype=torch.uint8)
        return out, self.kernels.move(x[None], NAMES[x.dtype], out, self.form, x.shape[1])

    def decode_sum(self, payloads, cols, dtype):
        out = torch.empty(payloads.shape[1], cols, dtype=dtype)
        return out, self.kernels.move(payloads, self.form, out, NAMES[dtype], cols)

    def decode_sum_encode(self, payloads, cols):
        out = torch.full(payloads.shape[1:], 0xAA, dtype=torch.uint8)
        return out, self.kernels.move(payloads, self.form, out, self.form, cols)


def check_both_ways(on_cpu, x, layout):
    codec, payload = on_cpu.codec, on_cpu.codec.encode(x)
    got, used = on_cpu.encode(x)
    assert used == layout
    assert same(got, payload), f"encode {x.dtype} {list(x.shape)}: {(got != payload).sum()} bytes differ"
    decoded, used = on_cpu.decode_sum(payload[None], x.shape[1], x.dtype)
    assert used == layout
    assert same(decoded, codec.decode(payload, x.shape[1], x.dtype)), f"decode {x.dtype} {list(x.shape)}"


@needs_compiler
@pytest.mark.parametrize("spec", HOT)
def test_all_16_bit_patterns_and_special_values(spec):
    on_cpu = OnCpu(spec)
    for dtype in values.DTYPES:
        patterns = values.every_pattern(dtype)
        # In order, where most groups are finite, and as strided columns, where each group has every magnitude.
        check_both_ways(on_cpu, patterns.reshape(64, 1024), "Wide<16>")
        check_both_ways(on_cpu, patterns.reshape(1024, 64).T.contiguous(), "Wide<16>")
        check_both_ways(on_cpu, rows(dtype, 1024), "Wide<16>")


@needs_compiler
@pytest.mark.parametrize("spec", HOT)
def test_rows_of_any_length_and_alignment(spec):
    on_cpu = OnCpu(spec)
    for dtype in values.DTYPES:
        for cols in (1, 2, 3, 31, 64, 100, 127, 129, 333, 720):
            check_both_ways(on_cpu, rows(dtype, cols), "Thin")
    patterns = values.every_pattern(torch.bfloat16)
    check_both_ways(on_cpu, torch.cat([patterns, patterns[:, :9]], 1), "Thin")


@needs_compiler
@pytest.mark.parametrize("spec", HOT)
def test_strided_rows_and_nothing_beyond_them(spec):
    on_cpu, cols = OnCpu(spec), 384
    width = on_cpu.codec.payload_bytes(cols)
    x = rows(torch.bfloat16, cols)
    wide, narrow, odd = (width + 16 + (step - width) % 16 for step in (16, 4, 3))
    for stride, x_offset, layout in (
        (wide, 0, "Wide<16>"),
        (narrow, 0, "Wide<4>"),
        (odd, 0, "Thin"),
        (wide, 2, "Thin"),
    ):
        source = with_stride(x.shape, x.dtype, 2 * cols + 32, x_offset).copy_(x)
        out = with_stride((4, width), torch.uint8, stride)
        _, used = on_cpu.encode(source, out)
        assert used == layout
        assert same(out, on_cpu.codec.encode(x)), layout
        beyond = out.as_strided((3, stride - width), (stride, 1), out.storage_offset() + width)
        assert (beyond == 0xAA).all(), layout
        if x_offset == 0:
            decoded, used = on_cpu.decode_sum(out[None], cols, x.dtype)
            assert used == layout
            assert same(decoded, on_cpu.codec.decode(out, cols, x.dtype)), layout


@needs_compiler
@pytest.mark.parametrize("spec", HOT)
def test_sums_of_ranks(spec):
    on_cpu = OnCpu(spec)
    codec = on_cpu.codec
    for ranks in (2, 4, 8):
        for cols, dtype, layout in ((1024, torch.bfloat16, "Wide<16>"), (333, torch.float32, "Thin")):
            payloads = torch.stack([codec.encode(rows(dtype, cols + r)[:, :cols].roll(r, 0)) for r in range(ranks)])
            out, used = on_cpu.decode_sum(payloads, cols, dtype)
            assert used == layout
            assert same(out, codecs.decode_sum(payloads, codec, cols, dtype)), f"{ranks} ranks, decode_sum {layout}"
            again, used = on_cpu.decode_sum_encode(payloads, cols)
            assert used == layout
            want = codecs.decode_sum_encode(payloads, codec, codec, cols)
            assert same(again, want), f"{ranks} ranks, decode_sum_encode {layout}"


@needs_compiler
@pytest.mark.parametrize("spec", _E4M3)
def test_the_conversion_that_newer_gpus_have(spec):
    on_cpu = OnCpu(spec, e4m3_by_hardware=True)
    check_both_ways(on_cpu, values.every_pattern(torch.bfloat16).reshape(64, 1024), "Wide<16>")
    check_both_ways(on_cpu, rows(torch.float32, 1024), "Wide<16>")
    check_both_ways(on_cpu, rows(torch.float32, 333), "Thin")
