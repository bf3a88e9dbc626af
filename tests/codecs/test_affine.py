import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import values
from flashcomm.codecs import decode_sum, decode_sum_encode, parse

SPECS = [f"int{b}{s}g{g}" for b in (1, 2, 3, 4, 5, 7, 8) for s in ("", "s") for g in (1, 32, 100)]


def assert_within_published_bound(codec, x):
    decoded = codec.decode(codec.encode(x), x.shape[1], x.dtype)
    step = codec.step(x)
    error = (decoded.float() - x.float()).abs()
    # fp16 overflows above 65504 as any cast to it does; a NaN group has no step.
    judged = ~(step.isnan() | decoded.isinf() | x.isinf())
    worst = (error - values.allowed_error(step, x, x.dtype))[judged]
    assert (worst <= 0).all(), f"{codec} {x.dtype}: {int((worst > 0).sum())} values beyond the bound"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", values.DTYPES)
def test_error_stays_within_half_a_step(spec, dtype):
    for x in [*values.special(dtype).values(), values.every_pattern(dtype)]:
        assert_within_published_bound(parse(spec), x)


@given(values.matrices(), st.integers(1, 8), st.booleans(), st.integers(1, 300))
def test_error_stays_within_half_a_step_anywhere(x, bits, symmetric, group):
    assert_within_published_bound(parse(f"int{bits}{'s' * symmetric}g{group}"), x)


@pytest.mark.parametrize("spec", ["int4g32", "int4sg32", "int1g32", "int1sg32", "int8g128"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_poison_their_own_group_only(spec, poison):
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    x[1, 70] = poison
    codec = parse(spec)
    decoded = codec.decode(codec.encode(x), 300, torch.float32)
    first = 70 // codec.group * codec.group
    expected = torch.zeros(2, 300, dtype=torch.bool)
    expected[1, first : first + codec.group] = True
    assert torch.equal(decoded.isnan(), expected)
    assert not decoded.isinf().any()


def test_a_range_beyond_fp32_is_nan_and_1e38_is_not():
    for spec in ("int8g128", "int8sg128", "int2g128"):
        codec = parse(spec)
        wide = torch.tensor([[3.3e38, -3.3e38, 0.0, 1.0]])
        assert codec.decode(codec.encode(wide), 4, torch.float32).isnan().all()
        for upper_end in (torch.linspace(1e38, 3.4028e38, 128)[None], torch.full((1, 8), 3.38e38)):
            decoded = codec.decode(codec.encode(upper_end), upper_end.shape[1], torch.float32)
            assert not decoded.isinf().any()
        large = torch.tensor([[1e38, -1e38, 0.0, 1.0]])
        decoded = codec.decode(codec.encode(large), 4, torch.float32)
        assert torch.isfinite(decoded).all()
        assert ((decoded - large).abs() <= codec.step(large) * 0.5001).all()


def test_constant_rows_and_zeros_are_exact_in_bf16():
    for spec in SPECS:
        codec = parse(spec)
        zeros = torch.zeros(2, 130)
        assert torch.equal(codec.decode(codec.encode(zeros), 130, torch.float32), zeros)
        if not codec.symmetric:
            x = torch.full((2, 130), 1.2345).bfloat16()
            assert torch.equal(codec.decode(codec.encode(x), 130, torch.bfloat16), x)


def test_symmetric_zero_is_exact():
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    x[:, ::3] = 0
    for bits in range(2, 9):
        codec = parse(f"int{bits}sg64")
        decoded = codec.decode(codec.encode(x), 256, torch.float32)
        assert (decoded[:, ::3] == 0).all()


def test_rows_do_not_touch_each_other():
    x = torch.randn(6, 100, generator=torch.Generator().manual_seed(2))
    for spec in ("int4g32", "int5sg7", "bf16", "none"):
        codec = parse(spec)
        whole = codec.encode(x)
        assert torch.equal(whole, torch.cat([codec.encode(row[None]) for row in x]))


def test_a_segment_can_be_encoded_alone():
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(3))
    for spec in ("int4g32", "int8g128", "int3sg64", "bf16"):
        codec = parse(spec)
        unit = codec.segment(512)
        cut = x.reshape(-1, unit)
        whole = codec.decode(codec.encode(x), 512, torch.float32)
        assert torch.equal(whole.reshape(-1, unit), codec.decode(codec.encode(cut), unit, torch.float32))
    assert parse("int4g32").segment(100) == 100


def test_decode_sum_adds_in_rank_order_in_fp32():
    codec = parse("fp32")
    xs = [torch.tensor([[v]]) for v in (1e8, -1e8, 1.0, 1e-3)]
    payloads = torch.stack([codec.encode(x) for x in xs])
    assert decode_sum(payloads, codec, 1, torch.float32).item() == ((xs[0] + xs[1]) + xs[2] + xs[3]).item()
    assert decode_sum(payloads.flip(0), codec, 1, torch.float32).item() == ((xs[3] + xs[2]) + xs[1] + xs[0]).item()


def test_decode_sum_encode_is_its_parts():
    first, second = parse("int4g32"), parse("int8g100")
    payloads = torch.stack(
        [first.encode(torch.randn(3, 130, generator=torch.Generator().manual_seed(r))) for r in range(3)]
    )
    total = decode_sum(payloads, first, 130, torch.float32)
    assert torch.equal(decode_sum_encode(payloads, first, second, 130), second.encode(total))


def test_bad_formats_are_refused():
    from flashcomm.codecs import Affine, Cast

    with pytest.raises(ValueError, match="1 to 8 bits, not 9"):
        Affine(9, False, 128)
    with pytest.raises(ValueError, match="a group has 1 to"):
        Affine(4, False, 0)
    with pytest.raises(ValueError, match="fp16 overflows"):
        Cast(torch.float16)


@pytest.mark.parametrize("dtype", values.DTYPES)
def test_casts_round_once_and_keep_nan(dtype):
    x = values.every_pattern(dtype)
    for spec in ("bf16", "fp32", "none"):
        codec = parse(spec)
        decoded = codec.decode(codec.encode(x), 256, dtype)
        wire = {"bf16": torch.bfloat16, "fp32": torch.float32, "none": dtype}[spec]
        expected = x.to(wire).to(dtype)
        assert torch.equal(decoded.isnan(), x.isnan())
        finite = x.isfinite()
        assert torch.equal(decoded[finite], expected[finite])
        judged = finite & decoded.isfinite()
        error = (decoded.float() - x.float()).abs()[judged]
        assert (error <= codec.step(x)[judged] / 2).all()
