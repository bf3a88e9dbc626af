"""Rows without loss are decoded by CUDA C++ to the specification's values: its source runs on the CPU."""

import pytest
import torch

import values
from flashcomm import codecs
from flashcomm.kernels import routes

pytest.importorskip("triton")
import cuda_on_cpu
from flashcomm.bench import sass
from flashcomm.kernels.gpu import cuda
from flashcomm.kernels.gpu.cuda import compiler, launch

CODECS = {torch.bfloat16: codecs.parse("lossless"), torch.float16: codecs.parse("lossless_fp16")}
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

needs_compiler = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")
needs_nvrtc = pytest.mark.skipif(compiler.find() is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc")


@pytest.fixture(scope="module")
def kernels():
    kinds = [
        launch.unpack_macros(codec, dtype, ranks > 1) for codec in CODECS.values() for dtype in values.DTYPES
        for ranks in (1, 2)
    ]  # fmt: skip
    return cuda_on_cpu.Kernels(kinds)


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def rows(dtype, cols):
    """Rows with few, many and no escapes; zeros, raw, NaN of any pattern: [6, cols]."""
    x = torch.randn(6, cols, generator=torch.Generator().manual_seed(cols))
    x[1, ::7] *= 2.0**-20
    x[2] = torch.ldexp(x[2], torch.arange(cols) % 60 - 30)  # mostly escapes: raw
    x[3] = 0.0
    x[4, cols // 2] = float("nan")
    x[5] = torch.where(torch.arange(cols) % 11 == 3, 0.0, x[5]).abs() * 2.0**100
    x = x.to(dtype)
    x[4, cols // 3] = torch.tensor([0x7FA5], dtype=torch.int16).view(dtype)[0]
    return x


@needs_compiler
@pytest.mark.parametrize("wire", CODECS)
def test_rows_of_any_length_into_any_type(wire, kernels):
    codec = CODECS[wire]
    for cols in (1, 2, 7, 8, 9, 31, 64, 255, 256, 257, 1000, 4096):
        payload = codec.encode(rows(wire, cols))
        for dtype in values.DTYPES:
            out = torch.empty(6, cols, dtype=dtype)
            kernels.unpack(payload[None], codec, out)
            assert same(out, codec.decode(payload, cols, dtype)), (cols, dtype)


@needs_compiler
@pytest.mark.parametrize("wire", CODECS)
def test_every_pattern(wire, kernels):
    codec, x = CODECS[wire], values.every_pattern(wire)
    for order in (x.reshape(64, 1024), x.reshape(1024, 64).T.contiguous()):
        out = torch.empty_like(order)
        kernels.unpack(codec.encode(order)[None], codec, out)
        assert same(out, order)


@needs_compiler
@pytest.mark.parametrize("wire", CODECS)
def test_sums_of_ranks(wire, kernels):
    codec, cols = CODECS[wire], 777
    for ranks in (2, 5, 32):
        payloads = torch.stack([codec.encode(rows(wire, cols + r)[:, :cols].roll(r, 0)) for r in range(ranks)])
        for dtype in values.DTYPES:
            out = torch.empty(6, cols, dtype=dtype)
            kernels.unpack(payloads, codec, out)
            assert same(out, codecs.decode_sum(payloads, codec, cols, dtype)), (ranks, dtype)


@needs_compiler
def test_a_broken_row_reads_nothing_beyond_it(kernels):
    """Of a row that claims more escapes than it has, the last byte stands for those."""
    codec, cols = CODECS[torch.bfloat16], 300
    payload = codec.encode(torch.randn(4, cols, generator=torch.Generator().manual_seed(1)).bfloat16())
    assert (codec.lengths(payload) < payload.shape[1]).all()
    planes, escapes = codec.parts(cols)
    payload[:, planes:escapes] = 0xFF
    exact = torch.empty(4 * payload.shape[1], dtype=torch.uint8).view_as(payload).copy_(payload)
    out = torch.empty(4, cols, dtype=torch.bfloat16)
    kernels.unpack(exact[None], codec, out)
    assert out.shape == (4, cols)


@needs_nvrtc
@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_spills_nothing(target, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    macros = launch.unpack_macros(CODECS[torch.bfloat16], torch.bfloat16, target == "sm_90")
    code = sass.read(compiler.cubin(dict(macros), target))
    assert code.spilled_bytes == 0
    assert code.registers <= 80


@pytest.mark.parametrize(
    ("spec", "kernel", "most_ranks"), [("lossless", "unpack", 32), ("ec4.25", "decode_entropy", 8)]
)
def test_which_formats_and_directions(spec, kernel, most_ranks, monkeypatch):
    """What only the specification encodes: rows without loss, and entropy-coded ones."""
    monkeypatch.setenv("FLASHCOMM_CUDA", "1")
    monkeypatch.setattr(launch, "unavailable", lambda: None)
    codec = codecs.parse(spec)
    assert cuda.why_not(codec) is None
    assert cuda.spell(codec) is None
    monkeypatch.setattr(routes, "route", routes.route.__wrapped__)
    assert routes.route(codec, "cuda")[0] == "cuda"
    # So that `stats()` counts it, `strict` refuses it, and `auto` does not take it unasked.
    assert routes.missing(codec, "cuda") == "compiled for this GPU to decode; the torch specification encodes"
    assert routes.missing(codecs.parse("int8g128"), "cuda") is None
    started = []
    monkeypatch.setattr(launch, "_start", lambda kind, name, *_: started.append(name))
    x = torch.randn(3, 64).bfloat16()
    out = torch.empty(3, codec.payload_bytes(64), dtype=torch.uint8)
    cuda.encode(x, codec, out)
    assert same(out, codec.encode(x))
    assert not started
    cuda.decode_sum_encode(
        torch.stack([out, out]), codec, codecs.parse("int8g128"), 64, torch.empty(3, 68, dtype=torch.uint8)
    )
    assert started == [kernel, "move"]
    # More ranks than the kernel adds: the specification.
    started.clear()
    payloads, sums = out[None].repeat(most_ranks + 1, 1, 1), torch.empty(3, 64, dtype=torch.bfloat16)
    cuda.decode_sum(payloads, codec, sums)
    assert not started
    assert same(sums, codecs.decode_sum(payloads, codec, 64, torch.bfloat16))


@pytest.mark.gpu
@needs_nvrtc
@pytest.mark.parametrize("wire", CODECS)
def test_a_gpu_decodes_the_same_values(wire):
    codec = CODECS[wire]
    for cols in (9, 777, 4096):
        payload = codec.encode(rows(wire, cols))
        payloads = torch.stack([payload, payload.flip(0)]).cuda()
        out = torch.empty(6, cols, dtype=wire, device="cuda")
        for count in (1, 2):
            cuda.decode_sum(payloads[:count], codec, out)
            assert same(out.cpu(), codecs.decode_sum(payloads[:count].cpu(), codec, cols, wire))
