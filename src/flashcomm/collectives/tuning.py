"""Where measured costs are kept: a JSON file with one machine for each group of hosts, read when ranks meet.

Only rank 0 reads it and tells the others, so that all ranks plan with the same figures.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flashcomm.planner import LinkCosts

_log = logging.getLogger("flashcomm")


def path() -> Path:
    """The file: ``FLASHCOMM_TUNING``, or flashcomm/tuning.json in the user's cache folder."""
    if given := os.environ.get("FLASHCOMM_TUNING"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcomm" / "tuning.json"


def name_of(backend: str, hosts: Sequence[tuple[int, str]], by: str = "") -> str:
    """What costs are kept under: the backend, and how many ranks are on which hosts.

    Args:
        backend: of the process group.
        hosts: number and name of each rank's host.
        by: what carries payloads, if not the backend.

    >>> name_of("gloo", [(0, "a"), (0, "a"), (1, "b"), (1, "b")], by="connections")
    'gloo: 2 on a, 2 on b, by connections'
    """
    counts = Counter(hosts)
    return f"{backend}: {', '.join(f'{n} on {host}' for (_, host), n in counts.items())}" + (f", by {by}" if by else "")


def names() -> list[str]:
    """The groups in the file; none, and a word in the log, if it cannot be read."""
    try:
        return [str(name) for name in json.loads(path().read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        _log.warning("%s is no file of 'flashcomm tune' and is ignored: %s", path(), error)
        return []


def load(name: str) -> LinkCosts | None:
    """The machine of that name; None, and a word in the log if the file cannot be read, where there is none."""
    try:
        fields = json.loads(path().read_text()).get(name)
        return LinkCosts.from_dict(fields) if fields else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is no file of 'flashcomm tune' and is ignored: %s", path(), error)
        return None


def save(costs: LinkCosts) -> Path:
    """Add a machine to the file, or replace the one of its name."""
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        machines = json.loads(target.read_text())
    except (OSError, ValueError):
        machines = {}
    machines[costs.name] = costs.as_dict()
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.write_text(json.dumps(machines, indent=1) + "\n")
    partial.replace(target)
    return target
