"""Ranks meet: a step that fails on one rank is an error on all, and the next call starts clean."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from numba.core import caching, config

import flashcomm
import ranks
from calls import all_reduce_of_ones, check, new_group
from flashcomm import measured
from flashcomm.errors import CollectiveError, PeerLost, RanksDisagree, TimedOut, Unavailable, kind_of
from flashcomm.transports.base import Ranks, Step


def a_wrong_setting():
    group = new_group()
    if dist.get_rank() == 1:
        os.environ["FLASHCOMM_SHARED_MEMORY"] = "maybe"
    try:
        with pytest.raises(
            ValueError, match="rank 1 could not look at its host while the ranks met: SettingError: FLASHC"
        ):
            all_reduce_of_ones(group)
    finally:
        os.environ.pop("FLASHCOMM_SHARED_MEMORY", None)
    check(all_reduce_of_ones(group))


def a_step_that_raises(step, who):
    """A step that a rank does alone fails there: the others learn it, and the next call starts clean."""
    group, real, met = new_group(), Ranks.alone, []

    def full():
        raise OSError(122, "Disk quota exceeded")

    def alone(self, now, act):
        met.append(now)
        return real(self, now, full if (now, self.rank) == (step, who) else act)

    said = rf"^rank {who} could not {step.value} while the ranks met: OSError: \[Errno 122\] Disk quota exceeded$"
    Ranks.alone = alone
    try:
        with pytest.raises(CollectiveError, match=said):
            all_reduce_of_ones(group)
    finally:
        Ranks.alone = real
    assert met[-1] is step
    check(all_reduce_of_ones(group))


def _cannot_tell():
    raise RuntimeError("Could not determine home directory.")


def no_home(without):
    """Nothing was measured where there is no folder for it."""
    group, real, kept = new_group(), measured.Path.home, {}
    if dist.get_rank() in without:
        kept = {name: os.environ.pop(name, None) for name in ("HOME", "FLASHCOMM_TUNING")}
        measured.Path.home = staticmethod(_cannot_tell)
    try:
        check(all_reduce_of_ones(group))
    finally:
        measured.Path.home = real
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def test_a_wrong_setting_on_one_rank_is_an_error_on_all():
    ranks.shared(3).run(a_wrong_setting)


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("step", Step, ids=lambda step: step.name)
def test_a_step_that_fails_on_one_rank_fails_on_all_and_is_tried_again(step, who):
    if step is Step.SYMMETRIC:
        pytest.skip("no CUDA device on this machine" if not torch.cuda.is_available() else "needs two GPUs")
    ranks.shared(2, by="connections" if step in (Step.LISTEN, Step.CONNECT) else "memory").run(
        a_step_that_raises, step, who
    )


SYMMETRIC = "torch.distributed._symmetric_memory"


class NoMemory:
    """torch's symmetric memory on a machine where rank 1 has none left."""

    def empty(self, *shape, dtype, device):
        if dist.get_rank() == 1:
            raise RuntimeError("out of memory")
        return torch.empty(16, dtype=dtype)

    def rendezvous(self, memory, group):
        raise AssertionError("ranks must not wait for each other here")


def one_rank_has_no_gpu_memory() -> str:
    from flashcomm.collectives.group import group_of
    from flashcomm.transports.symmetric.memory import SymmetricMemory

    kept, synchronize = sys.modules.get(SYMMETRIC), torch.cuda.synchronize
    sys.modules[SYMMETRIC] = dist._symmetric_memory = NoMemory()
    torch.cuda.synchronize = lambda device: None
    try:
        opened, why = SymmetricMemory.open(group_of(None).ranks, dist.group.WORLD, torch.device("cpu"))
    finally:
        torch.cuda.synchronize = synchronize
        sys.modules[SYMMETRIC] = dist._symmetric_memory = kept
    assert opened is None
    return why


def test_ranks_map_the_memory_of_gpus_only_if_all_have_some():
    pytest.importorskip(SYMMETRIC)
    whys = ranks.shared(3).run(one_rank_has_no_gpu_memory)
    assert whys == ["rank 1: no symmetric memory: out of memory"] * 3


def test_no_step_is_told_but_through_the_guard():
    """`Ranks.tell` is for what a rank has at hand; whatever may fail on one rank alone goes through `each`."""
    package = Path(flashcomm.__file__).parent
    told = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\btell\(", path.read_text()) and path.name != "base.py"
    }
    assert told == {"bench/tune.py", "parts/measuring.py"}
    named = {step for step in Step if any(f"Step.{step.name}" in path.read_text() for path in package.rglob("*.py"))}
    assert named == set(Step)


@pytest.mark.parametrize("without", [(0, 1), (0,), (1,)], ids=["all", "rank 0", "rank 1"])
def test_ranks_meet_without_a_home_folder(without):
    ranks.shared(2).run(no_home, without)


def a_full_disk(folder):
    """Rank 1 compiles for itself in its first call, and the other waits for it that long."""
    if dist.get_rank() == 1:
        caching.IndexDataCacheFile._save_data = _no_room
        config.CACHE_DIR = folder
    for _ in range(2):
        check(all_reduce_of_ones(None))
    return len(os.listdir(folder))


def _no_room(*args):
    raise OSError(28, "No space left on device")


def test_a_rank_whose_disk_is_full_joins(tmp_path, fresh_ranks):
    assert fresh_ranks(2).run(a_full_disk, str(tmp_path))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PeerLost("x"), PeerLost),
        (RanksDisagree("x"), RanksDisagree),
        (Unavailable("x"), Unavailable),
        (RuntimeError("[gloo] Timed out waiting 4000ms for recv operation to complete"), TimedOut),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:36531"), PeerLost),
        (RuntimeError("[gloo] Read error [127.0.0.1]:5: Connection reset by peer"), PeerLost),
        (RuntimeError("out of memory"), CollectiveError),
    ],
)
def test_errors_of_every_origin_have_a_kind(error, kind):
    assert kind_of(error) is kind
    assert issubclass(kind, RuntimeError)
