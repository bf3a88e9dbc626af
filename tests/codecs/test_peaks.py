import itertools
import math

import pytest
import torch

from flashcomm import kernels
from flashcomm.codecs import parse
from flashcomm.codecs.peaks import LEVELS, Peaks, levels, table


def roundtrip(spec, x):
    codec = parse(spec)
    return codec.decode(codec.encode(x), x.shape[1], torch.float32)


def test_size():
    assert parse("nf4+peaks").bits_per_value(576) == 4 + (16 + 4 * (16 + 10)) / 576
    assert parse("nf5+peaks").bits_per_value(4096) == 5 + (16 + 32 * (16 + 12)) / 4096
    assert [parse("nf4+peaks").count(cols) for cols in (0, 1, 127, 255, 256, 70000)] == [0, 1, 1, 1, 2, 546]
    assert parse("nf4+peaks").place_widths(70000) == [8, 8, 1]


@pytest.mark.parametrize("bits", LEVELS)
def test_levels_are_fixed_points_of_lloyds_iteration(bits):
    """Each level is the mean of a unit Gaussian between the middles to its neighbours, to half a unit of its last place
    and what the same rounding of the neighbours moves it.
    """
    known = levels(bits)
    edges = [-math.inf, *((a + b) / 2 for a, b in itertools.pairwise(known)), math.inf]
    density = [math.exp(-edge * edge / 2) / math.sqrt(2 * math.pi) for edge in edges]
    below = [math.erfc(-edge / math.sqrt(2)) / 2 for edge in edges]
    for i, level in enumerate(known):
        mean = (density[i] - density[i + 1]) / (below[i + 1] - below[i])
        assert abs(mean - level) <= 1 / 4096
    assert known == [-level for level in reversed(known)]
    assert table(bits) == sorted(table(bits))
    assert set(table(bits)) == set(range(2 ** (bits - 1)))


def test_peaks_are_exact_and_cost_the_rest_nothing():
    x = torch.randn(20, 576, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    alone = (roundtrip("nf4+peaks", x) - x).square().mean()
    places = [3, 70, 71, 575]
    x[:, places] = torch.tensor([1e4, -3e3, 5e5, -1e30]).bfloat16().float()
    decoded = roundtrip("nf4+peaks", x)
    assert torch.equal(decoded[:, places], x[:, places])
    others = [i for i in range(576) if i not in places]
    assert (decoded - x)[:, others].square().mean() < 1.1 * alone


def test_of_equal_magnitudes_the_first_are_peaks():
    x = torch.ones(1, 512)
    x[0, ::2] = -1.0
    payload = Peaks(4).encode(x)
    # Codes, a scale and four peaks; then places 0 to 3: a byte each, and their ninth bits.
    assert payload.shape == (1, 256 + 2 + 8 + 4 + 1)
    assert payload[0, -5:].tolist() == [0, 1, 2, 3, 0]
    x[0, 300], x[0, 299] = 2.0, -2.0
    assert Peaks(4).encode(x)[0, -5:].tolist() == [0, 1, 299 - 256, 300 - 256, 0b1100]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_bad_value_spoils_its_row_and_no_other(bad):
    codec, x = parse("nf4+peaks"), torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    clean = codec.encode(x)
    x[1, 100] = bad
    payload = codec.encode(x)
    assert torch.equal(payload[[0, 2]], clean[[0, 2]])
    decoded = codec.decode(payload, 200, torch.bfloat16)
    assert decoded[1].isnan().all()
    assert not decoded[[0, 2]].isnan().any()
    assert codec.step(x)[1].isnan().all()


def test_other_widths_and_names_are_refused():
    for name in ("nf2+peaks", "nf7+peaks"):
        with pytest.raises(ValueError, match="3 to 6 bits"):
            parse(name)
    for name in ("nf4", "nf4+peaks+hadamard", "nf4+peaks+spike", "int4+peaks"):
        with pytest.raises(ValueError, match=r"Allowed|a format with groups|affine format"):
            parse(name)
    assert str(parse("nf4+peaks+keep64")) == "nf4+peaks+keep64"


def test_a_place_beyond_the_row_writes_nowhere_else():
    codec, x = parse("nf4+peaks"), torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    payload = codec.encode(x)
    payload[0, -1] = 255
    for dtype in (torch.bfloat16, torch.float32):
        decoded = kernels.decode(payload, codec, cols=200, dtype=dtype)
        assert torch.equal(decoded, codec.decode(payload, 200, dtype))
        assert decoded[0, -1] == codec.decode(codec.encode(x), 200, dtype)[0, x[0].abs().argmax()]
