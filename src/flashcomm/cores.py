"""The cores that a rank may use, and who shares them with it."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch


def available() -> set[int]:
    """The numbers of the cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


class Seat(NamedTuple):
    """Where a rank runs; ranks tell each other theirs."""

    machine: str
    """The same for ranks that share cores: containers and network namespaces do, too."""
    threads: int
    cores: frozenset[int]

    @classmethod
    def mine(cls) -> "Seat":
        return cls(_machine(), torch.get_num_threads(), frozenset(available()))


def crowd(seats: Sequence[Seat]) -> float:
    """Threads for each core, on the machine that has the most; 0 where every machine has a core left over.

    >>> one, other, alone = (Seat(machine, 1, frozenset({0, 1})) for machine in ("a", "a", "b"))
    >>> crowd([one, other, alone]), crowd([one, alone])
    (1.0, 0.0)
    """
    most = 0.0
    for machine in {seat.machine for seat in seats}:
        here = [seat for seat in seats if seat.machine == machine]
        cores = frozenset().union(*(seat.cores for seat in here))
        most = max(most, sum(seat.threads for seat in here) / len(cores))
    return most if most >= 1 else 0.0


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
