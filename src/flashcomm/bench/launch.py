"""Start ranks on this machine with torch's elastic launcher, and stop all of them whatever happens.

Each rank is a process of its own that runs one function; what rank r returns is element r of the result.
"""

import json
import logging
import os
import signal
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


class RankError(RuntimeError):
    """A rank failed; the others have been stopped."""


class Interrupted(RankError):
    """Ctrl-C; all ranks have been stopped."""


def run(function: Callable, args: tuple = (), *, ranks: int, timeout_s: float = 120.0) -> list:
    """Run ``function(*args)`` on `ranks` processes that share a gloo (on GPUs NCCL) process group.

    Args:
        function: a module-level function; it and its arguments are pickled.
        args: its arguments.
        ranks: number of processes, all on this machine.
        timeout_s: after which a collective that some rank has not joined is an error.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RankError: a rank raised or died; says which and why, and no process is left.
        Interrupted: Ctrl-C; no process is left.
    """
    # The launcher's own reports repeat what RankError says, at greater length; each of its modules has a level.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        results = elastic_launch(config, _rank_main)(function, args, timeout_s)
    except ChildFailedError as error:
        raise RankError(_explain(error)) from None
    except SignalException as stopped:
        # The launcher turns Ctrl-C into an exception of its own, after it has stopped the ranks.
        raise Interrupted("interrupted; all ranks have been stopped") from stopped
    return [results[rank] for rank in range(ranks)]


def backend() -> str:
    """NCCL where every rank can have a GPU of its own, gloo otherwise."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "gloo"


def _interrupt_once(signum: int, frame: Any):
    # Ctrl-C reaches a rank twice, from the terminal and from the launcher; the second must not disturb the way out.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


@record
def _rank_main(function: Callable, args: tuple, timeout_s: float):
    signal.signal(signal.SIGINT, _interrupt_once)
    ranks, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // ranks))
    # The command that started us has compiled the kernels and said so.
    logging.getLogger("flashcomm.kernels").setLevel(logging.ERROR)
    name = backend()
    if name == "nccl":
        torch.cuda.set_device(local_rank)
    dist.init_process_group(name, timeout=timedelta(seconds=timeout_s))
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()


def _explain(error: ChildFailedError) -> str:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return f"rank {rank} was killed by signal {-failure.exitcode} ({name}); the other ranks have been stopped"
    message = failure.message
    if isinstance(message, dict):
        message = message.get("message", json.dumps(message))
    return f"rank {rank} failed: {message}. The other ranks have been stopped"
