import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import values
from flashcomm import codecs, kernels

SPECS = ["bf16", "fp32", *(f"int{b}{s}g{g}" for b in range(1, 9) for s in ("", "s") for g in (1, 3, 8, 32, 100, 128))]


def same_bytes(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_equals_specification(codec, x):
    payload = codec.encode(x)
    assert same_bytes(kernels.encode(x, codec), payload), f"{codec} {x.dtype} {list(x.shape)}: encode"
    for dtype in values.DTYPES:
        decoded = kernels.decode(payload, codec, cols=x.shape[1], dtype=dtype)
        assert same_bytes(decoded, codec.decode(payload, x.shape[1], dtype)), f"{codec} {dtype} {list(x.shape)}: decode"


def test_every_codec_says_what_serves_it_and_why(monkeypatch):
    assert kernels.route(codecs.parse("int4g128"), "cpu") == ("numba", "compiled for this CPU")
    assert kernels.route(codecs.parse("bf16"), "cpu")[0] == "numba"
    assert kernels.route(codecs.parse("none"), "cpu")[0] == "torch"
    assert kernels.route(codecs.parse("int4g128"), "cuda") == ("triton", "compiled for this GPU")
    assert kernels.route(codecs.parse("int4g128+taco"), "cuda") == ("torch", "no GPU kernel for int4g128+taco")
    backend, why = kernels.route(codecs.parse("int4g128"), "xpu")
    assert backend == "torch"
    assert "specification" in why
    monkeypatch.setenv("FLASHCOMM_TRITON", "0")
    kernels.route.cache_clear()
    assert kernels.route(codecs.parse("int4g128"), "cuda") == ("torch", "FLASHCOMM_TRITON=0")
    kernels.route.cache_clear()


@pytest.mark.parametrize("dtype", values.DTYPES)
def test_same_bytes_on_all_16_bit_patterns(dtype):
    x = values.every_pattern(dtype)
    for spec in SPECS:
        assert_equals_specification(codecs.parse(spec), x)


@pytest.mark.parametrize("dtype", values.DTYPES)
def test_same_bytes_on_special_values(dtype):
    for x in values.special(dtype).values():
        for spec in SPECS:
            assert_equals_specification(codecs.parse(spec), x)


@settings(max_examples=300)
@given(values.matrices(), st.integers(1, 8), st.booleans(), st.integers(1, 300))
def test_same_bytes_anywhere(x, bits, symmetric, group):
    assert_equals_specification(codecs.parse(f"int{bits}{'s' * symmetric}g{group}"), x)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize(
    "pair", [("int4g32", "int4g32"), ("int4g128", "int8g128"), ("int3sg7", "int5g100"), ("bf16", "int8g128")]
)
def test_sums_are_the_specifications(ranks, pair):
    first, second = map(codecs.parse, pair)
    payloads = torch.stack(
        [first.encode(torch.randn(6, 300, generator=torch.Generator().manual_seed(r)).bfloat16()) for r in range(ranks)]
    )
    for dtype in values.DTYPES:
        expected = codecs.decode_sum(payloads, first, 300, dtype)
        assert same_bytes(kernels.decode_sum(payloads, first, cols=300, dtype=dtype), expected)
    expected = codecs.decode_sum_encode(payloads, first, second, 300)
    assert same_bytes(kernels.decode_sum_encode(payloads, first, second, cols=300), expected)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("spec", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", values.DTYPES)
def test_sums_of_uncompressed_rows_of_all_16_bit_patterns(dtype, spec, ranks):
    x, codec = values.every_pattern(dtype).reshape(-1, 4096), codecs.parse(spec)
    # Every pattern meets others.
    payloads = torch.stack([codec.encode(x.roll(12_345 * r)) for r in range(ranks)])
    for out_dtype in values.DTYPES:
        expected = codecs.decode_sum(payloads, codec, 4096, out_dtype)
        assert same_bytes(kernels.decode_sum(payloads, codec, cols=4096, dtype=out_dtype), expected)


def test_rows_may_be_strided_and_results_land_in_out():
    base = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    codec = codecs.parse("int5g64")
    for x in (base[::2, 10:210], base.T, base[:, ::3], base[:0]):
        payload = torch.full((x.shape[0], codec.payload_bytes(x.shape[1])), 0xAA, dtype=torch.uint8)
        assert kernels.encode(x, codec, out=payload) is payload
        assert same_bytes(payload, codec.encode(x))
        wide = torch.zeros(x.shape[0], x.shape[1] + 5, dtype=x.dtype)
        kernels.decode(payload, codec, cols=x.shape[1], dtype=x.dtype, out=wide[:, 2:-3])
        assert same_bytes(wide[:, 2:-3], codec.decode(payload, x.shape[1], x.dtype))
        assert not wide[:, :2].any()
        assert not wide[:, -3:].any()


def test_threads_change_no_byte():
    x = torch.randn(513, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    codec = codecs.parse("int4g128")
    alone = kernels.encode(x, codec)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert same_bytes(kernels.encode(x, codec), alone)
        assert same_bytes(kernels.decode(alone, codec, cols=2048, dtype=x.dtype), codec.decode(alone, 2048, x.dtype))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.encode(torch.zeros(4), "int4"), r"encode takes a \[rows, cols\] tensor.*float32 \[4\]"),
        (lambda: kernels.encode(torch.zeros(4, 4, dtype=torch.int32), "int4"), "int32"),
        (lambda: kernels.encode([1.0], "int4"), "list"),
        (lambda: kernels.encode(torch.zeros(2, 4), "int4:int8"), "is several formats"),
        (
            lambda: kernels.encode(torch.zeros(2, 4), "int4g4", out=torch.zeros(2, 5)),
            r"out must be torch.uint8 \[2, 6\]",
        ),
        (
            lambda: kernels.decode(torch.zeros(2, 5, dtype=torch.uint8), "int4g4", cols=4, dtype=torch.float32),
            "rows of 6 bytes",
        ),
        (lambda: kernels.decode(torch.zeros(2, 6), "int4g4", cols=4, dtype=torch.float32), "rows of 6 bytes"),
        (
            lambda: kernels.decode(torch.zeros(2, 6, dtype=torch.uint8), "int4g4", cols=4, dtype=torch.int32),
            "bf16, fp16 or fp32",
        ),
        (
            lambda: kernels.decode_sum(torch.zeros(0, 2, 6, dtype=torch.uint8), "int4g4", cols=4, dtype=torch.float32),
            "at least one rank",
        ),
    ],
)
def test_wrong_arguments_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_kernels_write_into_is_checked():
    codec = codecs.parse("int4g4")
    payload = kernels.encode(torch.randn(4, 8), codec)
    wide = torch.zeros(4, 16)
    for out in (wide[:, ::2], torch.zeros(5, 8), torch.zeros(4, 8, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"out must be torch.float32 \[4, 8\] on cpu with contiguous rows"):
            kernels.decode(payload, codec, cols=8, dtype=torch.float32, out=out)
    assert not wide.any()
    with pytest.raises(ValueError, match="out must be torch.uint8"):
        kernels.decode_sum_encode(payload[None], codec, codec, cols=8, out=torch.zeros(4, 3, dtype=torch.uint8))
    transposed = payload.T.contiguous().T
    assert transposed.stride(1) != 1
    expected = kernels.decode(payload, codec, cols=8, dtype=torch.float32)
    assert same_bytes(kernels.decode(transposed, codec, cols=8, dtype=torch.float32), expected)


def test_tensors_without_memory_are_refused():
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    with pytest.raises(ValueError, match="AsyncCollectiveTensor has no memory of its own"):
        kernels.encode(AsyncCollectiveTensor(torch.zeros(2, 4)), "int4g4")


def test_scratch_memory_lives_as_long_as_the_kernel():
    """With this setting a freed array is unmapped, so a kernel that works in freed memory crashes."""
    code = """
import torch
from flashcomm import codecs, kernels
codec = codecs.parse("int5g40000")
x = torch.randn(2, 100_000)
payload = kernels.encode(x, codec)
payloads = torch.stack([payload, payload])
assert torch.equal(payload, codec.encode(x))
got = kernels.decode_sum_encode(payloads, codec, codec, cols=100_000)
assert torch.equal(got, codecs.decode_sum_encode(payloads, codec, codec, 100_000))
total = kernels.decode_sum(payloads, codec, cols=100_000, dtype=torch.bfloat16)
assert torch.equal(total, codecs.decode_sum(payloads, codec, 100_000, torch.bfloat16))
"""
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "32768"}
    assert subprocess.run([sys.executable, "-c", code], env=settings).returncode == 0


@pytest.mark.gpu
def test_specification_gives_the_same_bytes_on_cuda():
    for dtype in values.DTYPES:
        x = values.every_pattern(dtype)
        for spec in SPECS:
            codec = codecs.parse(spec)
            payload = kernels.encode(x.cuda(), codec)
            assert same_bytes(payload.cpu(), codec.encode(x)), f"{codec} {dtype}: encode"
            for out in values.DTYPES:
                decoded = kernels.decode(payload, codec, cols=256, dtype=out)
                assert same_bytes(decoded.cpu(), codec.decode(payload.cpu(), 256, out)), f"{codec} {dtype}: decode"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64")
def test_a_cpu_without_conversions_of_fp16_gives_the_same_bytes():
    """Many virtual machines have none: LLVM then calls functions that nobody links. A process, as it may crash."""
    code = """
import torch, values
from flashcomm import codecs, kernels
exact = codecs.parse("fp32")
for dtype in (torch.float16, torch.float32):
    x = values.every_pattern(dtype)
    assert torch.equal(kernels.encode(x, exact), exact.encode(x)), dtype
# Between two neighbours of fp16 each: the values in the middle, and those beside them.
bits = torch.arange(0x33000000, 0x48000000, 0x0800, dtype=torch.int32)
bits = torch.cat([bits - 1, bits, bits + 1, torch.arange(0x7F800000 - 3, 0x7FFFFFFF, 0x1FFF, dtype=torch.int32)])
x = torch.cat([bits, bits + -(2**31)]).view(torch.float32)[None]
got = kernels.decode(exact.encode(x), exact, cols=x.shape[1], dtype=torch.float16)
want = exact.decode(exact.encode(x), x.shape[1], torch.float16)
wrong = got.view(torch.int16) != want.view(torch.int16)
assert not wrong.any(), (x[wrong][:9], got[wrong][:9].view(torch.int16), want[wrong][:9].view(torch.int16))
for spec in ("int8g128", "mxfp8_e4m3", "lossless", "lossless_fp16"):
    codec = codecs.parse(spec)
    for dtype in values.DTYPES:
        x = values.every_pattern(dtype)
        payload = kernels.encode(x, codec)
        assert torch.equal(payload, codec.encode(x)), (spec, dtype)
        want = codec.decode(payload, x.shape[1], dtype)
        got = kernels.decode(payload, codec, cols=x.shape[1], dtype=dtype)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (spec, dtype)
assert kernels.route(codecs.parse("int8g128"), "cpu")[0] == "numba"
"""
    like = os.environ | {
        "NUMBA_CPU_NAME": "x86-64-v2",
        "NUMBA_CPU_FEATURES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], env=like, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
