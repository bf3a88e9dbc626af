"""The Triton kernels give the specification's bytes: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

import formats
import values
from flashcomm import codecs, kernels
from thorough import thorough

pytest.importorskip("triton")
import interpreter
from flashcomm.kernels import gpu

interpreter.hasten()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of values that overflow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECS = [
    "bf16",
    "fp32",
    *(spec for spec in formats.SPECS if spec != "none" and gpu.why_not(codecs.parse(spec)) is None),
]
WIDTHS = [f"int{bits}{s}g{group}" for bits in range(1, 9) for s, group in (("", 64), ("s", 8))]
WIDTHS = [spec for spec in WIDTHS if spec not in SPECS]

ROWS = ((torch.bfloat16, 333), (torch.float32, 1024), (torch.float16, 2304))
"""Rows that end with a short pack, with a tile, and with a pack of the second tile."""


def same(a, b):
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


def rows(dtype, cols):
    """Spikes, a NaN, an Inf; huge, tiny; zeros, groups of one value, powers of two: [3, cols]."""
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(cols))
    third = cols // 3
    x[0, 5::37] *= 1000
    x[0, third], x[0, 2 * third], x[0, -1] = float("nan"), float("inf"), -0.0
    x[1, :third] *= 1e38 if dtype != torch.float16 else 2e4
    x[1, 2 * third :] *= 1e-39 if dtype != torch.float16 else 1e-7
    x[2, :third], x[2, third : 2 * third] = 0.0, 1.2345
    x[2, 2 * third :] = x[2, 2 * third :].sign() * 2.0 ** (x[2, 2 * third :] * 4).round()
    return x.to(dtype)


def encoded(codec, x):
    out = torch.full((x.shape[0], codec.payload_bytes(x.shape[1])), 0xAA, dtype=torch.uint8, device=DEVICE)
    gpu.encode(x.to(DEVICE), codec, out)
    return out


@pytest.mark.parametrize("spec", [*SPECS[::3], *map(thorough, [*SPECS[1::3], *SPECS[2::3], *WIDTHS])])
def test_same_bytes_as_the_specification(spec):
    codec = codecs.parse(spec)
    for dtype, cols in ROWS:
        x = rows(dtype, cols)
        payload = codec.encode(x)
        assert same(encoded(codec, x), payload), f"encode {dtype} [3, {cols}]"
        # The same rows in another order, as if another rank had sent them.
        payloads = torch.stack([payload, payload.flip(0)]).to(DEVICE)
        out = torch.empty(3, cols, dtype=dtype, device=DEVICE)
        gpu.decode_sum(payloads[:1], codec, out)
        assert same(out, codec.decode(payload, cols, dtype)), f"decode {dtype} [3, {cols}]"
        again = torch.empty_like(payload, device=DEVICE)
        gpu.decode_sum_encode(payloads, codec, codec, cols, again)
        want = codecs.decode_sum_encode(payloads.cpu(), codec, codec, cols)
        assert same(again, want), f"decode_sum_encode {dtype} [3, {cols}]"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["int4g128", "mxfp8_e4m3"])
def test_same_bytes_on_all_16_bit_patterns(spec, dtype):
    codec, x = codecs.parse(spec), values.every_pattern(dtype).reshape(32, 2048)
    payload = codec.encode(x)
    assert same(encoded(codec, x), payload)
    out = torch.empty_like(x, device=DEVICE)
    gpu.decode_sum(payload[None].to(DEVICE), codec, out)
    assert same(out, codec.decode(payload, 2048, dtype))


@pytest.mark.parametrize(
    "spec", ["int4g128", "int5sg32", "fp8g128", "mxfp6_e3m2", "nvfp4", "fp3_e1m1g8_e5m0", "int3g16+spike"]
)
@pytest.mark.parametrize("cols", [1, 7, 31, 129, 640, 2049])
def test_rows_of_any_length(spec, cols):
    codec, x = codecs.parse(spec), torch.randn(2, cols, generator=torch.Generator().manual_seed(cols))
    payload = codec.encode(x)
    assert same(encoded(codec, x), payload)
    out = torch.empty_like(x, device=DEVICE)
    gpu.decode_sum(payload[None].to(DEVICE), codec, out)
    assert same(out, codec.decode(payload, cols, x.dtype))


def test_pairs_of_formats_are_one_pass():
    first, second = codecs.parse("int2g32+spike"), codecs.parse("nvfp4")
    payloads = torch.stack([first.encode(torch.randn(3, 640)) for _ in range(3)])
    out = torch.empty(3, second.payload_bytes(640), dtype=torch.uint8, device=DEVICE)
    gpu.decode_sum_encode(payloads.to(DEVICE), first, second, 640, out)
    assert same(out, codecs.decode_sum_encode(payloads, first, second, 640))


@pytest.mark.parametrize(("dtype", "cols"), ROWS)
def test_residual_and_norm_in_one_pass(dtype, cols):
    generator = torch.Generator().manual_seed(5)
    codec = codecs.parse("int8g128")
    payloads = torch.stack([codec.encode(torch.randn(4, cols, generator=generator)) for _ in range(2)])
    residual = torch.randn(4, cols, generator=generator).to(dtype)
    weight = torch.randn(cols, generator=generator).to(dtype)
    want, want_total = kernels.decode_sum_add_norm(payloads, codec, residual, weight)
    out, total = (torch.empty(4, cols, dtype=dtype, device=DEVICE) for _ in range(2))
    on_device = [tensor.to(DEVICE) for tensor in (payloads, residual, weight)]
    gpu.decode_sum_add_norm(on_device[0], codec, *on_device[1:], 1e-6, out, total)
    assert same(total, want_total)
    # Adding up `cols` squares in another order moves the norm by at most cols fp32 roundings, and so two of dtype's.
    step = torch.finfo(dtype).eps
    assert ((out.cpu().float() - want.float()).abs() <= (2 * step + cols * 2.0**-24) * want.float().abs()).all()


def test_strided_rows_and_nothing_beyond_them():
    codec = codecs.parse("int4g32")
    wide = torch.randn(5, 700)
    x, payload = wide[:, 3:336], torch.full((5, 400), 0xAA, dtype=torch.uint8)
    width = codec.payload_bytes(333)
    source, target = wide.to(DEVICE)[:, 3:336], payload.to(DEVICE)
    gpu.encode(source, codec, target[:, :width])
    assert same(target[:, :width], codec.encode(x))
    assert (target[:, width:] == 0xAA).all()


@pytest.mark.parametrize(
    ("spec", "cols", "why"),
    [
        ("int4g100", 4096, "groups of a power of two, not of 100"),
        ("int8g32768", 65536, "groups of 32768 are too large"),
        ("int4g32+hadamard", 4096, "no GPU kernel for int4g32"),
        ("int4g128", 1 << 30, "rows of less than 1073741824 values"),
    ],
)
def test_what_the_kernel_does_not_serve_is_said(spec, cols, why):
    assert why in gpu.why_not(codecs.parse(spec), cols)


def test_a_group_longer_than_the_row_is_served_whatever_its_size():
    codec, x = codecs.parse("int4g1000"), torch.randn(2, 300)
    assert gpu.why_not(codec, 300) is None
    assert same(encoded(codec, x), codec.encode(x))


def test_prompts_of_any_length_share_a_kernel():
    """Counts what Triton would compile, by its own rule, for 1 to 300 rows."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from flashcomm.kernels.gpu.tiles.move import move

    kernel = JITFunction(move.fn, do_not_specialize=["ranks"])
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    codec, dtype = codecs.parse("int4g128"), torch.bfloat16
    seen = set()
    for count in range(1, 301):
        source, target = torch.empty(1, count, 4096, dtype=torch.int16), torch.empty(count, 2176, dtype=torch.uint8)
        constants = gpu.constants_of(gpu.VALUES[dtype], gpu.describe(codec, 4096), 4096)
        call = (source, *source.stride()[:2], 1, target, target.stride(0), 4096)
        _, specialization, _ = bind(*call, **constants, **gpu.options(constants["V"]))
        seen.add(str(specialization))
    assert len(seen) == 1, seen


def test_payloads_of_ranks_may_lie_far_apart():
    """More than 2 GiB between the first and the last, of which little is touched."""
    codec, cols, apart = codecs.parse("int8g128"), 256, (4 << 30) // 5 // 16 * 16
    width = codec.payload_bytes(cols)
    payloads = torch.empty(3 * apart + 2 * width, dtype=torch.uint8).as_strided((4, 2, width), (apart, width, 1))
    for rank in range(4):
        payloads[rank] = codec.encode(rows(torch.float32, cols)[:2] + rank)
    out = torch.empty(2, cols)
    gpu.decode_sum(payloads, codec, out)
    assert same(out, codecs.decode_sum(payloads, codec, cols, torch.float32))
