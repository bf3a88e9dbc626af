import pytest
import torch

from flashcomm.codecs import Affine, Block, Spike, parse


def roundtrip(spec, x):
    codec = parse(spec)
    return codec.decode(codec.encode(x), x.shape[1], torch.float32)


def test_int2g32_has_less_than_four_bits():
    codec = parse("int2g32+spike")
    assert codec.bits_per_value(4096) == 2 + (32 + 8 + 8 + 10) / 32 == 3.8125
    assert codec.encode(torch.zeros(3, 4096)).shape == (3, 3.8125 * 4096 / 8)
    assert parse("int4sg32+spike").bits_per_value(4096) == 4 + (32 + 8 + 10) / 32


@pytest.mark.parametrize("spec", ["int1g32+spike", "int2g32+spike", "int8sg100+spike", "int2g256+spike"])
def test_smallest_and_largest_of_each_group_are_kept(spec):
    x = torch.randn(7, 600, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    x[:, 5], x[:, 40] = 1000.0, -3008.0
    decoded = roundtrip(spec, x)
    group = parse(spec).group
    for start in range(0, 600, group):
        part, got = x[:, start : start + group], decoded[:, start : start + group]
        for places in (part.argmin(1, keepdim=True), part.argmax(1, keepdim=True)):
            assert torch.equal(got.gather(1, places), part.gather(1, places))


def test_the_rest_has_its_own_range():
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    alone = (roundtrip("int2g32+spike", x) - x).square().mean()
    x[:, 3], x[:, 17] = 1e4, -1e4
    error = (roundtrip("int2g32+spike", x) - x)[:, torch.arange(32) != 3].square()
    assert error[:, torch.arange(31) != 16].mean() < 2 * alone
    assert (roundtrip("int2g32", x) - x).square().mean() > 1e3 * alone


def test_groups_without_a_rest_and_with_an_equal_rest_are_exact():
    sparse = torch.zeros(1, 32)
    sparse[0, 3], sparse[0, 9] = -5.0, 7.0
    for x in (sparse, torch.full((1, 32), 3.25), torch.tensor([[1.5, -2.5]]), torch.tensor([[9.0]])):
        assert torch.equal(roundtrip("int2g32+spike", x), x)


def test_an_offset_is_no_obstacle():
    """The centre is counted from the spike that is nearest to zero."""
    x = 10 + 0.1 * torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    assert (roundtrip("int4g32+spike", x) - x).abs().max() < 0.05


def test_ties_keep_the_first():
    x = torch.tensor([[2.0, 1.0, 2.0, 1.0, 1.5, 1.25, 1.75, 1.5]])
    payload = parse("int2g8+spike").encode(x)
    # Two bytes of codes, low and high, a scale, a centre, then the places: 1 and 0, three bits each.
    assert payload.shape == (1, 2 + 4 + 1 + 1 + 2)
    assert payload[0, 2:6].tolist() == [0x80, 0x3F, 0x00, 0x40]
    assert payload[0, -2:].tolist() == [1, 0]


def test_only_affine_formats_with_small_groups_have_spikes():
    with pytest.raises(ValueError, match="groups of at most 256.*not on int2g512"):
        parse("int2g512+spike")
    with pytest.raises(ValueError, match="an affine format.*not on mxfp4"):
        Spike(Block("fp4_e2m1", 32))
    assert str(Spike(Affine(2, False, 32))) == "int2g32+spike"
