"""Pipeline stages in one process against stages that are models of their own."""

import copy
import itertools

import pytest
import torch
from torch import nn

import flashcomm
from flashcomm.accuracy.simulated import simulated
from flashcomm.demo import MODEL
from flashcomm.models.load import load_model
from flashcomm.policy import Hops, Policy

IDS = torch.randint(2, 250, (2, 48), generator=torch.Generator().manual_seed(3))


def policy(codec: str, sums: str = "none", min_bytes: int = 0) -> Policy:
    return Policy(codec=sums, min_bytes=min_bytes, algorithm="two_step", hops=Hops(pp=codec))


@torch.inference_mode()
def by_stages(model, cuts: list[int], codec: str) -> torch.Tensor:
    """Run models of some layers each, and hand on what a codec makes of their outputs."""
    edges, x = [0, *cuts, len(model.model.layers)], model.model.embed_tokens(IDS)
    for first, last in itertools.pairwise(edges):
        stage = copy.deepcopy(model)
        stage.model.layers = stage.model.layers[first:last]
        stage.config.num_hidden_layers = last - first
        if last == edges[-1]:
            return stage(inputs_embeds=x, use_cache=False).logits
        stage.model.norm = nn.Identity()
        x = stage.model(inputs_embeds=x, use_cache=False).last_hidden_state
        rows = x.reshape(-1, x.shape[-1])
        x = flashcomm.decode(flashcomm.encode(rows, codec), codec, cols=rows.shape[1], dtype=x.dtype).view(x.shape)
    raise AssertionError


@torch.inference_mode()
def logits(model, ranks: int, stages: int, given: Policy) -> torch.Tensor:
    with simulated(model, ranks, given, stages=stages):
        return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, torch.bfloat16)


@pytest.mark.parametrize(("stages", "cuts"), [(2, [4]), (3, [3, 6])])
def test_a_hop_rounds_what_a_stage_hands_on(model, stages, cuts):
    found = logits(model, 1, stages, policy("int4g128"))
    assert torch.equal(found, by_stages(model, cuts, "int4g128"))
    assert not torch.equal(found, by_stages(model, [cuts[0] + 1, *cuts[1:]], "int4g128"))


def test_lossless_changes_no_bit(model):
    with torch.inference_mode():
        plain = model(IDS, use_cache=False).logits
    assert torch.equal(logits(model, 1, 2, policy("lossless")), plain)
    assert torch.equal(logits(model, 1, 2, policy("none")), plain)
    # Hops add nothing to the sums of ranks.
    assert torch.equal(
        logits(model, 2, 2, policy("lossless", "int8g128")), logits(model, 2, 1, policy("none", "int8g128"))
    )


def test_hops_are_among_what_is_measured(model):
    with simulated(model, 1, policy("int8g128"), stages=3) as simulation:
        assert simulation.modules == {"model.layers.2": 256, "model.layers.5": 256}
        assert simulation.bits_per_value(policy("int8g128")) == 8.25
        seen = []
        simulation.observe = lambda name, parts, found: seen.append((name, len(parts), torch.equal(parts[0], found)))
        model(IDS, use_cache=False)
        simulation.policy = policy("int8g128", min_bytes=2**20)
        model(IDS, use_cache=False)
    assert seen == [(name, 1, same) for same in (False, True) for name in ("model.layers.2", "model.layers.5")]
    assert simulation.plain == {"message under the policy's min_bytes = 1 MiB": 2}


@pytest.mark.parametrize(
    ("ranks", "stages", "message"),
    [(1, 9, "9 pipeline stages of 8 layers: give 1 to 8"), (1, 1, r"1 rank\(s\) sum nothing"), (3, 2, "ranks=3")],
)
def test_what_cannot_be_cut_is_refused(model, ranks, stages, message):
    with pytest.raises(ValueError, match=message), simulated(model, ranks, stages=stages):
        pass
