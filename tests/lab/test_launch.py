"""Ranks that meet, run a function and leave."""

import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch.distributed as dist
from torch.distributed.elastic.metrics import api as metrics

import ranks
from events import asleep, wait_for
from flashcomm.lab import launch


def meeting(pipe, rank: int, port: int):
    """Join, tell about it at each step, and as rank 0 wait for a word between the connections and the function."""
    meet = dist.init_process_group

    def connect(*args, **kwargs):
        meet(*args, **kwargs)
        pipe.send("connected")
        if rank == 0:
            pipe.recv()

    dist.init_process_group = connect
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # The store is the test's, as a launcher's is its own.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    launch.join(pipe.send, ("runs",))


def test_no_rank_runs_and_leaves_while_another_one_connects():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, theirs = zip(*(ranks.forked.Pipe() for _ in range(2)), strict=True)
    processes = [
        ranks.forked.Process(target=meeting, args=(pipe, rank, store.port), daemon=True)
        for rank, pipe in enumerate(theirs)
    ]
    for process in processes:
        process.start()
    assert [pipe.recv() for pipe in pipes] == ["connected"] * 2
    pid = processes[1].pid
    assert pid
    wait_for(lambda: pipes[1].poll() or asleep(pid))
    assert not pipes[1].poll()
    pipes[0].send("go on")
    assert [pipe.recv() for pipe in pipes] == ["runs"] * 2
    for process in processes:
        process.join()
        assert process.exitcode == 0


class Clock:
    """A clock that interrupts the launcher in the moment in which it begins to time a look at its ranks."""

    def time(self) -> float:
        caller = sys._getframe(1)
        if caller.f_code.co_name == "wrapper" and caller.f_locals["f"].__name__ == "_monitor_workers":
            os.kill(os.getpid(), signal.SIGINT)
        return time.time()


def test_ctrl_c_is_one_whatever_the_launcher_makes_of_it(forked_launch, monkeypatch):
    handler, before = signal.getsignal(signal.SIGINT), set(multiprocessing.active_children())
    monkeypatch.setattr(metrics, "time", Clock())
    try:
        with pytest.raises(launch.Interrupted, match="all ranks have been stopped"):
            launch.run(signal.pause, ranks=1)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert set(multiprocessing.active_children()) <= before
