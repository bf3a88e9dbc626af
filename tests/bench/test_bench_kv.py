"""`flashcomm bench kv` between two real processes."""

import json

from typer.testing import CliRunner

from flashcomm.cli import app


def test_rows_of_the_command(tmp_path):
    options = ["--tokens", "300", "--repeats", "1", "--codecs", "lossless,int4g64", "--json", str(tmp_path / "a.json")]
    done = CliRunner().invoke(app, ["bench", "kv", "demo", *options])
    assert done.exit_code == 0, done.output
    raw, lossless, coarse = json.loads((tmp_path / "a.json").read_text())["rows"]
    # 8 layers, keys and values, 256 features in bf16.
    assert raw["wire_bytes"] == 8 * 2 * 300 * 256 * 2
    assert (raw["bits_per_value"], raw["speedup"]) == (16, 1)
    assert lossless["same_token"]
    assert 4 < coarse["bits_per_value"] < 6 < lossless["bits_per_value"] < 13
    for row in (raw, lossless, coarse):
        assert 0 < row["transfer_ms"] <= row["p50_ms"]


def test_refusals():
    for options, says in (
        (("--codecs", "bf16/int4"), "levels are for sums"),
        (("--codecs", "int4static"), "needs --calibration"),
        (("--dtype", "int8"), "unknown dtype"),
    ):
        done = CliRunner().invoke(app, ["bench", "kv", "demo", *options])
        assert done.exit_code == 2
        assert says in done.output
