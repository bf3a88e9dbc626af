"""Rounding at random: no mean error, codes that stay, one spelling, and what is refused."""

import pytest
import torch

from flashcomm import kernels
from flashcomm.codecs import parse

ROWS = 4096


def groups_alike() -> torch.Tensor:
    """Rows of the same values but for the first of each 32, which gives each row other keys."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, generator=generator).repeat(ROWS, 1)
    x[:, ::32] = torch.rand(ROWS, 4, generator=generator)
    return x


def is_unbiased(spec: str) -> bool:
    """Whether mean errors of values that are the same in all rows are within the bound and 4.5 standard errors."""
    x, codec = groups_alike(), parse(spec)
    error = (kernels.decode(kernels.encode(x, codec), codec, cols=128, dtype=torch.float32) - x).double()
    step = codec.step(x).double().mean(0)
    # A value next to a code may not have met its other neighbour yet.
    allowed = 2**-15 * step + 4.5 * error.std(0).clamp_min(step / 8) / ROWS**0.5
    return bool((error.mean(0).abs() <= allowed).all())


@pytest.mark.parametrize("spec", ["int4g32+sr", "int3sg32+sr", "fp8g32+sr", "int4g32+sr+hadamard", "fp8g32+sr+taco"])
def test_errors_are_0_on_average(spec):
    assert is_unbiased(spec)


@pytest.mark.parametrize("spec", ["int4g32", "fp8g32", "int4g32+hadamard"])
def test_those_of_the_nearest_code_are_not(spec):
    assert not is_unbiased(spec)


def test_neighbours_are_drawn_by_their_distance():
    """A quarter of the way up is one code up in a quarter of the rows, with five standard errors."""
    x = torch.zeros(ROWS, 32)
    x[:, 1], x[:, 2:20] = 15.0, 4.25
    x[:, 20:] = 15 * torch.rand(ROWS, 12, generator=torch.Generator().manual_seed(1))
    codec = parse("int4g32+sr")
    got = codec.decode(codec.encode(x), 32, torch.float32)
    assert set(got[:, 2:20].unique().tolist()) == {4.0, 5.0}
    shares = (got[:, 2:20] == 5).double().mean(0)
    assert ((shares - 0.25).abs() < 5 * (0.25 * 0.75 / ROWS) ** 0.5).all()


def test_a_value_that_is_a_code_stays_one():
    x = torch.arange(256).float().repeat(3, 1) + torch.tensor([[0.0], [-128.0], [1024.0]])
    codec = parse("int8g256+sr")
    assert torch.equal(codec.decode(codec.encode(x), 256, torch.float32), x)


def test_spelling():
    """The base rounds, so it comes first in the name, wherever it was given."""
    assert str(parse("fp8g128+taco+sr")) == "fp8g128+sr+taco"
    assert str(parse("int4+keep64+sr")) == "int4g128+sr+keep64"
    assert parse("int4g32+sr") != parse("int4g32")


@pytest.mark.parametrize("spec", ["mxfp4+sr", "nvfp4+sr", "ec4+sr", "nf4+peaks+sr"])
def test_formats_that_cut_are_refused(spec):
    with pytest.raises(ValueError, match=r"\+sr needs a format that cuts nothing off, not .*: int1 to int8"):
        parse(spec)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match="spikes are kept on an affine format"):
        parse("int4g32+spike+sr")
    with pytest.raises(ValueError, match="each once"):
        parse("int4g32+sr+sr")
