"""Dispatch and combine of experts: one process against real ranks that exchange tokens, and the command."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_simulated import digest, ids, tiny
from typer.testing import CliRunner

import flashcomm
import ranks
from flashcomm.accuracy.simulated import simulated
from flashcomm.cli import app
from flashcomm.demo import MODEL
from flashcomm.models.load import load_model
from flashcomm.policy import Hops, Policy

HOPS = (
    Hops(),
    Hops(dispatch="int8g128"),
    Hops(combine="int4g32"),
    Hops(dispatch="fp8g128", combine="ec5"),
    Hops(combine="fp32"),
)


def policy(hops: Hops) -> Policy:
    return Policy(codec="none", min_bytes=0, hops=hops)


class Exchanged(torch.nn.Module):
    """The experts of one rank, to which the tokens of all ranks come, as vLLM's all-gather and reduce-scatter do it.

    Args:
        experts: transformers' own module, of all experts.
        hops: the codecs.
        skips_own: break it: this rank's own tokens do not pass through the codec.
    """

    def __init__(self, experts: torch.nn.Module, hops: Hops, skips_own: bool):
        super().__init__()
        rank, self.count = dist.get_rank(), experts.num_experts // dist.get_world_size()
        for name, whole in list(experts.named_parameters(recurse=False)):
            mine = whole[rank * self.count : (rank + 1) * self.count].clone()
            setattr(experts, name, torch.nn.Parameter(mine, requires_grad=False))
        experts.num_experts = self.count
        if hasattr(experts, "_is_expert_parallel"):
            experts._is_expert_parallel = True
        self.experts, self.hops, self.skips_own = experts, hops, skips_own

    def forward(self, hidden_states, top_k_index, top_k_weights):
        # Every rank knows all tokens here, and has a part of them, the later ranks fewer.
        size, rank, tokens = dist.get_world_size(), dist.get_rank(), len(hidden_states)
        sizes = [tokens // (2 * size)] * size
        sizes[0] += tokens - sum(sizes)
        hidden, index, weights = (x.split(sizes)[rank] for x in (hidden_states, top_k_index, top_k_weights))
        arrived = flashcomm.all_gather(hidden, self.hops.dispatch, output_split_sizes=sizes)
        if self.skips_own:
            arrived.split(sizes)[rank].copy_(hidden)
        index, weights = (flashcomm.all_gather(x, "none", output_split_sizes=sizes) for x in (index, weights))
        elsewhere = index // self.count != rank
        index = torch.where(elsewhere, self.count, index % self.count)
        found = self.experts(arrived, index, weights.masked_fill(elsewhere, 0))
        own = flashcomm.reduce_scatter(found, self.hops.combine, input_split_sizes=sizes)
        return flashcomm.all_gather(own, "none", output_split_sizes=sizes)


def real(path: Path, dtype: torch.dtype, hops: list[Hops], skips_own: bool = False) -> list[str]:
    """Return the digest of a rank's logits with each of `hops`."""
    found = []
    for one in hops:
        model = load_model(path, dtype, split=False)
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts = Exchanged(layer.mlp.experts, one, skips_own)
        found.append(digest(model))
    return found


def simulate(path: Path, dtype: torch.dtype, hops: list[Hops], count: int) -> list[str]:
    model = load_model(path, dtype)
    found = []
    with simulated(model, 1, expert_ranks=count) as simulation:
        for one in hops:
            simulation.policy = policy(one)
            found.append(digest(model))
    return found


@pytest.mark.parametrize(
    ("name", "count", "dtype"),
    [("mixtral", 2, torch.float32), ("qwen3 moe", 4, torch.bfloat16), ("qwen2 moe", 2, torch.bfloat16)],
    ids=str,
)
def test_one_process_has_the_bits_of_ranks_that_exchange_tokens(name, count, dtype, tmp_path):
    path = tiny(name, tmp_path)
    ours = simulate(path, dtype, HOPS, count)
    assert ranks.shared(count, by="connections").run(real, path, dtype, HOPS) == [ours] * count
    # Codecs, their places and the number of ranks change bits, so that equal bits say something.
    assert len(set(ours[:4])) == 4
    assert simulate(path, dtype, [HOPS[2]], 6 - count) != [ours[2]]
    # A rank that leaves its own tokens alone is found out.
    assert ours[1] not in ranks.shared(count, by="connections").run(real, path, dtype, [HOPS[1]], True)[0]


def test_an_uncompressed_exchange_computes_what_one_process_computes(tmp_path):
    model = load_model(tiny("mixtral", tmp_path), torch.float32)
    with torch.inference_mode():
        whole = model(ids(), use_cache=False).logits
        for count in (2, 4):
            with simulated(model, 1, expert_ranks=count):
                assert torch.allclose(model(ids(), use_cache=False).logits, whole, rtol=1e-4, atol=1e-4)
        # Undone: the module holds all experts again.
        assert torch.equal(model(ids(), use_cache=False).logits, whole)


def test_what_is_sent_is_observed_and_counted(tmp_path):
    model = load_model(tiny("mixtral", tmp_path), torch.bfloat16)
    seen = []
    given = policy(Hops(dispatch="int8g128", combine="int4g32"))
    with torch.inference_mode(), simulated(model, 1, given, expert_ranks=4) as simulation:
        simulation.observe = lambda name, parts, total: seen.append((name, len(parts), total.shape))
        model(ids(), use_cache=False)
    names = [f"model.layers.{layer}.mlp.experts.{kind}" for layer in (0, 1) for kind in ("dispatch", "combine")]
    assert seen == [(name, 4 if "combine" in name else 1, (96, 64)) for name in names]
    assert list(simulation.modules) == names
    bits = [flashcomm.codec(codec).bits_per_value(64, torch.bfloat16) for codec in ("int8g128", "int4g32")]
    assert simulation.bits_per_value(given) == sum(bits) / 2
    assert not simulation.plain
    with torch.inference_mode(), simulated(model, 1, policy(Hops(dispatch="int8g128")), expert_ranks=2) as simulation:
        model(ids(), use_cache=False)
    assert simulation.plain == {"codec none": 2}


def test_what_cannot_be_simulated_is_refused(tmp_path):
    model = load_model(tiny("mixtral", tmp_path), torch.float32)
    for sizes, message in (
        ({"ranks": 1, "expert_ranks": 3}, "4 experts do not divide evenly among 3 ranks: give one of 2, 4"),
        ({"ranks": 2, "expert_ranks": 2}, "experts are simulated over ranks that hold the rest of the model whole"),
        ({"ranks": 1, "expert_ranks": 2, "stages": 2}, "experts are simulated over ranks that hold the rest"),
    ):
        with pytest.raises(ValueError, match=message), simulated(model, **sizes):
            pass
    dense = load_model(MODEL, torch.bfloat16)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"), simulated(dense, 1, expert_ranks=2):
        pass
    experts = model.model.layers[0].mlp.experts
    experts.bias = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    with pytest.raises(NotImplementedError, match="not one slice per expert"), simulated(model, 1, expert_ranks=2):
        pass


def test_a_dense_model_as_experts_computes_the_same():
    spec = importlib.util.spec_from_file_location(
        "dense_as_experts", Path(__file__).parents[2] / "tools" / "dense_as_experts.py"
    )
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    dense = load_model(MODEL, torch.float32)
    made = tool.cut(dense, 8).eval()
    assert made.model.layers[0].mlp.experts.down_proj.shape == (8, 256, 96)
    with torch.inference_mode():
        found, plain = (model(ids(), use_cache=False).logits for model in (made, dense))
    assert torch.allclose(found, plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="--experts 3: give a power of two that divides the MLP's 768 features"):
        tool.cut(dense, 3)


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_the_command_measures_dispatch_combine_and_both(tmp_path):
    path = tiny("mixtral", tmp_path / "model", vocab_size=4096)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, path)
    given = tmp_path / "mine.toml"
    policy(Hops(dispatch="int4g32", combine="int8g128")).save(given)
    options = ("--tokens", 128, "--window", 64, "--dtype", "float32", "--out", tmp_path / "out")
    options = ("--codecs", "int8g128,int2g32", "--policy", given, *options, "--json", tmp_path / "a.json")
    done = invoke("accuracy", path, "--ep", 4, *options)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "a.json").read_text())
    assert (document["ranks"], document["expert_ranks"]) == (1, 4)
    rows = {row["codec"]: row for row in document["rows"]}
    each = [f"{place}{codec}" for codec in ("int8g128", "int2g32") for place in ("dispatch ", "combine ", "")]
    assert list(rows) == ["none", "fp32", *each, "mine"]
    assert rows["none"]["kl"] == 0 < rows["int8g128"]["kl"] < rows["combine int2g32"]["kl"]
    assert rows["dispatch int8g128"]["bits_per_value"] == (rows["int8g128"]["bits_per_value"] + 32) / 2
    assert "as 4 ranks with one share of the experts each compute it" in (tmp_path / "out" / "report.md").read_text()
    refused = {
        ("--ep", 3): "4 experts do not divide evenly among 3 ranks: give one of 2, 4",
        ("--ep", 1): "--ep 1: one rank exchanges nothing. Give --ep 2 or more",
        ("--ep", 2, "--tp", 2): "--ep measures ranks that hold all but the experts whole: leave out --tp",
        ("--ep", 2, "--kv"): "--kv measures caches, which no rank sums: leave out --ep",
        ("--ep", 2, "--codecs", "int8g128:int4g32"): "a hop is one transfer: use one format",
    }
    for arguments, message in refused.items():
        done = invoke("accuracy", path, *arguments, "--out", tmp_path / "no", "--tokens", 128, "--window", 64)
        assert done.exit_code == 2, arguments
        assert message in done.output.replace("\n", " "), arguments
