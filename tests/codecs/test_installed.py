"""Formats that other packages bring: the example, installed for a subprocess by an entry point."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def install(tmp_path):
    """Make an installed package of entry points; returns the environment in which it is."""

    def make(entry_points: str):
        info = tmp_path / "demo_codecs-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: demo-codecs\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[flashcomm.codecs]\n{entry_points}\n")
        return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, EXAMPLES, *sys.path)))}

    return make


def cli(*arguments, env):
    command = [sys.executable, "-m", "flashcomm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)


def test_the_format_itself_takes_less_than_thirty_lines():
    source = (EXAMPLES / "custom_codec.py").read_text()
    body = source[source.index("class Sign") : source.index("if __name__")].strip().splitlines()
    assert len(body) < 30


def test_a_format_is_found_by_name(install, tmp_path):
    env = install("sign = custom_codec:Sign")
    done = cli("bench", "codec", "--codecs", "sign", "--mib", 1, "--repeats", 1, "--json", tmp_path / "c.json", env=env)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "c.json").read_text())["rows"][0]
    assert (row["codec"], row["backend"], row["bits_per_value"]) == ("sign", "torch", 1 + 32 / 4096)
    done = cli("bench", "codec", "--codecs", "sing", env=env)
    assert done.returncode == 2
    assert "sign (installed)" in done.stderr
    assert "Did you mean sign?" in done.stderr


@pytest.mark.thorough
def test_every_rank_finds_it(install, tmp_path):
    env, file = install("sign = custom_codec:Sign"), tmp_path / "a.json"
    options = ("--codecs", "sign:int8", "--algorithms", "two_step", "--sizes", "4k", "--repeats", 1, "--json", file)
    done = cli("bench", "all_reduce", "--tp", 2, *options, env=env)
    assert done.returncode == 0, done.stderr
    assert [row["codec"] for row in json.loads(file.read_text())["rows"]] == ["none", "sign:int8g128"]


def test_an_entry_point_of_another_name_is_refused(install):
    done = cli("bench", "codec", "--codecs", "mine", env=install("mine = custom_codec:Sign"))
    assert done.returncode == 2
    assert "the entry point 'mine' of flashcomm.codecs gives 'sign'" in done.stderr.replace("\n", " ")


def test_the_published_bound_of_the_example_holds(monkeypatch):
    import torch

    import values

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import custom_codec

    codec = custom_codec.Sign()
    for x in values.special(torch.float32).values():
        x = x.contiguous()
        decoded = codec.decode(codec.encode(x), x.shape[1], torch.float32)
        step = codec.step(x)
        # The sum behind the mean may leave fp32; a step of Inf promises nothing.
        within = (decoded - x).abs() <= values.allowed_error(step, x, torch.float32) + 1e-6 * x.abs()
        assert (within | step.isinf()).all()
