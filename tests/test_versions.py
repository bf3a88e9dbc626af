"""Habits of other versions: what pyproject.toml allows, commands without extras, Triton's tools, and macOS."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[1]


def fresh(code: str, **variables) -> "subprocess.CompletedProcess[str]":
    """A process that imports from where this one does."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **variables}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=250)


def test_the_oldest_environment_is_the_oldest_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = tomllib.loads((ROOT / "constraints" / "versions.toml").read_text())["oldest"]
    assert project["requires-python"] == f">={oldest['python']}"
    extras = project["optional-dependencies"]
    floors = dict(
        re.match(r"([\w-]+)>=([\d.]+)", given).groups()  # pyright: ignore[reportOptionalMemberAccess]
        for given in (*project["dependencies"], *extras["gpu"], *extras["transformers"])
    )
    fixed = dict(given.split("==") for given in oldest["packages"])
    assert fixed.keys() == floors.keys()
    for name, version in fixed.items():
        assert (version + ".").startswith(floors[name] + "."), name


def test_commands_without_extras_name_them_brackets_included():
    code = """
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
class Without(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        hidden = name in ("matplotlib", "transformers", "triton")
        return None if hidden else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [one for one in sys.meta_path if one is not PathFinder] + [Without()]
from typer.testing import CliRunner
from flashcomm.cli import app
for command in ("accuracy", "tune-policy", "demo", "bench gpu --targets sm_90", "env", "bench codec --codecs int8[x]"):
    done = CliRunner().invoke(app, command.split())
    print(command, "|", repr(done.exception), "|", " ".join(done.output.split()))
"""
    done = fresh(code)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    for command in ("accuracy", "tune-policy", "demo"):
        assert said[command] == "SystemExit(2) | error: this command needs transformers: pip install " + (
            "'flashcomm[transformers]'"
        )
    assert said["bench gpu --targets sm_90"].endswith("this command needs triton: pip install 'flashcomm[gpu]'")
    assert "pip install 'flashcomm[transformers]'" in said["env"]
    assert "pip install 'flashcomm[plot]'" in said["env"]
    assert "unknown codec 'int8[x]'" in said["bench codec --codecs int8[x]"]


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_assembler_is_tritons_own(capability):
    from flashcomm.bench.gpu import _assembler

    version = subprocess.run([_assembler(capability), "--version"], capture_output=True, text=True, check=True).stdout
    assert "Cuda compilation tools" in version


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
def test_a_triton_that_is_too_old_is_the_reason_for_the_specification(monkeypatch):
    import triton

    from flashcomm import codecs, kernels

    monkeypatch.setattr(triton, "__version__", "3.3.1")
    kernels.route.cache_clear()
    why = "triton 3.3.1 cannot compile the GPU kernels, 3.4 and later can (torch 2.8 brings it)"
    assert kernels.route(codecs.parse("int4g128"), "cuda") == ("torch", why)
    kernels.route.cache_clear()


def test_help_works_with_this_typer():
    from flashcomm.cli import app

    assert CliRunner().invoke(app, ["bench", "codec", "--help"]).exit_code == 0


MACOS = """
import os, socket, sys
# Which choose their libraries by the platform.
import numba, sysconfig, torch
sysconfig.get_config_vars()
sys.platform = "darwin"
import platform
platform.system = lambda: "Darwin"
for name in ("sched_getaffinity", "sched_setaffinity", "memfd_create", "MFD_CLOEXEC", "pidfd_open", "eventfd"):
    if hasattr(os, name):
        delattr(os, name)
for name in [name for name in dir(socket) if name.startswith(("SO_PEER", "TCP_USER", "MSG_ZEROCOPY", "TCP_INFO"))]:
    delattr(socket, name)
real_open, real_readlink = os.open, os.readlink
def absent(path):
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    if text.startswith(("/proc", "/sys", "/dev/shm")):
        raise FileNotFoundError(2, "No such file or directory", text)
def audit(event, arguments):
    if event in ("open", "os.listdir", "os.scandir"):
        absent(arguments[0])
def readlink(path, **options):
    absent(path)
    return real_readlink(path, **options)
os.readlink = readlink
"""
"""A process without the files, calls and options that only Linux has."""


def test_macos_has_codecs_kernels_and_simulation_and_says_what_it_has_not():
    code = f"""{MACOS}
sys.addaudithook(audit)
import flashcomm
from flashcomm import codecs, kernels, lab, machine, simulate
from flashcomm.lab import hosts
from flashcomm.transports import lanes, pages
xs = [torch.randn(4, 256, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(2)]
for spec in ("int8g128", "lossless"):
    codec = codecs.parse(spec)
    payload = flashcomm.encode(xs[0], codec)
    assert torch.equal(payload, codec.encode(xs[0])), spec
    assert flashcomm.decode(payload, codec, cols=256, dtype=torch.bfloat16).shape == (4, 256)
    simulate.all_reduce(xs, codec, "two_step")
assert kernels.route(codecs.parse("int8g128"), "cpu")[0] == "numba"
assert pages.empty(torch.Size([4096, 1024]), torch.bfloat16).shape == (4096, 1024)
print(lanes.why_not_shared())
print(hosts.unavailable())
print(machine.describe()["cores"] > 0)
from typer.testing import CliRunner
from flashcomm.cli import app
print(CliRunner().invoke(app, ["env"]).exit_code)
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
got = flashcomm.all_reduce(xs[0], "int8g128", algorithm="two_step")
print(torch.equal(got, simulate.all_reduce(xs[:1], "int8g128", "two_step")))
"""
    done = fresh(code)
    assert done.returncode == 0, done.stderr[-3000:]
    # The gloo of torch 2.8 says on stdout that it is connected.
    shared, namespaces, *rest = (line for line in done.stdout.splitlines() if not line.startswith("[Gloo]"))
    assert shared == "no /proc: shared memory needs Linux"
    assert namespaces == "network namespaces are Linux's, and this is darwin"
    assert rest == ["True", "0", "True"]
