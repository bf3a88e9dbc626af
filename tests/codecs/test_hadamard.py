import pytest
import torch

from flashcomm.codecs import parse
from flashcomm.codecs.hadamard import Hadamard, _butterflies, blocks_of


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_transform_is_sylvesters_matrix_and_its_own_inverse(n):
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randint(-8, 9, (3, n), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(_butterflies(x), x @ matrix)
    assert torch.equal(_butterflies(_butterflies(x)), n * x)


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
