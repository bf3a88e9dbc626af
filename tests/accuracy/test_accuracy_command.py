"""The two commands as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from flashcomm.accuracy.command import Setup
from flashcomm.demo import MODEL
from flashcomm.policy import Policy

COMMAND = [sys.executable, "-m", "flashcomm.cli"]


def run(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_accuracy(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 60)
    policy = tmp_path / "mine.toml"
    Policy(codec="int4g32").save(policy)
    options = ("--text", text, "--text", text, "--tokens", 384, "--window", 128, "--tp", 4, "--out", tmp_path / "out")
    done = run("accuracy", "--codecs", "int8g128,int2g32", "--policy", policy, *options, "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    document = json.loads((tmp_path / "a.json").read_text())
    assert document == json.loads((tmp_path / "out" / "report.json").read_text())
    assert (document["ranks"], document["tokens"], document["text"]) == (4, 384, "text.txt, text.txt")
    rows = {row["codec"]: row for row in document["rows"]}
    assert list(rows) == ["none", "fp32", "int8g128", "int2g32", "mine"]
    assert (
        0
        == rows["none"]["kl"]
        < rows["fp32"]["kl"]
        < rows["int8g128"]["kl"]
        < rows["mine"]["kl"]
        < rows["int2g32"]["kl"]
    )
    assert rows["mine"]["bits_per_value"] == 5
    assert len(document["sums"]) == 17 * 4
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "| `model.layers.7.mlp.down_proj` |" in markdown
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("accuracy", "--tp", "3"), "--tp 3 does not divide the 8 attention heads"),
        (("accuracy", "--hosts", "3"), "--hosts 3 with --tp 8: give hosts with as many ranks each"),
        (("accuracy", "--codecs", "int4static"), "needs --calibration FILE"),
        (("tune-policy", "--budget", "perplexity=1"), "give kl= and a number of nats above 0, such as kl=0.01"),
    ],
)
def test_wrong_input_is_a_sentence_and_exit_status_2(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupted_it_says_how_to_go_on(tmp_path):
    command = [*COMMAND, "accuracy", "--tokens", "20480", "--codecs", "int8g128", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 100
        while not list(tmp_path.glob("windows/*.pt")) and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on from what is in" in errors
    assert "Traceback" not in errors
    assert len(list(tmp_path.glob("windows/*.pt"))) >= 1


def test_too_little_text_is_refused(tmp_path):
    setup = Setup(
        directory=MODEL, model="demo", texts=["a = 1\n"], text="", ranks=2, hosts=0, algorithm="auto", tokens=4096,
        window=1024, dtype="float32", seed=0, calibration=None, out=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match="at least two windows of 1,024 are needed"):
        setup.load()
