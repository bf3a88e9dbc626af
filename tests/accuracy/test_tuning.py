"""The choice against trying everything, and a policy that meets its budget."""

import itertools

import pytest
import torch

from flashcomm.accuracy import tuning
from flashcomm.accuracy.measuring import measure
from flashcomm.accuracy.metrics import summarise
from flashcomm.demo import MODEL
from flashcomm.models.load import load
from flashcomm.models.text import held_out_text
from flashcomm.models.windows import windows
from flashcomm.policy import Policy


def cheapest(costs: torch.Tensor, sizes: torch.Tensor, budget: float) -> float:
    """The least size of all choices within the budget."""
    rows = range(len(costs))
    choices = itertools.product(range(costs.shape[1]), repeat=len(costs))
    within = (c for c in choices if sum(costs[r, c[r]].item() for r in rows) <= budget)
    return min((sum(sizes[r, c[r]].item() for r in rows) for c in within), default=float("inf"))


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_cheapest_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(5, 4, generator=generator) ** 3
    sizes = torch.randint(1, 50, (5, 4), generator=generator).float()
    budget = 0.2 + torch.rand((), generator=generator).item()
    found = tuning.allocate(costs, sizes, budget)
    best = cheapest(costs, sizes, budget)
    if found is None:
        assert cheapest(costs, sizes, 0.999 * budget) == float("inf")
        return
    assert sum(costs[row, column].item() for row, column in enumerate(found)) <= budget
    size = sum(sizes[row, column].item() for row, column in enumerate(found))
    # Costs are rounded up by less than 1 in 10,000 of the budget each.
    assert best <= size <= cheapest(costs, sizes, 0.9995 * budget)


def test_a_budget_that_nothing_meets():
    assert tuning.allocate(torch.tensor([[2.0, 3.0]]), torch.ones(1, 2), budget=1) is None
    assert tuning.allocate(torch.tensor([[2.0, 3.0]]), torch.ones(1, 2), budget=0) is None


def test_a_policy_meets_its_budget_with_fewer_bits_than_one_codec(tmp_path):
    # Some processors multiply bf16 ten times slower.
    model, tokenizer = load(MODEL, torch.float32)
    # Two layers, so that the test is short; what the model then says does not matter.
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    texts = windows(torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"]), 768, 64)
    codecs = ("int3g32", "int5g128", "int8g128")

    def tune(budget, folder):
        return tuning.tune(model, 2, budget, texts[:2], texts[2:], codecs, algorithm="two_step", folder=folder)

    tuned = tune(0.01, tmp_path)
    assert tuned.row.kl.high <= 0.01
    # A cheaper codec for all is not within the budget, whether it was measured or predicted.
    cheaper = measure(model, 2, {"int3g32": Policy(codec="int3g32", algorithm="two_step")}, texts[2:])
    assert tuned.best_uniform.codec == "int5g128"
    assert summarise(cheaper.names, cheaper.bits, cheaper.figures)[1].kl.low > 0.01
    assert tuned.saved > 0
    assert tuned.row.bits_per_value < tuned.best_uniform.bits_per_value
    found = measure(model, 2, {"policy": tuned.policy}, texts[2:])
    assert summarise(found.names, found.bits, found.figures)[1].kl == tuned.row.kl
    assert all(str(tuned.policy.codec_for(name)) == codec for name, codec in tuned.choice.items())
    # It goes on from what is in the folder.
    assert tune(0.01, tmp_path) == tuned
    tuned.policy.save(tmp_path / "policy.toml", tuning.evidence(tuned, ["a test"]))
    assert Policy.load(tmp_path / "policy.toml") == tuned.policy
    assert "model.layers.1.mlp.down_proj" in (tmp_path / "policy.toml").read_text()
    with pytest.raises(ValueError, match="no candidate meets a KL of 1e-09: int8g128 has up to .* larger budget"):
        tune(1e-9, tmp_path)
