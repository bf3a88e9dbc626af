"""Four collectives with compressed payloads, over any `torch.distributed` process group."""

from flashcomm.collectives.call import Work
from flashcomm.collectives.stats import Record, reset_stats, stats
from flashcomm.collectives.verbs import all_gather, all_reduce, all_to_all, reduce_scatter

__all__ = ["Record", "Work", "all_gather", "all_reduce", "all_to_all", "reduce_scatter", "reset_stats", "stats"]
