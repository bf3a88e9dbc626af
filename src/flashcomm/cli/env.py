"""`flashcomm env`."""

from collections.abc import Callable
from importlib.util import find_spec

from rich.table import Table

import flashcomm
from flashcomm.cli.base import Json, stdout
from flashcomm.errors import SettingError
from flashcomm.report.rows import write_json


def env(json_file: Json = None):
    """Show what is installed and measured, which fast paths are on, and why one is off."""
    import torch
    import torch.distributed as dist

    from flashcomm import kernels, machine, measured
    from flashcomm.lab import hosts
    from flashcomm.transports import lanes

    facts, groups = machine.describe(), measured.names()
    codec = flashcomm.codec("int8g128")
    cpu, cpu_why = kernels.route(codec, "cpu")
    gpu, gpu_why = kernels.route(codec, "cuda") if torch.cuda.is_available() else ("off", "no CUDA device")
    paths = {
        "CPU codecs": (cpu, cpu_why),
        "GPU codecs": (gpu, gpu_why),
        "shared memory": _unless(_asked(lanes.why_not_shared)),
        "gloo": ("on", "") if dist.is_gloo_available() else ("off", "this torch is built without it"),
        "NCCL": ("on", "") if dist.is_nccl_available() else ("off", "this torch is built without it"),
        "transformers": _presence("transformers", "pip install 'flashcomm[transformers]'"),
        "plots": _presence("matplotlib", "pip install 'flashcomm[plot]'"),
        "lab": _unless(hosts.unavailable()),
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("flashcomm", flashcomm.__version__ + (f" (commit {facts['commit']})" if facts["commit"] else ""))
    table.add_row("CPU", f"{facts['cpu']}, {facts['cores']} cores, torch uses {torch.get_num_threads()} threads")
    table.add_row("GPU", facts["gpu"] or "none")
    for name, version in facts["versions"].items():
        table.add_row(name, version)
    for name, (found, why) in paths.items():
        table.add_row(name, f"{found}{': ' + why if why else ''}")
    kept, file = groups or ["nothing measured yet: see 'flashcomm tune'"], measured.where()
    table.add_row("tuning", "\n".join([file, *kept]))
    stdout.print(table, highlight=False)
    document = {
        "flashcomm": flashcomm.__version__,
        **facts,
        "paths": {n: {"state": s, "why": w} for n, (s, w) in paths.items()},
        "tuning": {"file": file, "groups": groups},
    }
    write_json(json_file, document)


def _presence(module: str, remedy: str) -> tuple[str, str]:
    return ("on", "") if find_spec(module) else ("off", remedy)


def _asked(why: Callable[[], str]) -> str:
    """The reason that a function gives, or the setting that is wrong."""
    try:
        return why()
    except SettingError as error:
        return str(error)


def _unless(why: str | None) -> tuple[str, str]:
    return ("off", why) if why else ("on", "")
