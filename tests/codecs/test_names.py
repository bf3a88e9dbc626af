"""Names of codecs in compiled graphs: every codec is found again, and never another."""

import pytest
import torch

import flashcomm
import formats
from flashcomm.codecs import Affine, Features, name_of, named


class Mine(Affine):
    """A format of an application, which no entry point names."""

    def __str__(self) -> str:
        return f"mine{self.bits}"


@pytest.mark.parametrize("spec", formats.SPECS)
def test_a_spelling_is_its_own_name(spec):
    assert named(name_of(spec)) == flashcomm.codec(spec)
    assert name_of(flashcomm.codec(spec)) == str(flashcomm.codec(spec))


@pytest.mark.parametrize("spec", ["int4static", "int4g32+keep8", "int4g32+keep8:int8g32"])
def test_a_bound_codec_is_found_with_its_calibration(spec):
    codec = flashcomm.codec(spec)
    one, other = (codec.bind(Features(torch.full((3, 64), reach)), 0) for reach in (1.0, 2.0))
    assert len({name_of(codec), name_of(one), name_of(other)}) == 3
    assert [named(name_of(c)) for c in (codec, one, other)] == [codec, one, other]


def test_a_codec_without_an_entry_point():
    codec = Mine(4, False, 32)
    assert named(name_of(codec)) == codec
    with pytest.raises(ValueError, match="two different codecs call themselves 'mine4'"):
        name_of(Mine(4, False, 64))


def test_unknown_names():
    with pytest.raises(ValueError, match="the codec 'int4static@0', which this process does not have: compile"):
        named("=int4static@0")
    with pytest.raises(ValueError, match="unknown codec 'int9'"):
        name_of("int9")
