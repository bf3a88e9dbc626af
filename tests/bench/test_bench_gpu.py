"""`flashcomm bench gpu`: every kernel compiles for every kind of GPU, and spills no register to memory."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from flashcomm.bench import gpu

COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_all_kernels_compile_for_all_targets_without_spills(tmp_path):
    """One format of each kind of device function; the others differ in constants."""
    file = tmp_path / "rows.json"
    specs = "int4g128,mxfp4,nvfp4,int2g32+spike"
    command = [sys.executable, "-m", "flashcomm.cli", "bench", "gpu", "--codecs", specs, "--json", str(file)]
    command += ["--targets", ",".join(gpu.TARGETS)]
    subprocess.run(command, env=COMPILED, check=True, capture_output=True)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == len(gpu.TARGETS) * 4 * 6
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= 48 << 10, row


def test_an_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set: nothing is compiled"):
        gpu.compiled()


def test_measuring_checks_the_bytes_first_and_counts_what_moves():
    rows = gpu.measure(["int8g128"], mib=1, repeats=1, device="cpu")
    assert [row.kernel for row in rows] == list(gpu.VERBS)
    for row in rows:
        assert row.backend == "numba"
        moved = {"encode": 2 + 1.03125, "decode": 2 + 1.03125, "decode_sum_encode": 5 * 1.03125}[row.kernel]
        assert row.copy_share == pytest.approx(moved / 4 * row.copy_ms / row.ms)


@pytest.mark.gpu
def test_measuring_on_a_gpu():
    assert torch.cuda.is_available()
    assert all(row.backend == "triton" for row in gpu.measure(gpu.CODECS, mib=64, repeats=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "foo"], "unknown target 'foo': give names such as sm_80"),
        (["--targets", "sm_90", "--codecs", "int4g100"], "groups of a power of two, not of 100"),
        (["--targets", "sm_90", "--codecs", "int4g128:int8g128"], "a pair of formats"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_compiled(arguments, message):
    command = [sys.executable, "-m", "flashcomm.cli", "bench", "gpu", *arguments]
    done = subprocess.run(command, env={**COMPILED, "COLUMNS": "200"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
