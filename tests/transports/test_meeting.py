"""Ranks meet: a step that fails on one rank is an error on all, and the next call starts clean."""

import os

import pytest
import torch.distributed as dist
from numba.core import caching, config

import ranks
from calls import all_reduce_of_ones, check, new_group
from flashcomm import measured
from flashcomm.errors import CollectiveError, PeerLost, RanksDisagree, TimedOut, Unavailable, kind_of
from flashcomm.transports import lanes


def a_wrong_setting():
    group = new_group()
    if dist.get_rank() == 1:
        os.environ["FLASHCOMM_SHARED_MEMORY"] = "maybe"
    try:
        with pytest.raises(ValueError, match="rank 1 failed while the ranks met: SettingError: FLASHCOMM_SHARED"):
            all_reduce_of_ones(group)
    finally:
        os.environ.pop("FLASHCOMM_SHARED_MEMORY", None)
    check(all_reduce_of_ones(group))


def a_step_that_raises(module, name):
    """Each step that a rank does alone, by what it calls."""
    owner = {"measured": measured, "lanes": lanes}[module]
    group, real = new_group(), getattr(owner, name)

    def fail(*args):
        raise OSError(122, "Disk quota exceeded")

    if dist.get_rank() == 0:
        setattr(owner, name, fail)
    try:
        with pytest.raises(CollectiveError, match=r"rank 0 failed while the ranks met: OSError: \[Errno 122\] Disk"):
            all_reduce_of_ones(group)
    finally:
        setattr(owner, name, real)
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


@pytest.mark.parametrize(("module", "name"), [("lanes", "_site"), ("measured", "load")])
def test_a_step_that_fails_on_one_rank_fails_on_all_and_is_tried_again(module, name):
    ranks.shared(2).run(a_step_that_raises, module, name)


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
