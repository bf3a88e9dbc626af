"""`flashcomm accuracy --kv`: caches between prefill and decode, against decoding that really goes on from them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from flashcomm import kv
from flashcomm.accuracy import caches
from flashcomm.cli import app
from flashcomm.demo import MODEL
from flashcomm.models.load import load
from flashcomm.models.text import held_out_text, token_ids
from flashcomm.models.windows import windows

NEW = 12


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = load(MODEL, torch.float32)
    return model, windows(token_ids(tokenizer, [held_out_text()[:20_000]]), 160, 40)


def test_kept_tokens_are_those_that_greedy_decoding_writes(demo):
    model, texts = demo
    spec = "int2g32"
    [plain, found] = caches.measure_caches(model, [spec], texts, new_tokens=NEW)
    assert (plain.kl.value, plain.texts_kept, plain.tokens_kept) == (0, 4, 1)
    ids, kept = torch.stack(texts), []
    with torch.inference_mode():
        cache = model(ids[:, : -NEW - 1], use_cache=True).past_key_values
        layers = [kv.KV(layer.keys, layer.values) for layer in cache.layers]
        sent = [kv.encode(*layer, spec) for layer in layers]
        first = ids[:, -NEW - 1, None]
        written = [caches._greedy(model, caches._cache(of), first, NEW) for of in (layers, map(kv.decode, sent))]
    kept = (written[0] == written[1]).int().cumprod(1).sum(1)
    assert 0 < found.tokens_kept < 1
    assert found.tokens_kept == pytest.approx(kept.double().mean().item() / NEW)
    assert found.texts_kept == int((kept == NEW).sum())
    values = sum(x.numel() for layer in layers for x in layer)
    assert found.bits_per_value == pytest.approx(8 * sum(map(len, sent)) / values)
    assert found.kl.value > 0


def test_the_command(tmp_path):
    options = ("--tokens", "128", "--window", "64", "--new-tokens", "16", "--out", str(tmp_path / "out"))
    done = CliRunner().invoke(
        app, ["accuracy", "--kv", "--codecs", "lossless,int8g32:int4g64", *options, "--json", str(tmp_path / "a.json")]
    )
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["op"] == "accuracy_kv"
    assert "ranks" not in document
    none, lossless, pair = document["rows"]
    assert [row["codec"] for row in document["rows"]] == ["none", "lossless", "int8g32:int4g64"]
    assert (none["bits_per_value"], none["kl"]) == (16, 0)
    assert lossless["kl"] == 0
    assert lossless["texts_kept"] == lossless["texts"] == 2
    assert 0 < pair["kl"] < 0.1
    assert 6 < pair["bits_per_value"] < lossless["bits_per_value"] < 16
    assert "2 of 2" in done.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--kv", "--tp", "4"), "leave out --tp"),
        (("--new-tokens", "8"), "--new-tokens is for --kv"),
        (("--kv", "--window", "32", "--new-tokens", "32"), "give a prompt of as many or more"),
    ],
)
def test_wrong_options(options, says, tmp_path):
    done = CliRunner().invoke(app, ["accuracy", *options, "--tokens", "64", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert says in done.output


def test_caches_of_sliding_windows_are_refused():
    class Layer:
        keys = values = torch.zeros(1, 1, 8, 4)

    with pytest.raises(NotImplementedError, match="full attention in all layers"):
        caches._tensors(Layer(), 9)
