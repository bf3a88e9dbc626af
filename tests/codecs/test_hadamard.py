import pytest
import torch

import formats
import values
from flashcomm import kernels
from flashcomm.codecs import parse
from flashcomm.codecs.hadamard import Hadamard, blocks_of, butterflies


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_transform_is_sylvesters_matrix_and_its_own_inverse(n):
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randint(-8, 9, (3, n), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(butterflies(x), x @ matrix)
    assert torch.equal(butterflies(butterflies(x)), n * x)


def test_blocks_are_powers_of_two_that_add_up():
    for n in range(1, 300):
        found = blocks_of(n)
        assert sum(size for _, size in found) == n
        assert all(size & (size - 1) == 0 for _, size in found)


def test_an_outlier_costs_its_neighbours_less():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    x[:, ::100] *= 30

    def error(spec):
        codec = parse(spec)
        return (codec.decode(codec.encode(x), 512, torch.float32) - x).square().mean()

    assert error("int4g128+hadamard") < error("int4g128") / 4
    assert error("int4g128+taco") < error("int4g128") / 4


def test_taco_brings_any_scale_into_range():
    codec = parse("fp8g128+taco")
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    alpha = codec._alpha(x)
    assert torch.allclose(alpha, torch.full_like(alpha, 448), rtol=0.3)
    assert codec._alpha(x * 1e30).unique().tolist() == [pytest.approx(1e-3)]
    assert codec._alpha(x * 0).unique().tolist() == [1e3]
    assert codec.bits_per_value(4096) == 8.5


def test_a_transform_needs_groups():
    with pytest.raises(ValueError, match="a format with groups, not bf16"):
        Hadamard(parse("bf16"))
    with pytest.raises(ValueError, match=r"\+hadamard is not known or not possible on bf16"):
        parse("bf16+hadamard")


def test_kept_features_leave_before_the_transform_in_either_order():
    for name in ("int4g64+keep64+hadamard", "int4g64+hadamard+keep64"):
        assert str(parse(name)) == "int4g64+hadamard+keep64"
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    codec = formats.bound("int8g64+keep64+hadamard", 128)
    worst, others = list(codec.kept), [i for i in range(128) if i not in codec.kept]
    x[:, worst] *= 1000
    decoded = codec.decode(codec.encode(x), 128, torch.float32)
    assert torch.equal(decoded[:, worst], x[:, worst].float())
    rest = codec.base.decode(codec.base.encode(x[:, others]), 126, torch.float32)
    assert torch.equal(decoded[:, others], rest)


@pytest.mark.parametrize("suffix", ["hadamard", "taco"])
def test_spikes_among_transformed_values_are_refused(suffix):
    for name in (f"int2g32+spike+{suffix}", f"int2g32+spike+{suffix}+keep16"):
        with pytest.raises(ValueError, match=r"among transformed values.*take nf4\+peaks.* or int2g32\+hadamard"):
            parse(name)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_in_registers_equal_the_specification(group):
    """Whole vectors of 128 values, groups beyond the last of them, and rows that hold both kinds of NaN."""
    generator = torch.Generator().manual_seed(group)
    for cols in (128, 160, 352, 576, 1024):
        x = torch.randn(6, cols, generator=generator)
        x[1, 5], x[2, cols - 1], x[3, 70], x[3, 71], x[4] = torch.inf, torch.nan, torch.inf, -torch.inf, 3e38
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for base in ("int8", "int4s", "mxfp4"):
                codec = parse(f"{base}g{group}+hadamard" if base != "mxfp4" else f"fp4_e2m1g{group}+hadamard")
                payload = codec.encode(x.to(dtype))
                assert torch.equal(kernels.encode(x.to(dtype), codec), payload), f"{codec} {dtype} {cols}"
                broken = payload.clone()
                # Scales that are NaN of another pattern, which rounding would turn into a zero.
                broken[5, -8:] = 255
                for sent in (payload, broken):
                    decoded = kernels.decode(sent, codec, cols=cols, dtype=dtype)
                    wanted = codec.decode(sent, cols, dtype)
                    assert torch.equal(decoded.view(torch.uint8), wanted.view(torch.uint8)), f"{codec} {dtype} {cols}"


@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_packed_in_registers_equal_the_specification(group):
    """Every width on every pattern of bf16: NaN of any payload, Inf and subnormals, alone or mixed."""
    x = values.every_pattern(torch.bfloat16)
    x = torch.cat([x, x.T])
    for base in (f"int{bits}{symmetric}" for bits in range(1, 9) for symmetric in ("", "s")):
        codec = parse(f"{base}g{group}+hadamard")
        assert torch.equal(kernels.encode(x, codec), codec.encode(x)), codec
