"""SmolLM2 on a book: real ranks against the simulation, which `make real` runs after its measurement."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_simulated import real, simulate

import ranks
from flashcomm import kernels
from flashcomm.accuracy.measuring import measure
from flashcomm.accuracy.simulated import simulated
from flashcomm.codecs import parse
from flashcomm.models.load import load
from flashcomm.models.text import token_ids
from flashcomm.models.windows import windows
from flashcomm.policy import Policy

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]
CODECS = ("int8g128+hadamard", "int4g128")


@pytest.fixture(scope="module")
def made(request):
    """The script that makes the model; its package is no dependency, and the model too slow for every run."""
    if "real" not in (request.config.getoption("-m") or ""):
        pytest.skip("`make real` tests the real model")
    path = Path(__file__).parents[2] / "tools" / "real_model.py"
    spec = importlib.util.spec_from_file_location("real_model", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["real_model"] = module
    spec.loader.exec_module(module)
    if not (module.MODEL.is_dir() and module.BOOK.is_file()):
        pytest.skip("no real model: python tools/real_model.py makes it")
    return module


@torch.inference_mode()
def test_it_reads_english(made):
    model, tokenizer = load(made.MODEL, torch.bfloat16)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0]).endswith("France is Paris.")
    book = token_ids(tokenizer, [made.BOOK.read_text(encoding="utf-8")])
    assert len(book) > 60_000
    nll = []
    for window in windows(book, 2048):
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        nll.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    # Another rotation of the heads, or a wrong scale of 4-bit weights, leaves hundreds.
    assert 25 < torch.stack(nll).mean().exp() < 45


def test_three_ranks_have_the_bits_of_the_simulation(made):
    some = [Policy(codec=codec, algorithm="two_step", min_bytes=0) for codec in (*CODECS, "fp32")]
    ours = simulate(made.MODEL, torch.bfloat16, some, 3)
    assert ranks.shared(3).run(real, made.MODEL, torch.bfloat16, some) == [ours] * 3
    assert len(set(ours)) == 3


@torch.inference_mode()
def test_bits_of_its_sums_without_loss(made):
    model, tokenizer = load(made.MODEL, torch.bfloat16)
    [window] = windows(token_ids(tokenizer, [made.BOOK.read_text(encoding="utf-8")]), 2048)[:1]
    codec, bits = parse("lossless"), {"partial sums": [], "sums": []}

    def count(name, parts, total):
        for which, x in (("partial sums", torch.cat(list(parts))), ("sums", total)):
            rows = x.flatten(0, -2)
            used = codec.lengths(kernels.encode(rows, codec)).double().mean().item()
            bits[which].append(8 * used / rows.shape[1])

    with simulated(model, 3, Policy(codec="lossless", algorithm="two_step", min_bytes=0)) as simulation:
        simulation.observe = count
        model(window[None], use_cache=False)
    mean = {which: sum(of) / len(of) for which, of in bits.items()}
    print(f"\nlossless on SmolLM2, 3 ranks: {mean} bits per value of {len(bits['sums'])} sums")
    assert max(mean.values()) < 11.6


def test_the_demo_has_the_figures_of_the_simulation(made, tmp_path):
    line = ("demo", "--model", made.MODEL, "--text", made.BOOK, "--tp", 3, "--algorithm", "two_step")
    line += ("--codecs", ",".join(CODECS), "--tokens", 1024, "--repeats", 1, "--new-tokens", 1, "--out", tmp_path)
    done = subprocess.run([sys.executable, "-m", "flashcomm.cli", *map(str, line)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    model, tokenizer = load(made.MODEL, torch.bfloat16)
    [window] = windows(token_ids(tokenizer, [made.BOOK.read_text(encoding="utf-8")]), 1024)
    found = measure(model, 3, {codec: Policy(codec=codec, algorithm="two_step") for codec in CODECS}, [window])
    nll, kl, _, agrees = found.figures[:, :, 0].double().mean(-1).unbind(1)
    for place, row in enumerate(rows):
        assert row["ranks_identical"]
        assert row["codec"] == found.names[place]
        assert row["perplexity"] == pytest.approx(nll[place].exp().item(), rel=1e-6)
        assert row["kl"] == pytest.approx(kl[place].item(), rel=1e-6)
        assert row["top1"] == pytest.approx(agrees[place].item())
