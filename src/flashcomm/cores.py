"""The cores that a rank may use, and who shares them with it."""

import os
import socket
from collections.abc import Iterable
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

    def load(self, seats: Iterable["Seat"]) -> float:
        """Threads for each core on this machine, of all ranks with a seat; above 1 they take turns.

        >>> one, other = (Seat("here", 1, frozenset({0, 1})) for _ in range(2))
        >>> one.load([one, other, Seat("there", 8, frozenset({0}))])
        1.0
        """
        here = [seat for seat in seats if seat.machine == self.machine]
        return sum(seat.threads for seat in here) / len(frozenset().union(*(seat.cores for seat in here)))


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
