"""The ranks that tests run functions on."""

import signal

import pytest

import ranks


def fail_or_wait(rank: int):
    """Wait for ever as that rank; any other one raises."""
    import torch.distributed as dist

    if dist.get_rank() == rank:
        signal.pause()
    raise ValueError(f"of rank {dist.get_rank()}")


def test_a_failure_is_told_although_another_rank_waits_for_ever(monkeypatch):
    monkeypatch.setattr(ranks, "_kept", {})
    world = ranks.shared(2)
    world.patience_s = 0.1
    with pytest.raises(ranks.RankFailed, match=r"rank 0: waits for a rank that failed\nrank 1: Traceback") as raised:
        world.run(fail_or_wait, 0)
    assert "ValueError: of rank 1" in str(raised.value)
    assert not any(process.is_alive() for process in world.processes)
    # Others get new ones.
    assert ranks.shared(2) is not world
    ranks.close_shared()
