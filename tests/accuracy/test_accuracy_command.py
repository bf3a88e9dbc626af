"""The two commands, from their options to the files that they write."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashcomm.accuracy import measuring
from flashcomm.accuracy.setup import Setup
from flashcomm.cli import app
from flashcomm.demo import MODEL
from flashcomm.lab.launch import Interrupted
from flashcomm.policy import Hops, Policy


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_accuracy(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 60)
    policy = tmp_path / "mine.toml"
    Policy(codec="int4g32").save(policy)
    options = ("--text", text, "--text", text, "--tokens", 384, "--window", 128, "--tp", 4, "--out", tmp_path / "out")
    # In fp32, the row `fp32` would be the row `none`.
    options = ("--dtype", "bfloat16", "--codecs", "int8g128,int2g32", "--policy", policy, *options)
    done = invoke("accuracy", *options, "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    assert "Warning" not in done.stderr
    document = json.loads((tmp_path / "a.json").read_text())
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())
    assert (document["ranks"], document["tokens"], document["text"]) == (4, 384, "text.txt, text.txt")
    rows = {row["codec"]: row for row in document["rows"]}
    assert list(rows) == ["none", "fp32", "int8g128", "int2g32", "mine"]
    kl = [rows[name]["kl"] for name in ("none", "fp32", "int8g128", "mine", "int2g32")]
    assert kl == sorted(kl)
    assert kl[0] == 0 < kl[1]
    assert rows["mine"]["bits_per_value"] == 5
    assert len(document["sums"]) == 17 * 4
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| `model.layers.7.mlp.down_proj` |" in markdown
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page


def test_accuracy_of_pipeline_stages(tmp_path):
    policy = tmp_path / "mine.toml"
    Policy(codec="none", hops=Hops(pp="int8g128")).save(policy)
    options = ("--tokens", 128, "--window", 64, "--out", tmp_path / "out", "--json", tmp_path / "a.json")
    done = invoke("accuracy", "--pp", 2, "--codecs", "lossless,int4g128", "--policy", policy, *options)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "a.json").read_text())
    assert (document["ranks"], document["stages"]) == (1, 2)
    rows = {row["codec"]: row for row in document["rows"]}
    # Nothing is added up, so there is no floor.
    assert list(rows) == ["none", "lossless", "int4g128", "mine"]
    assert rows["lossless"]["kl"] == 0 < rows["mine"]["kl"] < rows["int4g128"]["kl"]
    assert [(one["module"], one["codec"]) for one in document["sums"]] == [
        ("model.layers.3", codec) for codec in list(rows)[1:]
    ]
    assert "as 2 pipeline stages of one rank compute it" in (tmp_path / "out" / "report.md").read_text()


def test_tune_policy(tmp_path):
    policy, options = tmp_path / "p.toml", ("--tp", 2, "--explore", 64, "--tokens", 256, "--window", 64)
    files = ("--policy", policy, "--out", tmp_path / "out", "--json", tmp_path / "t.json")
    done = invoke("tune-policy", "--budget", "kl=0.01", "--codecs", "int4g128,int8g128", *options, *files)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "t.json").read_text())
    best, found = (
        next(row for row in document["rows"] if row["codec"] == name) for name in (document["best_uniform"], "policy")
    )
    assert found["kl_high"] <= 0.01
    assert found["bits_per_value"] == pytest.approx(best["bits_per_value"] * (1 - document["saved"]))
    chosen = {sum["module"]: sum["chosen"] for sum in document["sums"]}
    assert len(chosen) == 17
    assert {name: str(Policy.load(policy).codec_for(name)) for name in chosen} == chosen
    assert f"% fewer than {best['codec']} everywhere" in done.output
    assert "# budget: KL 0.01, on 256 tokens of the standard library's held-out modules" in policy.read_text()
    done = invoke("tune-policy", "--budget", "kl=1e-7", "--codecs", "int4g128,int8g128", *options, *files)
    assert done.exit_code == 2
    assert "no candidate meets a KL of 1e-07" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("accuracy", "--tp", "3"), "--tp 3 does not divide the 8 attention heads"),
        (("accuracy", "--tp", "1"), "--tp 1: one rank sends nothing. Give --tp 2 or more, or --pp 2 or more"),
        (("accuracy", "--hosts", "3"), "--hosts 3 with --tp 8: give hosts with as many ranks each"),
        (("accuracy", "--codecs", "int4static"), "needs --calibration FILE"),
        (("accuracy", "--policy", "nothing.toml"), "cannot read the policy 'nothing.toml'"),
        (("tune-policy", "--budget", "perplexity=1"), "give kl= and a number of nats above 0, such as kl=0.01"),
        (("tune-policy", "--budget", "kl=-1"), "give kl= and a number of nats above 0, such as kl=0.01"),
    ],
)
def test_wrong_input_is_a_sentence_and_exit_status_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def setup(out: Path, text: str) -> Setup:
    return Setup(
        directory=MODEL, model="demo", texts=[text], text="", ranks=2, hosts=0, algorithm="auto", tokens=4096,
        window=64, dtype="float32", seed=0, calibration=None, out=out,
    )  # fmt: skip


def test_interrupted_it_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "measure", interrupt)
    done = invoke("accuracy", "--codecs", "int8g128", "--tokens", 128, "--window", 64, "--tp", 2, "--out", tmp_path)
    assert isinstance(done.exception, Interrupted)
    assert str(done.exception) == f"interrupted; the same command goes on from what is in {tmp_path}"


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least two windows of 64 are needed"):
        setup(tmp_path, "a = 1\n").load()


def test_formats_of_other_projects_say_whose_they_are(tmp_path):
    options = ("--codecs", "q4_0,fp8g256", "--tokens", 128, "--window", 64, "--tp", 2, "--out", tmp_path)
    done = invoke("accuracy", *options)
    assert done.exit_code == 0, done.output
    assert "q4_0, as llama.cpp" in done.output
    assert "| `fp8g256, as FlashInfer` |" in (tmp_path / "report.md").read_text()
