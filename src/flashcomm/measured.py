"""Measured costs of links, in a JSON file with one entry for each group of hosts, read when ranks meet.

Only rank 0 reads it and tells the others, so that all ranks plan with the same figures. A file that cannot be read is
a warning, not an error.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flashcomm import settings
from flashcomm.planner import LinkCosts
from flashcomm.report.rows import write_json

_log = logging.getLogger("flashcomm")


def path() -> Path:
    """The file: ``FLASHCOMM_TUNING``, or flashcomm/tuning.json in the user's cache folder.

    Raises:
        RuntimeError: neither is known, as in a container without a home folder.
    """
    if given := settings.text("FLASHCOMM_TUNING"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcomm" / "tuning.json"


def where() -> str:
    """The file's path as text, or the reason why there is none."""
    try:
        return str(path())
    except RuntimeError as error:
        return f"none: {error} Set FLASHCOMM_TUNING or XDG_CACHE_HOME"


def name_of(backend: str, hosts: Sequence[tuple[int, str]], by: str = "", link: str = "") -> str:
    """The key of a group's costs: the backend, how many ranks are on which hosts, and the link between GPUs.

    Args:
        backend: of the process group.
        hosts: number and name of each rank's host.
        by: the transport that carries payloads, if not the backend.
        link: the slowest between two GPUs, if it is known: a host may have fast and slow ones.

    >>> name_of("gloo", [(0, "a"), (0, "a"), (1, "b"), (1, "b")], by="connections")
    'gloo: 2 on a, 2 on b, by connections'
    >>> name_of("nccl", [(0, "a with NVIDIA L4"), (0, "a with NVIDIA L4")], link="PCIe")
    'nccl: 2 on a with NVIDIA L4, over PCIe'
    """
    counts = Counter(hosts)
    name = f"{backend}: {', '.join(f'{n} on {host}' for (_, host), n in counts.items())}"
    return name + (f", by {by}" if by else "") + (f", over {link}" if link else "")


def names() -> list[str]:
    """Keys of the groups in the file; none if it cannot be read."""
    return [str(name) for name in _read()]


def load(name: str) -> LinkCosts | None:
    """Costs under the key `name`; None if there are none, or if the file cannot be read."""
    try:
        fields = _read().get(name)
        return LinkCosts.from_dict(fields) if fields else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _ignore(error)
        return None


def save(machine: LinkCosts) -> Path:
    """Add costs to the file, or replace those under the same name."""
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        machines = json.loads(target.read_text())
    except (OSError, ValueError):
        machines = {}
    machines[machine.name] = machine.as_dict()
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    write_json(partial, machines)
    partial.replace(target)
    return target


def _read() -> dict:
    try:
        found = json.loads(path().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RuntimeError) as error:
        _ignore(error)
        return {}
    if isinstance(found, dict):
        return found
    _ignore(TypeError(f"it holds a {type(found).__name__}"))
    return {}


def _ignore(error: Exception):
    _log.warning("ignoring %s: it was not written by 'flashcomm tune': %s", where(), error)
