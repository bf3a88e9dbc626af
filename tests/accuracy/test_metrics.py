"""Figures that can be checked by hand, and intervals that hold what they promise."""

import math

import pytest
import torch

from flashcomm.accuracy.metrics import AGREES, KL, KL_TOP, NLL, by_position, compare, summarise


def test_figures_of_two_distributions():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = compare(p.log(), q.log() + 7, torch.tensor([0]))[:, 0]
    assert found[NLL].item() == pytest.approx(math.log(4))
    assert found[KL].item() == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert found[AGREES].item() == 0


def test_the_top_20_never_know_more_than_all():
    torch.manual_seed(0)
    p = 3 * torch.randn(700, 500)
    q, targets = p + torch.randn(700, 500), torch.randint(500, (700,))
    found = compare(p.bfloat16(), q.bfloat16(), targets)
    assert found.shape == (4, 700)
    assert (found[KL_TOP] >= -1e-6).all()
    assert (found[KL_TOP] <= found[KL] + 1e-5).all()
    assert found[KL_TOP].mean() > found[KL].mean() / 4
    assert torch.equal(found, compare(p.bfloat16(), q.bfloat16(), targets, rows=100))
    same = compare(p, p, targets)
    assert same[KL].abs().max() == same[KL_TOP].abs().max() == 0
    assert (same[AGREES] == 1).all()
    few = compare(p[:, :5], q[:, :5], targets % 5)
    assert torch.allclose(few[KL], few[KL_TOP], atol=1e-6)


def figures(windows: int, tokens: int, seed: int) -> torch.Tensor:
    """Figures of plain, and of a codec with a mean KL of 1 that varies from window to window."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(2, 4, windows, tokens)
    found[:, NLL] = 2
    found[1, NLL] += 0.1 * torch.randn(windows, tokens, generator=generator)
    found[1, KL] = torch.rand(windows, 1, generator=generator) + torch.rand(windows, tokens, generator=generator)
    found[:, AGREES] = 1
    return found


def test_intervals_hold_the_truth_nineteen_times_of_twenty():
    inside = 0
    for seed in range(100):
        row = summarise(["none", "codec"], [16, 4], figures(20, 16, seed))[1]
        assert row.kl.low <= row.kl.value <= row.kl.high
        inside += row.kl.low <= 1 <= row.kl.high
    # Resamples of 20 windows are a little too narrow: 92 to 93 are expected, and 82 is four deviations below.
    assert 82 <= inside < 100


def test_a_row():
    found = figures(10, 50, 0)
    plain, row = summarise(["none", "codec"], [16, 4.25], found)
    assert plain.perplexity.value == pytest.approx(math.exp(2))
    assert plain.kl == (0, 0, 0)
    assert plain.top1.value == 1
    delta = (found[1, NLL] - found[0, NLL]).abs().flatten()
    assert row.delta_mean.value == pytest.approx(delta.mean().item(), rel=1e-6)
    assert row.delta_p95.value == delta.sort().values[math.ceil(0.95 * 500) - 1].item()
    assert row.delta_p95.low < row.delta_p95.value < row.delta_p95.high
    flat = row.as_dict()
    assert flat["codec"] == "codec"
    assert (flat["kl_low"], flat["kl"], flat["kl_high"]) == (row.kl.low, row.kl.value, row.kl.high)
    assert summarise(["none", "codec"], [16, 4.25], found)[1] == row
    assert summarise(["none", "codec"], [16, 4.25], found, seed=1)[1].kl.low != row.kl.low


def test_positions():
    found = torch.zeros(1, 4, 2, 9)
    found[:, KL] = torch.arange(9.0)
    assert by_position(found, 3).tolist() == [[1, 4, 7]]
