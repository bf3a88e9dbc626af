"""Processors other than this one: ARM, by compiling for it, and those for which numba compiles nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CROSS = Path(__file__).parents[1] / "cross.py"
LIBC = {"clock_gettime", "memcpy", "memmove", "memset", "poll", "sched_yield", "usleep"}


def run(*command, **variables):
    """Output of a process that imports from where this one does."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **variables}
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.thorough
def test_the_kernels_are_arms_instructions_when_compiled_for_it():
    text = run(CROSS, "narrow", "widen", "quantise", "round_floats", "hadamard")
    # An intrinsic of another processor would have ended it.
    for instruction in ("fcvtl", "fcvtn", "yield", "stlr", "mrs.*FPCR"):
        assert re.search(rf"^\s+{instruction}\b", text, re.MULTILINE), instruction
    defined = set(re.findall(r"^([\w.$]+):", text, re.MULTILINE))
    called = set(re.findall(r"^\s+bl?\s+([A-Za-z_][\w.$]*)", text, re.MULTILINE))
    others = {name for name in called - defined if not name.startswith(("NRT_", "Py", "numba_"))}
    assert others <= LIBC, "functions that a process on ARM may not have"


def test_without_compilation_the_specification_runs_and_says_so():
    code = """
import logging, torch, flashcomm
from flashcomm import codecs, kernels, simulate
from flashcomm.transports import lanes
logging.basicConfig(format="%(message)s")
print(kernels.route(codecs.parse("int8g128"), "cpu"))
print(lanes.why_not_shared())
xs = [torch.randn(4, 256, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(2)]
for spec in ("int8g128", "lossless"):
    codec = codecs.parse(spec)
    payload = kernels.encode(xs[0], codec)
    assert torch.equal(payload, codec.encode(xs[0]))
print(simulate.all_reduce(xs, "int4g32", "two_step").view(torch.int16).sum().item())
"""
    why = "NUMBA_DISABLE_JIT=1: numba compiles nothing"
    route, shared, total = run("-c", code, NUMBA_DISABLE_JIT="1").splitlines()
    assert route == str(("torch", why))
    assert shared == why
    assert total == run("-c", code).splitlines()[-1]
