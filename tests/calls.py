"""What tests of real ranks share: groups that have never met, a call whose result is known, errors and their time.

Ranks tell each other how far they are beside the group under test, through the store that they met in.
"""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import flashcomm
from flashcomm.collectives.group import group_of
from flashcomm.transports import lanes


def new_group(timeout_s: float = 60.0) -> dist.ProcessGroup:
    """All ranks, as if they had never met."""
    return dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=timeout_s))


def all_reduce_of_ones(group, shape=(64, 256), codec="fp32", **kwargs):
    kwargs = {"algorithm": "two_step", **kwargs}
    return flashcomm.all_reduce(torch.ones(shape), codec, group, **kwargs)


def check(result):
    assert result.unique().tolist() == [dist.get_world_size()]


def failure(call, kind: type[Exception] = RuntimeError) -> tuple[str, float]:
    """The message of the error that `call` raises, and after how many seconds."""
    start = time.monotonic()
    with pytest.raises(kind) as raised:
        call()
    return str(raised.value), time.monotonic() - start


def tell(word: str, group=None):
    """Let the other ranks know that this one has got to `word`."""
    _store().set(_key(word, dist.get_rank(), group), "")


def hear(word: str, group=None, within_s: float = 60.0):
    """Wait until all other ranks have got to `word`."""
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    _store().wait([_key(word, rank, group) for rank in others], timedelta(seconds=within_s))


def _store():
    return dist.distributed_c10d._get_default_store()


def _key(word: str, rank: int, group) -> str:
    return f"{group.group_name if group else 'world'}: {word} on rank {rank}"


def meeting(group=None) -> lanes.Meeting:
    """How the ranks of a group met, of CPU tensors."""
    return group_of(group).meet(torch.device("cpu"))
