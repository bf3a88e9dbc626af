"""Predicted costs against measured ones, for formats of every kind."""

import pytest
import torch

from flashcomm.accuracy.measuring import measure
from flashcomm.accuracy.metrics import FLOOR, KL
from flashcomm.accuracy.sensitivity import predict
from flashcomm.demo import MODEL
from flashcomm.models.load import load
from flashcomm.models.text import held_out_text, token_ids
from flashcomm.models.windows import windows
from flashcomm.policy import Policy, Rule

CODECS = ("ec5", "int5g128+hadamard", "fp8g128", "nvfp4")
LAST = "model.layers.7.mlp.down_proj"


@pytest.fixture(scope="module")
def model():
    # Some processors multiply bf16 ten times slower.
    return load(MODEL, torch.float32)[0]


@pytest.fixture(scope="module")
def texts(model):
    return windows(token_ids(load(MODEL, torch.float32)[1], [held_out_text()]), 512, 128)


def test_predictions_are_near_what_is_measured(model, texts):
    predicted = predict(model, 2, texts, CODECS, algorithm="two_step")
    assert predicted.shape == (17, len(CODECS))
    variants = {name: Policy(codec=name, algorithm="two_step") for name in (*CODECS, FLOOR)}
    alone = Policy(codec="none", algorithm="two_step", layers=(Rule(match=LAST, codec="nvfp4"),))
    found = measure(model, 2, variants | {"last": alone}, texts)
    *everywhere, floor, last = found.figures[1:, KL].double().mean((1, 2)).tolist()
    # They were 1 to 8 % apart. A lost factor of two, a gradient of another sum or another token is farther off.
    assert predicted.sum(0).tolist() == pytest.approx([kl - floor for kl in everywhere], rel=0.2)
    assert predicted[-1, -1].item() == pytest.approx(last, rel=0.2)


def test_labels_and_figures_are_the_same_again(model, texts, tmp_path):
    first, *others = (predict(model, 2, texts[:1], CODECS[:1], folder=folder) for folder in (None, tmp_path, tmp_path))
    assert all(torch.equal(first, other) for other in others)
    assert (tmp_path / "000000.pt").is_file()
    assert not torch.equal(first, predict(model, 2, texts[:1], CODECS[:1], seed=1, folder=tmp_path))
