"""Entropy-coded rows are decoded by CUDA C++ to the specification's values: its source runs on the CPU."""

import pytest
import torch

import values
from flashcomm import codecs

pytest.importorskip("triton")
import cuda_on_cpu
from flashcomm.bench import sass
from flashcomm.kernels.gpu import cuda
from flashcomm.kernels.gpu.cuda import compiler, launch

SPECS = ("ec2.5", "ec3", "ec4.25", "ec6", "ec8", "ec10")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

needs_compiler = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")
needs_nvrtc = pytest.mark.skipif(compiler.find() is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc")


@pytest.fixture(scope="module")
def kernels():
    return cuda_on_cpu.Kernels([cuda.entropy_macros(dtype, ranks) for dtype in values.DTYPES for ranks in (1, 2)])


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def rows(cols, seed=0):
    """Gaussian rows, rows with outliers and so with records, zeros, a NaN, rows on a grid, one magnitude: [8, cols]."""
    generator = torch.Generator().manual_seed(cols + seed)
    x = torch.randn(8, cols, generator=generator)
    x[1, ::97] *= 1000.0
    x[2, cols // 2 :: 5] *= 100.0 * torch.rand(x[2, cols // 2 :: 5].shape, generator=generator)
    x[3] = 0.0
    x[4, cols // 2] = float("nan")
    x[5] = (4 * x[5]).round() / 4
    x[6] *= 2.0**-126
    x[7] = x[7].sign() * 3e37
    return x


@needs_compiler
@pytest.mark.parametrize("spec", SPECS)
def test_rows_of_any_length_into_any_type(spec, kernels):
    codec = codecs.parse(spec)
    for cols in (1, 2, 7, 16, 33, 64, 129, 257, 576, 1000, 1023, 1024, 1025, 4096):
        payload = codec.encode(rows(cols))
        for dtype in values.DTYPES if cols in (7, 1025) else (torch.bfloat16,):
            out = torch.empty(8, cols, dtype=dtype)
            kernels.decode_entropy(payload[None], out)
            assert same(out, codec.decode(payload, cols, dtype)), (cols, dtype)


@needs_compiler
def test_a_row_whose_first_pair_has_four_bytes_of_length(kernels):
    codec, cols = codecs.parse("ec8"), 70_000
    payload = codec.encode(rows(cols)[:3])
    out = torch.empty(3, cols)
    kernels.decode_entropy(payload[None], out)
    assert same(out, codec.decode(payload, cols, torch.float32))


@needs_compiler
@pytest.mark.parametrize("cols", [300, 1500])
def test_sums_of_ranks(cols, kernels):
    codec = codecs.parse("ec4.25")
    for ranks in (2, 5, 8):
        payloads = torch.stack([codec.encode(rows(cols, seed).roll(seed, 0)) for seed in range(ranks)])
        for dtype in values.DTYPES:
            out = torch.empty(8, cols, dtype=dtype)
            kernels.decode_entropy(payloads, out)
            assert same(out, codecs.decode_sum(payloads, codec, cols, dtype)), (ranks, dtype)


@needs_compiler
def test_broken_rows_read_nothing_beyond_them(kernels):
    """Random bytes, in memory that ends where they end."""
    for spec, cols in (("ec3", 40), ("ec4.25", 300), ("ec8", 2000)):
        size = codecs.parse(spec).payload_bytes(cols)
        generator = torch.Generator().manual_seed(cols)
        payload = torch.randint(0, 256, (200, size), dtype=torch.uint8, generator=generator)
        payload[:, 1] &= 0xEF  # not only rows of NaN
        out = torch.empty(200, cols)
        kernels.decode_entropy(payload[None], out)
        assert out.shape == (200, cols)


@needs_nvrtc
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_spills_nothing(target, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ranks = 2 if target == "sm_90" else 1
    code = sass.read(compiler.cubin(dict(cuda.entropy_macros(torch.bfloat16, ranks)), target, launch.ENTROPY))
    assert code.spilled_bytes == 0
    assert code.registers <= 80


@pytest.mark.gpu
@needs_nvrtc
def test_a_gpu_decodes_the_same_values():
    for spec in SPECS:
        codec = codecs.parse(spec)
        for cols in (9, 577, 4096):
            payload = codec.encode(rows(cols))
            payloads = torch.stack([payload, payload.flip(0)]).cuda()
            out = torch.empty(8, cols, dtype=torch.bfloat16, device="cuda")
            for count in (1, 2):
                cuda.decode_sum(payloads[:count], codec, out)
                assert same(out.cpu(), codecs.decode_sum(payloads[:count].cpu(), codec, cols, torch.bfloat16))
