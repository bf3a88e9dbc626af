"""What was asked for and not done is a warning, once per reason; counts have typed fields."""

import logging
import sys

import pytest
import torch

import flashcomm
import ranks
from calls import new_group
from flashcomm.collectives import Record
from flashcomm.collectives.group import group_of
from flashcomm.integrations.sums import Sums
from flashcomm.policy import Policy


class Kept(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        # A machine that has not compiled its kernels yet says so, too.
        if record.name != "flashcomm.kernels":
            self.messages.append(record.getMessage())


def warnings_of(*calls) -> list[str]:
    """Warnings of a process that has given none before."""
    sys.modules["flashcomm.collectives.stats"]._warned.clear()
    kept, log = Kept(), logging.getLogger("flashcomm")
    log.addHandler(kept)
    try:
        for call in calls:
            call()
    finally:
        log.removeHandler(kept)
    return kept.messages


def warning(codec: str, reason: str, algorithm: str = "two_step") -> str:
    return (
        f"{codec} was asked for, but auto sends values uncompressed: {reason}. Give algorithm='{algorithm}' to "
        "compress anyway, or strict=True to raise (counted in flashcomm.stats(), said once per reason)"
    )


def declined_on_ranks():
    group, small = new_group(), torch.ones(4, 256)
    reason = {True: "compression does not pay in shared memory", False: "message under 64 KiB"}[
        group_of(group).meet(small.device).shared
    ]
    assert warnings_of(
        lambda: flashcomm.all_reduce(small, "int2g32", group),
        lambda: flashcomm.all_reduce(small, "int2g32", group),
        lambda: flashcomm.all_reduce(small[:2], "int4g32", group),
    ) == [warning("int2g32", reason)]
    assert warnings_of(lambda: flashcomm.all_reduce(small, "int4g32/fp32", group)) == [
        warning("int4g32/fp32", reason, "hierarchical")
    ]
    # Nothing else was asked for than what is done.
    assert not warnings_of(
        lambda: flashcomm.all_reduce(small, "int2g32", group, algorithm="two_step"),
        lambda: flashcomm.all_reduce(small, "int2g32", group, algorithm="plain"),
        lambda: flashcomm.all_reduce(small, "none", group),
        lambda: flashcomm.all_reduce(small, "fp32/int4g32", group),
        lambda: flashcomm.all_reduce(small, "int2g32", group, batch_invariant=True),
        lambda: flashcomm.all_gather(small, "int2g32", group),
    )
    with pytest.raises(RuntimeError, match=f"strict: .* would run uncompressed: {reason}"):
        flashcomm.all_reduce(small, "int2g32", group, strict=True)
    sums = Sums(Policy(codec="int4g128", min_bytes=0), group, lambda: False, logging.getLogger("engine"))
    codec = flashcomm.codec("int4g128")
    assert warnings_of(lambda: [sums.reduce(small, codec, torch.clone) for _ in range(2)]) == [
        warning("int4g128", reason)
    ]


def records_on_ranks():
    group, x = new_group(), torch.ones(64, 512)
    flashcomm.reset_stats()
    for _ in range(3):
        flashcomm.all_reduce(x, "int4g32", group, algorithm="two_step")
    flashcomm.all_gather(x, "bf16", group)
    flashcomm.all_reduce(x, "fp32/int4g32", group)
    found = {(record.op, record.codec): record for record in flashcomm.stats()["records"]}
    assert found["all_reduce", "int4g32"] == Record(
        op="all_reduce",
        algorithm="two_step",
        codec="int4g32",
        reason="asked for",
        uncompressed=False,
        declined=None,
        calls=3,
        wire_bytes=3 * 64 * flashcomm.codec("int4g32").payload_bytes(512),
        plain_bytes=3 * x.numel() * 4,
    )
    assert found["all_gather", "bf16"].calls == 1
    assert "/" not in found["all_reduce", "fp32"].algorithm
    whole = flashcomm.stats()
    assert sum(r.wire_bytes for r in whole["records"]) == whole["wire_bytes"]
    assert {f"{r.op}/{r.algorithm}/{r.codec}": r.calls for r in whole["records"]} == whole["calls"]
    flashcomm.reset_stats()
    assert flashcomm.stats()["records"] == ()


@pytest.mark.parametrize("by", ranks.WAYS)
@pytest.mark.parametrize("function", [declined_on_ranks, records_on_ranks], ids=lambda f: f.__name__)
def test_on_two_ranks(function, by):
    ranks.shared(2, by=by).run(function)
