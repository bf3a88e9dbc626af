"""A real transformers model over real ranks, on the newest and the oldest release that flashcomm supports."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives

import flashcomm
import promises
import ranks
from flashcomm.demo import MODEL
from flashcomm.integrations.transformers import compress, compressed, compression_of, tensor_parallel_argument
from flashcomm.policy import Policy, Rule
from thorough import thorough

_OLDEST = Path(sys.prefix) / "transformers-oldest"
_PLAIN = dist.all_reduce
OUTSIDE = "outside of the plan: made by no module that is compressed"


def newest():
    pytest.importorskip("transformers", reason="pip install 'flashcomm[transformers]'")
    return ranks.shared(2)


def oldest():
    if not (_OLDEST / "transformers").is_dir():
        pytest.skip(f"no {_OLDEST.name} in this environment: `make setup` installs it in .venv")
    return ranks.shared(2, str(_OLDEST))


both = pytest.mark.parametrize("release", [newest, oldest], ids=lambda f: f.__name__)


def version():
    import transformers

    return transformers.__version__


def tiny(name: str, folder: str) -> Path:
    """A random model of two layers, written by rank 0 with the release under test."""
    import transformers as hf

    path = Path(folder) / name
    if dist.get_rank() == 0:
        sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, vocab_size=256)
        sizes |= dict(intermediate_size=128, max_position_embeddings=128)
        torch.manual_seed(0)
        if name == "one key/value head":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, "num_key_value_heads": 1}, attention_bias=True))
        elif name == "biased":
            config = hf.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)
            model = hf.LlamaForCausalLM(config)
        else:
            model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.7)
        model.save_pretrained(path)
        tokenizer = hf.AutoTokenizer.from_pretrained(MODEL)
        tokenizer.save_pretrained(path)
    dist.barrier()
    return path


def loaded(path: Path, dtype=torch.float32):
    from flashcomm.models.load import load

    return load(path, dtype)


def ids(rows: int = 2, tokens: int = 24) -> torch.Tensor:
    return torch.randint(2, 250, (rows, tokens), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def logits(model, tokens: int = 24) -> torch.Tensor:
    return model(ids(tokens=tokens), use_cache=False).logits.clone()


def bundled_model():
    """Every sum of the bundled model goes through flashcomm, and back again after undo."""
    model, _ = loaded(MODEL)
    plain = logits(model)
    handle = compress(model, "fp32", algorithm="two_step")
    # With two ranks a sum has one order, so uncompressed payloads must give the very bits of the plain all-reduce.
    assert promises.same(logits(model), plain)
    # transformers 5.0 keeps the embedding whole on every rank, later releases split it.
    sharded_embedding = not version().startswith("5.0.")
    assert list(handle.modules.values()).count("rowwise") == 16
    assert list(handle.modules.values()).count("embedding_rowwise") == sharded_embedding
    assert len(handle.modules) == 16 + sharded_embedding
    assert set(handle.calls.values()) == {1}
    handle.codec = flashcomm.codec("int4g32")
    lossy = logits(model)
    assert not torch.equal(lossy, plain)
    assert all(promises.same(lossy, theirs) for theirs in promises.everyone(lossy))
    with pytest.raises(ValueError, match="compressed already"):
        compress(model, "int8")
    other, _ = loaded(MODEL)
    calls = dict(handle.calls)
    assert promises.same(logits(other), plain)
    assert handle.calls == calls
    handle.undo()
    handle.undo()
    with compressed(model, "int4g32", modules=r"layers\.[01]\..*o_proj", algorithm="two_step") as some:
        assert list(some.modules) == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
        assert not torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="no module to compress: .* matches 'nothing'"):
        compress(model, modules="nothing")
    assert promises.same(logits(model), plain)
    assert handle.calls == calls
    assert dist.all_reduce is _PLAIN
    return flashcomm.stats()["plain"]


def biases_once(folder):
    """Row-parallel layers with biases: added once, after the sum."""
    model, _ = loaded(tiny("biased", folder))
    plain = logits(model)
    with compressed(model, "fp32", algorithm="two_step") as handle:
        assert promises.same(logits(model), plain)
        assert set(handle.calls.values()) == {1}
    with compressed(model, "int8g32", algorithm="one_step"):
        close = logits(model)
    assert 0 < (close - plain).abs().max() < plain.abs().max() / 10


def copies_heads(folder):
    """Two ranks with a copy of one key/value head compute what one process computes, with a cache and without."""
    import transformers as hf

    path = tiny("one key/value head", folder)
    model, _ = loaded(path)
    whole = hf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (8, 64)
    assert torch.allclose(logits(model), logits(whole), rtol=1e-4, atol=1e-4)
    written = [m.generate(ids(), max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (model, whole)]
    assert torch.equal(*written)
    with compressed(model, "fp32", algorithm="two_step") as handle:
        assert torch.allclose(logits(model), logits(whole), rtol=1e-4, atol=1e-4)
        assert set(handle.calls.values()) == {1}


def experts(folder):
    """The sums of mixture-of-experts layers are covered too."""
    model, _ = loaded(tiny("mixtral", folder))
    plain = logits(model)
    with compressed(model, "fp32", algorithm="two_step") as handle:
        assert promises.same(logits(model), plain)
        assert any("expert" in style or "experts" in name for name, style in handle.modules.items())
        # Of two layers; transformers 5.23 also splits the embedding.
        assert sum(handle.calls.values()) >= 4
        return {name: count for name, count in handle.calls.items() if "expert" in name}


def generates():
    """generate() counts what stays uncompressed: on one host all sums, unless the batch must not matter."""
    from flashcomm.models.generate import generate

    model, tokenizer = loaded(MODEL, torch.bfloat16)
    prompt = "def read_config(path):\n" * 20
    flashcomm.reset_stats()
    with compressed(model, "int8g128") as handle:
        text = generate(model, tokenizer, prompt, 8)
    stats = flashcomm.stats()
    sums = len(handle.modules)
    assert stats["calls"] == {"all_reduce/one_step/bf16": 8 * sums}
    assert stats["plain"] == {"compression does not pay in shared memory": 8 * sums}
    assert promises.everyone(text) == [text] * 2
    flashcomm.reset_stats()
    with compressed(model, "int8g128", batch_invariant=True):
        text = generate(model, tokenizer, prompt, 8)
    assert flashcomm.stats()["calls"] == {"all_reduce/one_step/int8g128": 8 * sums}
    assert promises.everyone(text) == [text] * 2


def follows_a_policy():
    """Each module has its own codec, a decode step and a small message none."""
    from flashcomm.models.generate import generate

    model, tokenizer = loaded(MODEL, torch.bfloat16)
    policy = Policy(codec="int8g128", algorithm="two_step", layers=(Rule(match="*.o_proj", codec="none"),))
    rule = len([name for name, _ in model.named_modules() if name.endswith("o_proj")])
    with compressed(model, policy) as handle:
        others = len(handle.modules) - rule
        flashcomm.reset_stats()
        logits(model, 256)
        assert flashcomm.stats()["calls"] == {"all_reduce/two_step/int8g128": others, "all_reduce/plain/none": rule}
        assert flashcomm.stats()["plain"] == {"codec none": rule}
        handle.codec = replace(policy, min_bytes=2**20)
        flashcomm.reset_stats()
        logits(model, 256)
        assert flashcomm.stats()["calls"] == {"all_reduce/one_step/bf16": others, "all_reduce/plain/none": rule}
        assert flashcomm.stats()["plain"] == {"message under the policy's min_bytes = 1 MiB": others + rule}
        for phase, codec in (("prefill", "one_step/bf16"), ("all", "two_step/int8g128")):
            handle.codec = replace(policy, min_bytes=0, phase=phase)
            flashcomm.reset_stats()
            generate(model, tokenizer, "def f(x):", 4)
            calls = flashcomm.stats()["calls"]
            assert calls[f"all_reduce/{codec}"] == (3 + (phase == "all")) * others
            assert flashcomm.stats()["plain"].get("decode step", 0) == (phase == "prefill") * 3 * (others + rule)


def gradients_pass_straight_through():
    """With gradients on, transformers wraps the sum in its own autograd function, so backward works as without us."""
    model, _ = loaded(MODEL)

    def gradient():
        model.zero_grad()
        model(ids(), use_cache=False, labels=ids()).loss.backward()
        weight = model.model.layers[2].mlp.up_proj.weight.grad
        return (weight.to_local() if hasattr(weight, "to_local") else weight).clone()

    plain = gradient()
    with compressed(model, "fp32", algorithm="two_step") as handle:
        assert promises.same(gradient(), plain)
        assert sum(handle.calls.values()) >= 16


def compiled(folder):
    """A compiled model sends the same sums, whether it was compiled before or after, and follows a change of codec."""
    import torch._dynamo.utils

    # Workers of the compiler would outlive the test.
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()
    model, _ = loaded(tiny("biased", folder))
    run = torch.compile(model, backend="eager", dynamic=True)
    plain = logits(model)
    assert promises.same(logits(run), plain)
    with compressed(model, "int4g32", algorithm="two_step") as handle:
        flashcomm.reset_stats()
        eager = logits(model)
        once = flashcomm.stats()
        assert promises.same(logits(run), eager)
        assert set(handle.calls.values()) == {2}
        assert flashcomm.stats()["calls"] == {call: 2 * count for call, count in once["calls"].items()}
        assert sum(once["calls"].values()) == len(handle.modules)
        assert flashcomm.stats()["plain"] == {}
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        handle.codec = flashcomm.codec("int8g128")
        assert promises.same(logits(run), logits(model))
        assert promises.same(logits(run, 31), logits(model, 31))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        # Before torch 2.11 it stops one step earlier.
        with pytest.raises(Exception, match=r"torch.compiler.disable|ReduceOp"):
            logits(torch.compile(model, backend="eager", fullgraph=True))
    calls = dict(handle.calls)
    assert promises.same(logits(run), plain)
    # What users hold may be a wrapper.
    for wrapper in (run, torch.nn.Sequential(model)):
        with compressed(wrapper, "int4g32", algorithm="two_step") as wrapped:
            assert wrapped.modules == handle.modules
            assert compression_of(wrapper) is compression_of(model) is wrapped
            assert promises.same(logits(model), eager)
            with pytest.raises(ValueError, match="compressed already"):
                compress(model, "int8g128")
    with pytest.raises(ValueError, match="give the object that from_pretrained returned"):
        compress(model.model, "int8g128")
    assert handle.calls == calls


def others_compile(folder):
    """Sums of the rest of the program are traced into one graph while a model is compressed, and keep their bits."""

    def in_place(x):
        y = x * 2
        dist.all_reduce(y)
        return y + 1

    def functional(x):
        return functional_collectives.all_reduce(x * 2, "sum", dist.group.WORLD) + 1

    model, _ = loaded(tiny("biased", folder))
    x = torch.arange(4.0) + dist.get_rank()
    want = in_place(x)
    with compressed(model, "int8g128", algorithm="two_step"):
        for function in (in_place, functional):
            torch._dynamo.reset()
            assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), want)
        logits(model)
    for function in (in_place, functional):
        assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), want)


def survives_an_exception():
    """A forward pass that raises in the middle leaves hooks, stack and patches in order."""
    model, _ = loaded(MODEL)
    plain = logits(model)

    def fail(*args):
        raise ZeroDivisionError

    with compressed(model, "fp32", algorithm="two_step"):
        for name in ("model.layers.3.mlp", "model.layers.5.self_attn.o_proj"):
            hook = model.get_submodule(name).register_forward_hook(fail)
            with pytest.raises(ZeroDivisionError):
                logits(model)
            hook.remove()
        assert promises.same(logits(model), plain)
    assert dist.all_reduce is _PLAIN
    total = torch.ones(3)
    dist.all_reduce(total)
    assert total.tolist() == [2, 2, 2]


class Adapted(torch.nn.Module):
    """A low-rank adapter around a row-parallel linear, as PEFT puts it there: its own small sum is not the model's."""

    def __init__(self, base_layer: torch.nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = torch.nn.Linear(64 // dist.get_world_size(), 4), torch.nn.Linear(4, 64)

    def forward(self, x):
        low = self.down(x)
        dist.all_reduce(low)
        return self.base_layer(x) + self.up(low)


def adapters(folder):
    """Layers inside of adapters are found and compressed, the sums of the adapters are plain."""
    model, _ = loaded(tiny("biased", folder))
    torch.manual_seed(dist.get_rank())
    for layer in model.model.layers:
        layer.self_attn.o_proj = Adapted(layer.self_attn.o_proj)
    plain = logits(model)
    with compressed(torch.nn.ModuleDict({"base_model": model}), "fp32", algorithm="two_step") as handle:
        flashcomm.reset_stats()
        assert promises.same(logits(model), plain)
        inside = [name for name in handle.modules if name.endswith("o_proj.base_layer")]
        assert len(inside) == len(model.model.layers), handle.modules
        assert set(handle.calls.values()) == {1}
        assert flashcomm.stats()["calls"] == {"all_reduce/two_step/fp32": len(handle.modules)}
        assert flashcomm.stats()["plain"] == {OUTSIDE: len(inside)}


def outside_of_the_plan(folder):
    """Sums over the model's ranks that no compressed module makes are counted, and keep their bits."""
    model, _ = loaded(tiny("biased", folder))
    others = len([name for name in sums_of(model) if "o_proj" not in name])
    with compressed(model, "int8g128", algorithm="two_step", modules="o_proj") as handle:
        flashcomm.reset_stats()
        logits(model)
        assert flashcomm.stats()["plain"] == {OUTSIDE: others}
        dist.all_reduce(torch.ones(3))
        functional_collectives.all_reduce(torch.ones(3), "sum", handle.group)
        work = dist.all_reduce(torch.ones(3), async_op=True)
        work.wait()
        assert flashcomm.stats()["plain"] == {OUTSIDE: others + 3}
        # Of another group, another operation, no sum of activations, and one that flashcomm counts itself.
        dist.all_reduce(torch.ones(3), group=dist.new_group([dist.get_rank()], use_local_synchronization=True))
        dist.all_reduce(torch.ones(3), dist.ReduceOp.MAX)
        dist.all_reduce(torch.ones(3, dtype=torch.long))
        flashcomm.all_reduce(torch.ones(3), "none")
        flashcomm.all_reduce(torch.ones(3), "none", async_op=True).wait()
        assert flashcomm.stats()["plain"][OUTSIDE] == others + 3
    flashcomm.reset_stats()
    dist.all_reduce(torch.ones(3))
    assert flashcomm.stats()["plain"] == {}


def sums_of(model) -> list[str]:
    with compressed(model, "none") as handle:
        return list(handle.modules)


def wrapped_inside(folder):
    """Parts of a model that torch.compile or a checkpoint wraps are found under the plan's names."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch._dynamo.reset()
    path = tiny("biased", folder)
    plain_model, _ = loaded(path)
    plain, names = logits(plain_model), sums_of(plain_model)
    for wrap in (lambda part: torch.compile(part, backend="eager"), checkpoint_wrapper):
        model, _ = loaded(path)
        layers = model.model.layers
        layers[0] = wrap(layers[0])
        layers[1].mlp.down_proj = wrap(layers[1].mlp.down_proj)
        with compressed(model, "fp32", algorithm="two_step") as handle:
            assert len(handle.modules) == len(names), handle.modules
            flashcomm.reset_stats()
            assert promises.same(logits(model), plain)
            assert set(handle.calls.values()) == {1}
            assert flashcomm.stats()["plain"] == {}
    model, _ = loaded(path)
    model.model = torch.compile(model.model, backend="eager")
    with compressed(model, "fp32", algorithm="two_step") as handle:
        assert promises.same(logits(model), plain)
        assert list(handle.calls.values()) == [1] * len(names)


def with_peft(folder):
    """A model in PEFT's adapters: all sums of the plan are compressed, and the adapters' own are counted."""
    import peft

    path, low = tiny("biased", folder), dict(r=4, init_lora_weights=False)
    names = sums_of(loaded(path)[0])
    ways = {
        "q_proj": (peft.LoraConfig(target_modules=["q_proj", "v_proj"], **low), 0),
        "o_proj": (peft.LoraConfig(target_modules=["q_proj", "o_proj"], **low), 2),
        "all": (peft.LoraConfig(target_modules="all-linear", **low), 4),
        "saved": (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"], **low), 0),
        "prompt": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), 0),
    }
    for way, (config, adapters) in ways.items():
        torch.manual_seed(0)
        model = peft.get_peft_model(loaded(path)[0], config).eval()
        plain = logits(model)
        with compressed(model, "fp32", algorithm="two_step") as handle:
            assert compression_of(model.get_base_model()) is handle
            flashcomm.reset_stats()
            assert promises.same(logits(model), plain), way
            assert sum(handle.calls.values()) == len(names), (way, handle.calls)
            assert flashcomm.stats()["calls"] == {"all_reduce/two_step/fp32": len(names)}, way
            assert flashcomm.stats()["plain"] == ({OUTSIDE: adapters} if adapters else {}), way
        assert promises.same(logits(model), plain), way


def with_accelerate(folder):
    """A model that accelerate has prepared."""
    import accelerate

    model, _ = loaded(tiny("biased", folder))
    plain = logits(model)
    prepared = accelerate.Accelerator().prepare_model(model, evaluation_mode=True)
    with compressed(prepared, "fp32", algorithm="two_step") as handle:
        flashcomm.reset_stats()
        assert promises.same(logits(prepared), plain)
        assert set(handle.calls.values()) == {1}
        assert flashcomm.stats()["plain"] == {}


def other_architectures(folder):
    """Models with two stacks: a picture beside the text, and an encoder before the decoder."""
    import transformers as hf

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256, head_dim=16)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = dict(depth=1, embed_dim=32, num_heads=2, hidden_size=64, mlp_ratio=2, patch_size=4)
    module = hf.T5GemmaModuleConfig(**sizes)
    models = {
        "picture": hf.Qwen2VLForConditionalGeneration(
            hf.Qwen2VLConfig(text_config={**sizes, "rope_parameters": rope}, vision_config=vision, image_token_id=5)
        ),
        "encoder": hf.T5GemmaForConditionalGeneration(hf.T5GemmaConfig(encoder=module, decoder=module, vocab_size=256)),
    }
    picture = ids(1).index_fill(1, torch.arange(3, 7), 5)
    patches = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    inputs = {
        "picture": dict(
            input_ids=picture,
            pixel_values=patches,
            image_grid_thw=torch.tensor([[1, 4, 4]]),
            mm_token_type_ids=(picture == 5).int(),
        ),
        "encoder": dict(input_ids=ids(), decoder_input_ids=ids(tokens=5)),
    }
    for name, model in models.items():
        path = Path(folder) / name
        if dist.get_rank() == 0:
            model.save_pretrained(path)
        dist.barrier()
        sharded = type(model).from_pretrained(path, **tensor_parallel_argument()).eval()
        with torch.inference_mode():
            plain = sharded(**inputs[name], use_cache=False).logits.clone()
            with compressed(sharded, "fp32", algorithm="two_step") as handle:
                flashcomm.reset_stats()
                assert promises.same(sharded(**inputs[name], use_cache=False).logits, plain), name
                assert set(handle.calls.values()) == {1}, (name, handle.calls)
                # transformers 5.17 splits no embeddings, of which the encoder and the decoder have one each.
                embeddings = len(handle.calls) - (4 if name == "picture" else 8)
                assert embeddings in (0, 1 if name == "picture" else 2), (name, handle.modules)
                assert flashcomm.stats()["plain"] == {}, name


def quantised_weights(folder):
    """The sums of a model whose weights torchao keeps in 8 bits."""
    import transformers as hf
    from torchao.quantization import Int8WeightOnlyConfig

    quantization = hf.TorchAoConfig(Int8WeightOnlyConfig())
    model = hf.AutoModelForCausalLM.from_pretrained(
        tiny("biased", folder), quantization_config=quantization, **tensor_parallel_argument()
    ).eval()
    assert "Int8" in type(model.model.layers[0].mlp.down_proj.weight).__name__
    plain = logits(model)
    with compressed(model, "fp32", algorithm="two_step") as handle:
        flashcomm.reset_stats()
        assert promises.same(logits(model), plain)
        assert set(handle.calls.values()) == {1}
        assert flashcomm.stats()["plain"] == {}


def lost_weights(folder):
    """Weights of bitsandbytes, which transformers cannot run tensor parallel, are refused by name."""
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(
        tiny("biased", folder),
        quantization_config=hf.BitsAndBytesConfig(load_in_8bit=True),
        **tensor_parallel_argument(),
    )
    with pytest.raises(AttributeError):
        logits(model)
    with pytest.raises(ValueError, match="bitsandbytes' Linear8bitLt cannot run tensor parallel: .* torchao"):
        compress(model)


def packed_weights(folder):
    """Weights in GGUF's blocks, which transformers cannot run tensor parallel, are refused by name.

    On a CPU transformers unpacks GGUF files, for want of a kernel, so a quantiser of the test's puts its modules in.
    """
    import transformers as hf
    from transformers.integrations.gguf import utils as gguf
    from transformers.quantizers import auto, base
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Kernel:
        def supports(self, kind):
            return True

    class Packed(QuantizationConfigMixin):
        def __init__(self, **_):
            self.quant_method = "packed"

    class Quantiser(base.HfQuantizer):
        requires_calibration = is_trainable = False

        def is_serializable(self, **_):
            return False

        def _process_model_before_weight_loading(self, model, **_):
            gguf.replace_with_gguf_modules(model, {"model.layers.0.mlp.down_proj.weight": 8}, Kernel())  # q8_0

    auto.register_quantization_config("packed")(Packed)
    auto.register_quantizer("packed")(Quantiser)
    path = tiny("biased", folder)
    parallel = tensor_parallel_argument()
    model = hf.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=Packed(), ignore_mismatched_sizes=True, **parallel
    )
    with torch.no_grad(), pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor|dimension 1 being sharded"):
        model(torch.arange(64)[None])
    with pytest.raises(ValueError, match="transformers' GgufLinear cannot run tensor parallel: .*dequantize=True"):
        compress(model)


def not_tensor_parallel():
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    with pytest.raises(ValueError, match="not tensor parallel over two or more ranks: start the script with torchrun"):
        compress(model)
    with pytest.raises(ValueError, match="unknown codec 'int9'"):
        compress(model, "int9")


def test_loading_over_all_ranks_needs_a_process_group():
    pytest.importorskip("transformers", reason="pip install 'flashcomm[transformers]'")
    with pytest.raises(ValueError, match="make sure to call init_process_group"):
        tensor_parallel_argument()


def test_the_oldest_release_is_another_one():
    assert oldest().run(version)[0].startswith("5.0.")
    assert newest().run(version)[0] > "5.1"


@pytest.mark.parametrize("release", [newest, thorough(oldest)])
@pytest.mark.parametrize(
    "function",
    [
        bundled_model,
        generates,
        follows_a_policy,
        gradients_pass_straight_through,
        survives_an_exception,
        not_tensor_parallel,
    ],
    ids=lambda f: f.__name__,
)
def test_on_ranks(release, function):
    release().run(function)


@both
def test_biases_are_added_once(release, tmp_path):
    release().run(biases_once, str(tmp_path))


def test_a_compiled_model(tmp_path):
    # On the newest alone: inductor takes most of a minute.
    newest().run(compiled, str(tmp_path))


def test_other_functions_compile_in_one_graph(tmp_path):
    newest().run(others_compile, str(tmp_path))


@both
def test_adapters_may_be_inside(release, tmp_path):
    release().run(adapters, str(tmp_path))


@both
def test_sums_outside_of_the_plan_are_counted(release, tmp_path):
    release().run(outside_of_the_plan, str(tmp_path))


@pytest.mark.parametrize("release", [newest, thorough(oldest)])
def test_wrappers_may_be_inside(release, tmp_path):
    release().run(wrapped_inside, str(tmp_path))


def test_peft_around_a_model(tmp_path):
    pytest.importorskip("peft", reason="pip install 'flashcomm[dev]'")
    newest().run(with_peft, str(tmp_path))


def test_accelerate_around_a_model(tmp_path):
    newest().run(with_accelerate, str(tmp_path))


def test_pictures_and_encoders(tmp_path):
    newest().run(other_architectures, str(tmp_path))


def test_weights_in_8_bits(tmp_path):
    pytest.importorskip("torchao", reason="pip install 'flashcomm[dev]'")
    newest().run(quantised_weights, str(tmp_path))


def test_weights_of_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    newest().run(lost_weights, str(tmp_path))


def test_weights_in_blocks_of_gguf(tmp_path):
    pytest.importorskip("transformers.integrations.gguf", reason="transformers 5.23 keeps GGUF weights packed")
    newest().run(packed_weights, str(tmp_path))


@both
def test_key_value_heads_are_copied(release, tmp_path):
    release().run(copies_heads, str(tmp_path))


def test_experts_are_covered(tmp_path):
    if newest().run(version)[0].startswith("5.0."):
        pytest.skip(
            "transformers 5.0 asks torch for a device that is a bare number, so no mixture of experts loads on a CPU"
        )
    assert newest().run(experts, str(tmp_path))[0]


def test_importing_the_module_needs_no_transformers():
    import subprocess

    code = "import sys, flashcomm.integrations.transformers; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_harness_is_needed_for_its_command_alone():
    import importlib.util

    from flashcomm.integrations import lm_eval

    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed")
    with pytest.raises(RuntimeError, match=r"this needs lm-evaluation-harness: pip install 'lm-eval\[hf\]'"):
        lm_eval.model_class()
