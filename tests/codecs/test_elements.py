"""Small floats, value by value, against implementations that others maintain."""

import ml_dtypes
import numpy as np
import pytest
import torch

pytest.importorskip("gfloat", reason="pip install gfloat")
import gfloat

from flashcomm.codecs.elements import ELEMENTS

THEIRS = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}


def every_code(element):
    magnitudes = torch.arange(element.last + 1)
    return torch.cat([magnitudes, magnitudes | 1 << element.bits - 1])


def samples(element):
    """Representable numbers, the middles between them, neighbours of both in fp32, and random numbers."""
    values = element.values()
    middles = (values[1:] + values[:-1]) / 2
    random = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) * element.top
    small = random[:10_000] * 2.0 ** -torch.arange(20).repeat(500)
    x = torch.cat([values, middles, random, small])
    x = torch.cat([x, torch.nextafter(x, x * 2), torch.nextafter(x, x * 0)])
    x = x[x <= element.top]
    return torch.cat([x, -x])


@pytest.mark.parametrize("name", THEIRS)
def test_ml_dtypes_reads_and_writes_the_same_codes(name):
    element = ELEMENTS[name]
    codes = every_code(element)
    theirs = codes.numpy().astype(np.uint8).view(THEIRS[name]).astype(np.float32)
    assert np.array_equal(element.decode(codes).numpy(), theirs)
    assert np.array_equal(np.signbit(element.decode(codes).numpy()), np.signbit(theirs))
    x = samples(element)
    assert np.array_equal(element.encode(x).numpy(), x.numpy().astype(THEIRS[name]).view(np.uint8))


@pytest.mark.parametrize(("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_torch_reads_and_writes_the_same_codes(name, dtype):
    element = ELEMENTS[name]
    codes = every_code(element)
    assert torch.equal(element.decode(codes), codes.to(torch.uint8).view(dtype).float())
    x = samples(element)
    assert torch.equal(element.encode(x), x.to(dtype).view(torch.uint8).int())


@pytest.mark.parametrize("name", ELEMENTS)
def test_gfloat_reads_and_writes_the_same_codes(name):
    """All rows of the table, also those that no array library has."""
    element = ELEMENTS[name]
    finite = 2 ** (element.bits - 1) - 1
    theirs = gfloat.FormatInfo(
        name, element.bits, element.mantissa + 1, bias=2 ** (element.exponent - 1) - 1, is_signed=True,
        domain=gfloat.Domain.Extended if name == "fp8_e5m2" else gfloat.Domain.Finite, has_nz=True,
        num_high_nans={"fp8_e4m3": 1, "fp8_e5m2": 3}.get(name, 0), has_subnormals=True, is_twos_complement=False,
    )  # fmt: skip
    assert element.last <= finite
    codes = every_code(element)
    expected = [gfloat.decode_float(theirs, int(code)).fval for code in codes]
    assert element.decode(codes).tolist() == expected
    x = samples(element)[::37]
    assert (
        element.encode(x).tolist()
        == gfloat.encode_ndarray(theirs, gfloat.round_ndarray(theirs, x.double().numpy())).tolist()
    )


@pytest.mark.parametrize("name", ELEMENTS)
def test_beyond_the_largest_is_the_largest(name):
    element = ELEMENTS[name]
    x = torch.tensor([element.top + element.half_step, element.top * 100, 1e38, -1e38])
    sign = 1 << element.bits - 1
    assert element.encode(x).tolist() == [element.last, element.last, element.last, element.last | sign]


@pytest.mark.parametrize("name", ELEMENTS)
def test_spacing_is_the_distance_of_neighbours(name):
    element = ELEMENTS[name]
    values = element.values()
    assert torch.equal(element.spacing(values[:-1]), values[1:] - values[:-1])


def test_up_never_rounds_down():
    element = ELEMENTS["fp8_e4m3"]
    x = samples(element).abs()
    up = element.decode(element.encode(x, up=True))
    assert (up >= x).all()
    assert (up - x < element.spacing(x)).all()
