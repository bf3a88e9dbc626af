"""Text that formats are calibrated on is not measured."""

import pytest
import torch

pytest.importorskip("greenlet", reason="pip install greenlet")
from flashcomm.demo.measure import _calibration_windows
from flashcomm.models.windows import rest, windows


@pytest.mark.parametrize(("length", "tokens"), [(5000, 2048), (4096, 3072), (3000, 1024), (1500, 9000)])
def test_what_is_left_is_not_measured(length, tokens):
    ids = torch.arange(length)
    measured = torch.cat(windows(ids, tokens)).unique()
    left = rest(ids, tokens)
    assert torch.equal(torch.cat([measured, left]).sort().values, ids)


def test_too_little_text_to_calibrate_on_is_said_before_the_model_runs():
    ids = torch.arange(4096)
    found = _calibration_windows(None, ids, 3072, given=True)
    assert torch.equal(torch.cat(found), rest(ids, 3072))
    with pytest.raises(ValueError, match="0 tokens besides those to measure on: .* fewer --tokens"):
        _calibration_windows(None, ids, 4096, given=True)
