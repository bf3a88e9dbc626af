"""Prompts in parts on real ranks: the answers of unsplit ones, whatever the model, the cache and the mask."""

import gc
import itertools
import math
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("greenlet", reason="pip install greenlet")
import flashcomm
import promises
import ranks
from flashcomm.demo import MODEL
from flashcomm.integrations.transformers import compress, compressed
from flashcomm.overlap import prefill, wrap
from thorough import thorough

_OLDEST = Path(__file__).parents[2] / ".venv" / "transformers-oldest"
_SIZES = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, vocab_size=256)
_SIZES |= dict(intermediate_size=128, max_position_embeddings=256, head_dim=8, pad_token_id=0)
_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    "qwen": ("Qwen2Config", {}),
    "mistral": ("MistralConfig", dict(sliding_window=16)),
    "gemma": ("Gemma3TextConfig", dict(sliding_window=16, layer_types=_TYPES)),
    "qwen_moe": ("Qwen3MoeConfig", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
}
TOKENS = 61
# A split changes the order in which attention adds up, by an fp32 rounding of each of its sums: 64 roundings of the
# largest logit leave room for four layers of them.
NOISE = 64 * torch.finfo(torch.float32).eps


def newest(world_size=2, by="memory"):
    pytest.importorskip("transformers", reason="pip install 'flashcomm[transformers]'")
    return ranks.shared(world_size, by=by)


def oldest(world_size=2):
    if not (_OLDEST / "transformers").is_dir():
        pytest.skip(f"no {_OLDEST.name} in .venv: `make setup` installs it")
    return ranks.shared(world_size, str(_OLDEST))


SLIDING = ("mistral", "gemma")
"""Models whose caches differ between layers, as they do not in every release."""


def written(name: str, folder: str) -> Path:
    """A random model, written by rank 0 with the release under test."""
    import transformers as hf

    path = Path(folder) / name
    if dist.get_rank() == 0:
        kind, options = CONFIGS[name]
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(getattr(hf, kind)(**{**_SIZES, **options}))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.7)
        model.save_pretrained(path)
        hf.AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    dist.barrier()
    return path


def loaded(path: Path = MODEL, dtype=torch.float32):
    from flashcomm.models.load import load

    return load(path, dtype)[0]


def ids(rows: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(2, 250, (rows, tokens), generator=torch.Generator().manual_seed(3))


def padded(rows: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    """A mask that hides the first tokens of row 0, more than a part of it."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, : tokens // 2] = 0
    return mask


def caches(model, rows: int = 2):
    import transformers as hf

    config = model.config
    yield "none", lambda: None
    yield "dynamic", lambda: hf.DynamicCache(config=config)
    yield "dynamic, grows", lambda: hf.DynamicCache()
    yield "static", lambda: hf.StaticCache(config=config, max_cache_len=96)


@torch.inference_mode()
def same_answers(name: str, folder: str):
    """Logits, and what the cache makes of one more token, are those of prompts in one piece."""
    model = loaded(written(name, folder))
    splits = itertools.cycle([2, 3, (40, 20, 1)])
    worst = 0.0
    for attention, codec, algorithm in (("sdpa", "fp32", "two_step"), ("eager", "none", "plain")):
        model.set_attn_implementation(attention)
        with compressed(model, codec, algorithm=algorithm):
            # Attention's own code does not depend on the kind of the cache.
            for kind, cache in list(caches(model))[: 2 if attention == "eager" else None]:
                for mask in (None, padded()):
                    seen = torch.ones(2, TOKENS, dtype=torch.bool) if mask is None else mask.bool()
                    given = {} if mask is None else dict(attention_mask=mask, position_ids=positions(mask))
                    want = model(ids(), past_key_values=cache(), **given)
                    more = model(ids(2, 1), past_key_values=want.past_key_values, **more_of(mask))
                    parts = next(splits)
                    flashcomm.reset_stats()
                    with prefill(model, parts):
                        got = model(ids(), past_key_values=cache(), **given)
                        after = model(ids(2, 1), past_key_values=got.past_key_values, **more_of(mask))
                    count = parts if isinstance(parts, int) else len(parts)
                    assert flashcomm.stats()["prefills"] == {f"{count} parts": 1}
                    for one, other in ((got.logits[seen], want.logits[seen]), (after.logits, more.logits)):
                        worst = max(worst, (one - other).abs().max().item() / other.abs().max().item())
                    assert worst < NOISE, (attention, kind, mask is None, parts, worst)
                    assert type(got.past_key_values) is type(want.past_key_values)
    with prefill(model, 2):
        assert model(ids(), use_cache=False).past_key_values is None
    return worst


def positions(mask):
    """Of each token among those of its row that the mask shows."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def more_of(mask):
    """For one token after a prompt."""
    if mask is None:
        return {}
    longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    return dict(attention_mask=longer, position_ids=longer.sum(1, keepdim=True) - 1)


@pytest.mark.parametrize(
    ("release", "name"),
    [
        *[(newest, "llama"), (newest, "gemma"), (newest, "qwen_moe"), thorough(newest, "qwen")],
        *[thorough(release, name) for release, name in ((newest, "mistral"), (oldest, "mistral"), (oldest, "gemma"))],
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_answers_are_those_of_an_unsplit_prompt(release, name, tmp_path):
    if name == "qwen_moe" and version("transformers").startswith("5.0."):
        pytest.skip(
            "transformers 5.0 asks torch for a device that is a bare number, so no mixture of experts loads on a CPU"
        )
    release().run(same_answers, name, str(tmp_path))


@torch.inference_mode()
def bits_do_not_change():
    """Eager attention makes a row of scores the same way in a part; so do codecs, and mostly the matrix products."""
    model = loaded()
    model.set_attn_implementation("eager")
    inner = model.model.layers[0].mlp.gate_proj.weight.to_local()
    x = torch.randn(400, inner.shape[1])
    by_row = torch.equal((x @ inner.T)[150:], x[150:] @ inner.T)
    for codec in ("fp32", "int8g128", "int4g32:int8g128"):
        with compressed(model, codec, algorithm="two_step"):
            want = model(ids(2, 200), use_cache=False).logits
            with prefill(model, (3, 5)):
                got = model(ids(2, 200), use_cache=False).logits
        assert all(promises.same(got, theirs) for theirs in promises.everyone(got))
        if codec == "fp32":
            assert (got - want).abs().max() < NOISE * want.abs().max()
        if by_row:
            assert promises.same(got, want)
    return by_row


@torch.inference_mode()
def conversation():
    """A second prompt goes on from the cache of the first, also beyond a sliding window."""
    import transformers as hf

    model = loaded()
    for make in (lambda: hf.DynamicCache(), lambda: hf.StaticCache(config=model.config, max_cache_len=128)):
        cache = make()
        for tokens in (30, 41, 2):
            want = model(ids(1, tokens), past_key_values=cache).logits
        with prefill(model, 2):
            cache = make()
            for tokens in (30, 41, 2):
                got = model(ids(1, tokens), past_key_values=cache).logits
        assert int(cache.get_seq_length()) == 73
        assert (got - want).abs().max() < NOISE * want.abs().max()


def generates(cache: str, prompts: int):
    """Greedy tokens of prompts of different lengths, padded to one."""
    import transformers as hf

    from flashcomm.models.text import held_out_text

    model = loaded()
    tokenizer = hf.AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    text = held_out_text()
    batch = [text[5000 * n : 5000 * n + 300 + 40 * (n % 7)] for n in range(prompts)]
    inputs = tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
    options = dict(max_new_tokens=12, do_sample=False, **({"cache_implementation": cache} if cache else {}))
    want = model.generate(**inputs, **options)
    flashcomm.reset_stats()
    with prefill(model, 2) as overlap:
        got = model.generate(**inputs, **options)
        overlap.parts = (2, 1, 1)
        again = model.generate(**inputs, **options)
    assert flashcomm.stats()["prefills"] == {"2 parts": 1, "3 parts": 1}
    assert torch.equal(got, want)
    assert torch.equal(again, want)


def codecs_and_handles():
    """A codec of one's own, that of a compression, and the model as it was afterwards."""
    model = loaded()
    plain = dist.all_reduce
    with torch.inference_mode():
        want = model(ids(), use_cache=False).logits
        with prefill(model, codec="int8g128", parts=2) as overlap:
            assert str(overlap.compression.codec) == "int8g128"
            lossy = model(ids(), use_cache=False).logits
            with pytest.raises(ValueError, match="overlapped already"):
                wrap(model)
            with pytest.raises(ValueError, match="compressed already"):
                compress(model)
            overlap.compression.codec = flashcomm.codec("fp32")
            assert (model(ids(), use_cache=False).logits - want).abs().max() < NOISE * want.abs().max()
        assert 0 < (lossy - want).abs().max() < want.abs().max() / 4
        assert dist.all_reduce is plain
        assert "forward" not in vars(model.model)
        with compressed(model, "int8g128") as handle:
            overlap = wrap(model, 3)
            assert overlap.compression is handle
            model(ids(), use_cache=False)
            overlap.undo()
            overlap.undo()
            assert handle.wait is None
            with pytest.raises(ValueError, match="compressed already"):
                prefill(model, codec="int4g128").__enter__()
        assert promises.same(model(ids(), use_cache=False).logits, want)
    for parts in (0, -1, "two", (), (1, 0)):
        with pytest.raises(ValueError, match="give 'auto', a number of 1 or more, or a positive share for each part"):
            wrap(model, parts)
    assert dist.all_reduce is plain


def refusals():
    """What cannot be split runs in one piece, with the same answer, and is counted."""
    model = loaded()
    mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    packed = torch.cat([torch.arange(30), torch.arange(TOKENS - 30)])[None].expand(2, -1)
    import transformers as hf

    class Odd(hf.DynamicCache):
        """Somebody's own."""

    cases = {
        "output_hidden_states": dict(output_hidden_states=True),
        "packed sequences": dict(position_ids=packed, use_cache=False),
        "a Odd": dict(past_key_values=Odd()),
        "an attention mask of an unknown kind": dict(attention_mask=mask[:, 0]),
        "the argument cu_seq_lens_q": dict(cu_seq_lens_q=torch.tensor([0, TOKENS])),
    }
    for why, given in cases.items():
        flashcomm.reset_stats()
        with torch.inference_mode(), prefill(model, 2):
            try:
                model(ids(), **given)
            except (ValueError, RuntimeError, IndexError):
                # transformers does not know what to do with some of them either.
                assert why.startswith("an attention mask")
        assert flashcomm.stats()["prefills"] == {f"in one piece: {why}": 1}
    with torch.inference_mode():
        want = model(ids(), attention_mask=mask, use_cache=False).logits
        with prefill(model, 2):
            got = model(ids(), attention_mask=mask, use_cache=False).logits
        assert (got - want).abs().max() < NOISE * want.abs().max()
    flashcomm.reset_stats()
    with prefill(model, 2) as overlap:
        model(ids())
        with torch.inference_mode():
            model.train()
            model(ids())
            model.eval()
            model(ids(2, 1))
            for parts in (40, 1):
                overlap.parts = parts
                model(ids(1, 30))
    assert flashcomm.stats()["prefills"] == {
        "in one piece: gradients are on": 1,
        "in one piece: the model is in training mode": 1,
        "in one piece: fewer tokens than parts": 1,
        "in one piece: asked for": 1,
    }
    with pytest.raises(ValueError, match="a MambaForCausalLM cannot be split: it"):
        wrap(hf.MambaForCausalLM(hf.MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=8)))
    long = hf.LlamaConfig(**_SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="its dynamic rotary embedding depends on the length of the whole prompt"):
        wrap(hf.LlamaForCausalLM(long))
    with pytest.raises(ValueError, match="not tensor parallel over two or more ranks"):
        wrap(hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)))


@torch.inference_mode()
def survives_exceptions():
    """Whichever part fails, and wherever: both end, nothing leaks, and the group still works."""
    import greenlet

    model = loaded()
    want = model(ids(), use_cache=False).logits
    for codec in ("none", "int8g128"):
        for name in ("model.layers.3.mlp", "model.layers.5.self_attn.o_proj", "model.embed_tokens", "model.norm"):
            for failing_call in (1, 2):
                with prefill(model, 2, codec):
                    calls = []

                    def fail(*args, calls=calls, at=failing_call):
                        calls.append(1)
                        if len(calls) == at:
                            raise ZeroDivisionError

                    hook = model.get_submodule(name).register_forward_hook(fail)
                    with pytest.raises(ZeroDivisionError):
                        model(ids(), use_cache=False)
                    hook.remove()
                    if codec == "none":
                        again = model(ids(), use_cache=False).logits
                        assert (again - want).abs().max() < NOISE * want.abs().max()
    gc.collect()
    parts = [one for one in gc.get_objects() if type(one) is greenlet.greenlet and one.parent]
    assert parts == []
    total = torch.ones(3)
    dist.all_reduce(total)
    assert total.tolist() == [dist.get_world_size()] * 3
    assert promises.same(model(ids(), use_cache=False).logits, want)


@torch.inference_mode()
def nested_use():
    """A hook cannot use the model, nor another overlapped one, while parts take turns."""
    model, other = loaded(), loaded()
    want = model(ids(), use_cache=False).logits
    with prefill(model, 2), prefill(other, 2):
        for inner, message in ((model, "in the middle of an overlapped prefill"), (other, "take turns already")):
            hook = model.model.layers[2].mlp.register_forward_hook(lambda *_, inner=inner: inner(ids()) and None)
            with pytest.raises(RuntimeError, match=message):
                model(ids())
            hook.remove()
    assert promises.same(model(ids(), use_cache=False).logits, want)


@torch.inference_mode()
def planned():
    """The first long prompt is measured, later ones follow the plan; all ranks alike, whatever they run."""
    from flashcomm.planner.overlap import Line, Profile

    model = loaded()
    with compressed(model, "fp32", algorithm="two_step"):
        want = {tokens: model(ids(1, tokens), use_cache=False).logits for tokens in (100, 200, 400, 1000)}
        flashcomm.reset_stats()
        with prefill(model) as overlap:
            for tokens in (100, 200, 400, 1000):
                got = model(ids(1, tokens), use_cache=False).logits
                assert (got - want[tokens]).abs().max() < NOISE * want[tokens].abs().max()
            (key,) = overlap.profiles
            assert key == ("fp32", "two_step")
            stats = flashcomm.stats()
            assert list(stats["prefills"])[:3] == [
                "in one piece: fewer than 128 tokens",
                "in one piece: nothing measured yet, and fewer than 256 tokens",
                "3 parts one after the other, to measure them",
            ]
            (times,) = stats["prefill_ms"].values()
            assert min(times.values()) > 0
            assert len(promises.everyone(overlap.profiles[key])) == dist.get_world_size()
            assert len(set(promises.everyone(overlap.profiles[key]))) == 1
            segments = overlap.profiles[key].segments
            # transformers 5.0 leaves the embedding whole, so nothing stands before the layers.
            count = 17 if version("transformers").startswith("5.0.") else 18
            assert (len(segments), overlap.profiles[key].layers) == ((17, 1) if count == 17 else (4, 8))
            assert segments[1] != segments[2]
            slow = Profile(segments=(Line(token_s=1e-6),) * count, sum=Line(token_s=1e-6))
            for link, how in ((1.0, "3 parts"), (1e-3, "in one piece: parts would not be faster")):
                overlap.profiles[key] = Profile(segments=slow.segments, sum=Line(token_s=1e-6 * link))
                flashcomm.reset_stats()
                got = model(ids(1, 1000), use_cache=False).logits
                assert flashcomm.stats()["prefills"] == {how: 1}
                assert math.isclose(flashcomm.stats()["prefill_ms"][how]["predicted"], count, rel_tol=0.05)
                assert (got - want[1000]).abs().max() < NOISE * want[1000].abs().max()
            # Another codec costs something else.
            overlap.compression.codec = flashcomm.codec("int8g128")
            model(ids(1, 400), use_cache=False)
            assert list(overlap.profiles) == [key, ("int8g128", "two_step")]


@pytest.mark.parametrize(
    ("release", "cache"),
    [thorough(newest, None), (newest, "static"), thorough(oldest, "static")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_generated_tokens_are_the_same(release, cache):
    release().run(generates, cache, 6)


@pytest.mark.parametrize(
    "function", [codecs_and_handles, refusals, nested_use, conversation, planned], ids=lambda f: f.__name__
)
def test_on_ranks(function):
    newest().run(function)


@pytest.mark.parametrize("by", ["memory", thorough("connections"), thorough("gloo")])
def test_an_exception_ends_all_parts(by):
    newest(by=by).run(survives_exceptions)


@pytest.mark.parametrize("world_size", [2, thorough(4)])
def test_all_ranks_get_the_same_bits(world_size):
    assert len(set(newest(world_size).run(bits_do_not_change))) == 1
