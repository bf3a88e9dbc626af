"""Ranks meet: a step that fails on one rank is an error on all, and the next call starts clean."""

import os

import pytest
import torch.distributed as dist

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


def no_home():
    """Nothing was measured where there is no folder for it."""
    group, kept = new_group(), {name: os.environ.pop(name, None) for name in ("HOME", "FLASHCOMM_TUNING")}
    real = measured.Path.home
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


def test_ranks_meet_without_a_home_folder():
    ranks.shared(2).run(no_home)


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
