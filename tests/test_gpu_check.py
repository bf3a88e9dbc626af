"""`tools/gpu_check.py` without a GPU: its logic runs, kernels in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = str(Path(__file__).parents[1] / "tools" / "gpu_check.py")
DRY = (
    "env",
    "bytes_of_formats",
    "bandwidth",
    "fused",
    "collectives",
    "route",
    "far_apart",
    "warm",
    "gpu_tests",
    "iso",
    "compiled",
)


def run(*arguments: str):
    env = {**os.environ, "DRY": "1"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=env)


@pytest.mark.timeout(900)
def test_all_logic_runs_on_a_cpu(tmp_path):
    done = run(str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name for name, result in results.items() if "left_out" not in result} == set(DRY)
    assert results["bytes_of_formats"]["formats"] == 2
    assert all("no CUDA device" in line for line in results["gpu_tests"]["skipped"])
    # No folder or process of a check is left.
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_unknown_checks_are_refused(tmp_path):
    done = run(str(tmp_path), "nothing")
    assert done.returncode == 2
    assert "unknown checks: nothing. Allowed: env, bytes_of_formats" in done.stderr
