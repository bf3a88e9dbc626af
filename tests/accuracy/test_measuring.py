"""A measurement that is interrupted goes on, and one of other things begins anew."""

import pytest
import torch

from flashcomm.accuracy.measuring import measure
from flashcomm.accuracy.metrics import AGREES, KL, NLL
from flashcomm.demo import MODEL
from flashcomm.models.load import load
from flashcomm.policy import Policy


@pytest.fixture(scope="module")
def model():
    found, _ = load(MODEL, torch.bfloat16)
    del found.model.layers[2:]
    found.config.num_hidden_layers = 2
    return found


def texts(count: int = 3, tokens: int = 65) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 4000, (tokens,), generator=generator) for _ in range(count)]


VARIANTS = {codec: Policy(codec=codec) for codec in ("fp32", "int8g128", "int2g32")}


def test_figures_and_depth(model):
    found = measure(model, 2, VARIANTS, texts())
    assert found.names == ("none", *VARIANTS)
    assert found.bits == (16, 32, pytest.approx(8.25), pytest.approx(3))
    assert found.figures.shape == (4, 4, 3, 64)
    assert len(found.modules) == 5
    assert not found.figures[0, KL].any()
    assert found.figures[0, AGREES].all()
    floor, eight, two = found.figures[1:, KL].mean((1, 2)).tolist()
    # Two ranks have one order to add in, and bf16 + bf16 rounds once.
    assert floor == 0
    assert 0 < eight < two / 10
    assert (found.added[0] == found.added[1]).all()
    assert (found.added[3] > 10 * found.added[2]).all()
    assert (found.gathered[0] == 0).all()
    assert (found.gathered[3] > found.gathered[2]).all()
    # The first sum's inputs are plain's, so its whole distance is its own error, but for plain's own rounding.
    assert found.gathered[3, 0].item() == pytest.approx(found.added[3, 0].item(), rel=0.01)
    nll = torch.nn.functional.cross_entropy(model(texts()[0][None]).logits[0, :-1].float(), texts()[0][1:])
    assert found.figures[0, NLL, 0].mean().item() == pytest.approx(nll.item(), rel=0.01)


class Stopped(Exception):
    pass


def test_an_interrupted_measurement_goes_on(model, tmp_path):
    whole = measure(model, 2, VARIANTS, texts())
    calls = []

    passes = len(VARIANTS) + 1

    def stop_at_two():
        calls.append(1)
        if len(calls) == 2 * passes:
            raise Stopped

    with pytest.raises(Stopped):
        measure(model, 2, VARIANTS, texts(), folder=tmp_path, origin="a", progress=stop_at_two)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    assert sorted(kept) == ["000000.pt", "000001.pt"]
    calls.clear()
    again = measure(model, 2, VARIANTS, texts(), folder=tmp_path, origin="a", progress=lambda: calls.append(1))
    assert len(calls) == passes * len(texts())
    assert all(path.stat().st_mtime_ns == kept[path.name] for path in tmp_path.glob("*.pt") if path.name in kept)
    assert torch.equal(again.figures, whole.figures)
    assert torch.equal(again.depth, whole.depth)


@pytest.mark.parametrize(
    "change",
    [
        dict(origin="b"),
        dict(ranks=4),
        dict(variants={"int8g128": Policy(codec="int8g128")}),
        dict(windows=texts(2, 33)),
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_measurement_begins_anew(model, tmp_path, change):
    setting = dict(ranks=2, variants=VARIANTS, windows=texts(2), origin="a")
    measure(model, **setting, folder=tmp_path)
    before = (tmp_path / "000000.pt").stat().st_mtime_ns
    found = measure(model, **(setting | change), folder=tmp_path)
    assert (tmp_path / "000000.pt").stat().st_mtime_ns > before
    assert torch.equal(found.figures, measure(model, **(setting | change)).figures)


def test_windows_of_different_lengths_are_refused(model):
    with pytest.raises(ValueError, match="one or more windows of the same length"):
        measure(model, 2, VARIANTS, [texts()[0], texts()[0][:-1]])
    with pytest.raises(ValueError, match="one or more windows"):
        measure(model, 2, VARIANTS, [])
