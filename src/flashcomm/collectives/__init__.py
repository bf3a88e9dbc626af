"""Collectives and messages with compressed payloads, over any `torch.distributed` process group."""

from flashcomm.collectives.call import Work
from flashcomm.collectives.stats import Record, reset_stats, stats
from flashcomm.collectives.verbs import (
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    irecv,
    isend,
    recv,
    reduce_scatter,
    send,
)

__all__ = [
    "Record",
    "Work",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "irecv",
    "isend",
    "recv",
    "reduce_scatter",
    "reset_stats",
    "send",
    "stats",
]
