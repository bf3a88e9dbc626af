import ml_dtypes
import numpy as np
import pytest
import torch

from flashcomm.codecs import Block, parse
from flashcomm.codecs.blocks import NAMES
from flashcomm.codecs.elements import ELEMENTS
from flashcomm.codecs.scales import SCALES


def test_mxfp4_bytes_are_those_of_the_ocp_types():
    """Codes and scales read with ml_dtypes' float4_e2m1fn and float8_e8m0fnu give what we decode."""
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) * 37
    codec = parse("mxfp4")
    payload = codec.encode(x)
    packed, scales = payload[:, :64].numpy(), payload[:, 64:].numpy().view(ml_dtypes.float8_e8m0fnu)
    # 128 codes are a pack: code i in the low half of byte i, code i + 64 in the high half.
    codes = np.concatenate([packed & 15, packed >> 4], 1).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    values = codes * scales.astype(np.float32).repeat(32, 1)
    assert np.array_equal(codec.decode(payload, 128, torch.float32).numpy(), values)


def test_nvfp4_bytes_are_those_of_its_types():
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) * 37
    codec = parse("nvfp4")
    payload = codec.encode(x)
    packed = payload[:, :64].numpy()
    scales = payload[:, 64:72].numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    row = payload[:, 72:].contiguous().numpy().view(np.float32)
    codes = np.concatenate([packed & 15, packed >> 4], 1).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(codec.decode(payload, 128, torch.float32).numpy(), codes * (scales * row).repeat(16, 1))


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_largest_lands_on_the_last_code_or_rounds_to_it(element, scale):
    codec = Block(element, 8, scale)
    top = torch.linspace(1.0, 2.0, 513)[:, None].expand(-1, 8).contiguous()
    top[:, 1:] = 0
    decoded = codec.decode(codec.encode(top), 8, torch.float32)
    last = codec.encode(top)[:, 0] & 1
    assert last.max() <= 1
    assert ((decoded - top).abs() <= codec.step(top) * (0.5 + 2**-14) + 1e-6).all()


def test_a_power_of_two_scale_is_never_larger_than_needed():
    """Halving the scale must put the largest value more than half a step beyond the largest element."""
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    for name in ("mxfp4", "mxfp8_e4m3", "int4sg32_e8m0"):
        codec = parse(name)
        scale = codec.parts[1].decode(codec.encode(x)[:, -1:], 1)
        amax = x.abs().amax(1, keepdim=True)
        assert (amax <= codec.limit * scale).all()
        assert (amax > codec.limit * scale / 2).all()


def test_five_bit_exponents_reach_thirty_binades_below_the_rows_largest():
    codec = parse("fp4_e2m1g8_e5m0")
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 8], x[0, 16] = 1.0, 2.0**-20, 2.0**-40
    decoded = codec.decode(codec.encode(x), 32, torch.float32)
    assert decoded[0, 0] == 1.0
    assert decoded[0, 8] == 2.0**-20
    assert decoded[0, 16] == 0
    assert codec.step(x)[0, 16] > 2.0**-40


def test_rows_that_share_a_scale_are_not_cut():
    assert parse("mxfp4").segment(4096) == 32
    assert parse("fp8g128").segment(4096) == 128
    assert parse("nvfp4").segment(4096) == 4096
    assert parse("fp4_e2m1g32_e5m0").segment(4096) == 4096


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("spec", ["mxfp8_e4m3", "nvfp4", "fp8g128", "fp3_e1m1g8_e5m0"])
def test_nan_and_inf_poison_their_own_group_only(spec, poison):
    codec = parse(spec)
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    clean = codec.decode(codec.encode(x), 300, torch.float32)
    x[1, 70] = poison
    decoded = codec.decode(codec.encode(x), 300, torch.float32)
    expected = torch.zeros(2, 300, dtype=torch.bool)
    first = 70 // codec.group * codec.group
    expected[1, first : first + codec.group] = True
    assert torch.equal(decoded.isnan(), expected)
    assert torch.equal(decoded[0], clean[0])


@pytest.mark.parametrize(
    ("spelling", "bits"),
    [
        ("mxfp8_e4m3", 8.25),
        ("mxfp6_e2m3", 6.25),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5 + 32 / 4096),
        ("fp8g128", 8.25),
        ("fp4_e2m1g8_e5m0", 4.625 + 8 / 4096),
        ("fp3_e1m1g32_e5m0", 3.15625 + 8 / 4096),
        ("int5sg16_e8m0", 5.5),
    ],
)
def test_bits_are_the_formula(spelling, bits):
    codec = parse(spelling)
    assert codec.bits_per_value(4096) == bits
    assert codec.encode(torch.zeros(1, 4096)).shape[1] * 8 == bits * 4096


def test_names_and_systematic_spellings_are_one_format():
    for name, codec in NAMES.items():
        assert str(codec) == name
    assert str(parse("fp4_e2m1g32")) == "mxfp4"
    assert str(parse("fp4_e2m1g16_e4m3")) == "nvfp4"
    assert str(parse("fp8_e4m3g128_fp32")) == "fp8g128"
    assert str(parse("fp5_e2m2")) == "fp5_e2m2g32"
    with pytest.raises(ValueError, match=r"no block format of 'fp9'.*Elements: fp8_e4m3"):
        Block("fp9", 32)
