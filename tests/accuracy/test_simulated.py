"""One process against real ranks: the same bits, for every kind of model and codec."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ranks
from flashcomm.accuracy.simulated import calibrate, ring_sum, simulated
from flashcomm.codecs import parse
from flashcomm.demo import MODEL
from flashcomm.integrations import transformers as integration
from flashcomm.models.load import load, load_model
from flashcomm.policy import Policy, Rule
from thorough import thorough

CODECS = ("int8g128", "int4g32", "mxfp4", "int2g32+spike", "fp32")
ALGORITHMS = ("one_step", "two_step")
MIXED = Policy(
    codec="int8g128",
    min_bytes=0,
    algorithm="two_step",
    layers=(Rule(match="*.down_proj", codec="int4g32"), Rule(match="model.layers.1.*", codec="none")),
)


def ids(tokens: int = 48) -> torch.Tensor:
    return torch.randint(2, 250, (2, tokens), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def digest(model) -> str:
    logits = model(ids(), use_cache=False).logits.contiguous()
    return hashlib.sha256(logits.view(torch.uint8).numpy().tobytes()).hexdigest()


def policies() -> list[Policy]:
    uniform = [Policy(codec=codec, algorithm=a, min_bytes=0) for codec in CODECS for a in ALGORITHMS]
    return [*uniform, MIXED]


def real(path: Path, dtype: torch.dtype, policies: list[Policy]) -> list[str]:
    """Return a rank's logits with each policy."""
    model = load_model(path, dtype)
    with integration.compressed(model, "none") as handle:
        found = []
        for policy in policies:
            handle.codec = policy
            found.append(digest(model))
        return found


def simulate(path: Path, dtype: torch.dtype, policies: list[Policy], count: int) -> list[str]:
    model = load_model(path, dtype)
    with simulated(model, count) as simulation:
        found = []
        for policy in policies:
            simulation.policy = policy
            found.append(digest(model))
    return found


@pytest.mark.parametrize(("count", "dtype"), [(2, torch.bfloat16), thorough(4, torch.float32)], ids=str)
def test_the_bundled_model_has_the_bits_of_real_ranks(count, dtype):
    theirs = ranks.shared(count).run(real, MODEL, dtype, policies())
    ours = simulate(MODEL, dtype, policies(), count)
    assert all(rank == ours for rank in theirs)
    # Another codec or algorithm is another result, so that equal bits say something.
    assert len(set(ours)) >= len(ours) - 2


def tiny(name: str, path: Path, kv_heads: int = 4, vocab_size: int = 256) -> Path:
    """A random model of two layers with eight heads."""
    import transformers as hf

    sizes = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=8, vocab_size=vocab_size, intermediate_size=128
    )
    sizes |= dict(num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=128, pad_token_id=255)
    sizes["vocab_size"] = vocab_size
    few = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    config = {
        "llama, biased": lambda: hf.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True),
        "qwen3": lambda: hf.Qwen3Config(**sizes),
        "mistral": lambda: hf.MistralConfig(**sizes, sliding_window=16),
        "gemma2": lambda: hf.Gemma2Config(**sizes),
        "gemma3": lambda: hf.Gemma3TextConfig(**sizes),
        "phi3": lambda: hf.Phi3Config(**sizes),
        "mixtral": lambda: hf.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2),
        "qwen3 moe": lambda: hf.Qwen3MoeConfig(**sizes, **few),
        "qwen2 moe": lambda: hf.Qwen2MoeConfig(**sizes, **few, shared_expert_intermediate_size=64),
    }[name]()
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.7)
    model.save_pretrained(path)
    return path


KINDS = ("llama, biased", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "qwen3 moe", "qwen2 moe")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_has_the_bits_of_real_ranks(name, tmp_path):
    path = tiny(name, tmp_path)
    some = [Policy(codec="int4g32", algorithm="two_step", min_bytes=0), MIXED]
    ours = simulate(path, torch.bfloat16, some, 2)
    assert ranks.shared(2).run(real, path, torch.bfloat16, some) == [ours] * 2


@pytest.mark.parametrize(
    ("name", "kv_heads"), [("llama, biased", 1), ("qwen3", 2), ("gemma3", 1), ("phi3", 1), ("mixtral", 2)]
)
def test_key_value_heads_are_copied_where_they_are_fewer_than_ranks(name, kv_heads, tmp_path):
    path = tiny(name, tmp_path, kv_heads)
    some = [Policy(codec="int4g32", algorithm="two_step", min_bytes=0), MIXED]
    ours = simulate(path, torch.bfloat16, some, 4)
    assert ranks.shared(4).run(real, path, torch.bfloat16, some) == [ours] * 4
    assert len(set(ours)) == 2


def test_copied_heads_compute_what_one_process_computes(tmp_path):
    model = load_model(tiny("llama, biased", tmp_path, 2), torch.float32)
    whole = model(ids(), use_cache=False).logits
    with simulated(model, 8):
        split = model(ids(), use_cache=False).logits
    assert torch.allclose(split, whole, rtol=1e-4, atol=1e-4)
    # The second head matters, so it was there.
    model.model.layers[0].self_attn.v_proj.weight.data[16:].zero_()
    assert not torch.allclose(model(ids(), use_cache=False).logits, whole, rtol=1e-4, atol=1e-4)


def test_a_shape_of_three_ranks_has_the_bits_of_real_ranks(tmp_path):
    """SmolLM2's heads and features, which no power of two divides."""
    import transformers as hf

    sizes = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=256)).save_pretrained(tmp_path)
    codecs = ("int8g128+hadamard", "int4g128", "fp32")
    some = [Policy(codec=codec, algorithm=a, min_bytes=0) for codec in codecs for a in ALGORITHMS]
    ours = simulate(tmp_path, torch.bfloat16, some, 3)
    assert ranks.shared(3).run(real, tmp_path, torch.bfloat16, some) == [ours] * 3
    assert len(set(ours)) >= 5


def reach(path: Path, windows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model, _ = load(path, torch.float32)
    return {n: f.reach for n, f in integration.calibrate(model, windows).features.items()}


def test_calibration_is_that_of_real_ranks():
    windows = [ids(32)[0], ids(32)[1]]
    model, _ = load(MODEL, torch.float32)
    ours = calibrate(model, 2, windows)
    theirs = ranks.shared(2).run(reach, MODEL, windows)[0]
    assert {name: f.reach.tolist() for name, f in ours.features.items()} == {n: r.tolist() for n, r in theirs.items()}
    with simulated(model, 2, Policy(codec="int4g128+keep64", min_bytes=0), calibration=ours):
        kept = digest(model)
    with simulated(model, 2, Policy(codec="int4g128", min_bytes=0)):
        assert digest(model) != kept


def gloo_sum(x: torch.Tensor) -> torch.Tensor:
    x = (x * (dist.get_rank() + 1) ** 0.5).clone()
    dist.all_reduce(x)
    return x


def test_plain_adds_in_the_order_of_a_ring():
    x = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = [x * (rank + 1) ** 0.5 for rank in range(4)]
    ours, theirs = ring_sum(parts), ranks.shared(4).run(gloo_sum, x)[0]
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, parts[0] + parts[1] + parts[2] + parts[3])


def test_the_model_is_as_it_was():
    model, _ = load(MODEL, torch.float32)
    before, forward = digest(model), model.model.layers[0].mlp.down_proj.forward
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with simulated(model, 8, Policy(codec="int2g32", min_bytes=0)):
        assert digest(model) != before
        with pytest.raises(RuntimeError):
            model.model.layers[0].mlp.down_proj(torch.zeros(1, 1, 7))
    assert digest(model) == before
    assert model.model.layers[0].mlp.down_proj.forward == forward
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_small_messages_and_modules_without_a_codec_are_plain():
    model, _ = load(MODEL, torch.bfloat16)
    found = {}
    for name, policy in {
        "plain": None,
        "small": Policy(codec="int4g32", min_bytes=ids().numel() * 256 * 2 + 1),
        "large enough": Policy(codec="int4g32", min_bytes=ids().numel() * 256 * 2),
        "no module": Policy(codec="none", layers=(Rule(match="another.*", codec="int4g32"),)),
    }.items():
        with simulated(model, 2, policy):
            found[name] = digest(model)
    assert found["plain"] == found["small"] == found["no module"] != found["large enough"]


def test_bits_are_those_of_each_sum():
    model, _ = load(MODEL, torch.bfloat16)
    with simulated(model, 2) as simulation:
        assert len(simulation.modules) == 17
        assert set(simulation.modules.values()) == {256}
        eight, four = (parse(codec).bits_per_value(256) for codec in ("int8g128", "int4g32"))
        policy = Policy(codec="int8g128", layers=(Rule(match="*.down_proj", codec="int4g32"),))
        assert simulation.bits_per_value(policy) == pytest.approx((9 * eight + 8 * four) / 17)


def test_what_cannot_be_simulated_is_refused(tmp_path):
    model, _ = load(MODEL, torch.float32)
    with (
        pytest.raises(ValueError, match="ranks=3 does not divide the 8 attention heads and 8 key/value"),
        simulated(model, 3),
    ):
        pass
    with pytest.raises(ValueError, match="1 rank.* sum nothing"), simulated(model, 1):
        pass
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp": "all_reduce"}
    split = "'model.layers.0.mlp' is split in the style 'all_reduce'"
    with pytest.raises(NotImplementedError, match=split), simulated(model, 2):
        pass
    model._tp_plan = {}
    with pytest.raises(ValueError, match="has no tensor-parallel plan"), simulated(model, 2):
        pass
    assert "forward" not in vars(model.model.layers[0].mlp.down_proj)
