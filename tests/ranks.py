"""Real ranks for tests: N processes with a gloo group between them, kept alive and fed with functions.

Starting a process costs seconds of `import torch`, so ranks are forked from a process that has done it, and one set per
world size is kept, which makes a test cost milliseconds.
"""

import gc
import multiprocessing
import os
import sys
import traceback
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path

WAYS = {
    "memory": {},
    "connections": {"FLASHCOMM_SHARED_MEMORY": "0"},
    "gloo": {"FLASHCOMM_SHARED_MEMORY": "0", "FLASHCOMM_CONNECTIONS": "0"},
}
"""How messages may go between ranks of one host, and what to set for that."""

forked = multiprocessing.get_context("forkserver")
"""Processes that have imported torch, transformers and flashcomm."""
# Without threads, which a fork would lose: torch and numba start theirs when they first compute.
forked.set_forkserver_preload(["flashcomm", "flashcomm.kernels.cpu", "transformers.models.llama.modeling_llama"])


class RankFailed(AssertionError):
    """A function raised on a rank; the message holds that rank's traceback."""


class Ranks:
    """`ranks` processes; `run(f, *args)` calls ``f(*args)`` on each and returns the results in rank order."""

    def __init__(
        self, ranks: int, timeout_s: float = 60.0, backend: str = "gloo", path: str = "", env: dict | None = None
    ):
        # Ranks may import from elsewhere, so this module imports no torch.
        import torch.distributed as dist

        # Held here, so that nobody else can get the port before the ranks are there.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self.store.port
        # What others are forked from has imported packages already, and has the environment of its own start.
        context = multiprocessing.get_context("spawn") if path else forked
        environment = {**os.environ, **(env or {})}
        pipes = [context.Pipe() for _ in range(ranks)]
        self.pipes, theirs = map(list, zip(*pipes, strict=True))
        self.closed = False
        # In a group of this set a call waits for a rank that failed until the group's time-out, and no longer.
        self.patience_s = timeout_s + 60
        common = ranks, port, timeout_s, backend, environment
        if path:
            calls = [(_fork, (theirs, path, *common))]
        else:
            calls = [(_serve, (pipe, rank, *common)) for rank, pipe in enumerate(theirs)]
        self.processes = [context.Process(target=target, args=args, daemon=True) for target, args in calls]
        for process in self.processes:
            process.start()
        for pipe in theirs:
            pipe.close()

    def start(self, function, *args):
        """Begin ``function(*args)`` on every rank without waiting."""
        for pipe in self.pipes:
            pipe.send((function, args))

    def outcome(self, rank: int):
        """What rank returned, or the exception it raised, or None if it died."""
        try:
            return self.pipes[rank].recv()
        except EOFError:
            return None

    def run(self, function, *args) -> list:
        """Results of ``function(*args)`` in rank order; `RankFailed` with all tracebacks if any rank raised.

        Ranks that then wait for it, in an engine's group perhaps, are killed after a while: better than no traceback.
        """
        self.start(function, *args)
        results, failures, running = {}, {}, {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while running:
            ready = wait(running, self.patience_s if failures else None)
            if not ready:
                failures |= dict.fromkeys(running.values(), "waits for a rank that failed")
                self.close()
                break
            for rank in map(running.pop, ready):
                good, result = self.outcome(rank) or (False, "died")
                (results if good else failures)[rank] = result
        if failures:
            raise RankFailed("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))
        return [results[rank] for rank in range(len(self.pipes))]

    def close(self):
        """Stop the processes."""
        self.closed = True
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _fork(pipes, path: str, *common):
    """Become rank 0 and fork the others, after an import of what lies in `path`."""
    sys.path.insert(0, path)
    import_module("transformers.models.llama.modeling_llama")
    rank = next((rank for rank in range(1, len(pipes)) if os.fork() == 0), 0)
    for other, pipe in enumerate(pipes):
        if other != rank:
            pipe.close()
    _serve(pipes[rank], rank, *common)


def _serve(pipe, rank: int, ranks: int, port: int, timeout_s: float, backend: str, env: dict):
    # What has been imported stays, so no collection needs to look at it.
    gc.freeze()
    os.environ.clear()
    os.environ |= env
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "flashcomm":
        import flashcomm  # noqa: F401  registers it
    if backend == "nccl":
        # Ranks may have to share a GPU, which NCCL 2.30 and later allow on request.
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
        torch.cuda.set_device(rank % torch.cuda.device_count())
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=limit)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)


def forking(logs: Path):
    """The configuration of torch's launcher, whose ranks are then forked, and print to files in `logs`."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    def configured(**given):
        specs = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
        return LaunchConfig(**{**given, "start_method": "forkserver", "logs_specs": specs})

    return configured


def forget(name: str):
    """Take a variable out of the environment of a forked process, before it imports what looks at it."""
    os.environ.pop(name, None)


def shared(ranks: int, path: str = "", by: str = "memory") -> Ranks:
    """The kept set of `ranks` processes (that import from `path` first); `close_shared` ends all of them.

    Messages go by one of `WAYS`. Only the sets used last are kept: the threads of gloo wake up even if nobody sends.
    """
    key = ranks, path, by
    kept = _kept.pop(key, None)
    _kept[key] = kept if kept and not kept.closed else Ranks(ranks, path=path, env=WAYS[by])
    while len(_kept) > _MOST_KEPT:
        _kept.pop(next(iter(_kept))).close()
    return _kept[key]


_MOST_KEPT = 3
_kept: dict[tuple, Ranks] = {}


def close_shared():
    """Stop every kept set of ranks."""
    while _kept:
        _kept.popitem()[1].close()
