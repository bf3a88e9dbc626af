"""Calls of all kinds with faults at random steps: right bits or an error, on time, and nothing is left behind.

Some hundreds by default; ``FLASHCOMM_FAULTS=10000 pytest -s tests/collectives/test_faults.py`` for more. The log has a
line of JSON for each fault: what was injected where, and what each rank saw after how many seconds.
"""

import gc
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Timer

import pytest
import torch
import torch.distributed as dist

import faults
import ranks
from calls import new_group
from faults import Message
from flashcomm.errors import CollectiveError

COUNT = int(os.environ.get("FLASHCOMM_FAULTS", "120"))
EVERY = 60
"""Calls for each fault."""
TIMEOUT_S, STOP_S = 5.0, 2.0
SLACK_S = 20.0
"""For a machine that is busy: the alternative is to wait for ever."""
COMPILED = "compiled loops"
"""Shared memory without the steps inside of its loops: there faults come at a moment, from another thread."""
WAYS = {**ranks.WAYS, COMPILED: ranks.WAYS["memory"]}
ALGORITHMS = [name for name in faults.ALGORITHMS if name != "hierarchical"]
MESSAGES = [
    Message(),
    Message(rows=33, cols=640, dtype=torch.bfloat16),
    Message(codec="int8g128", rows=5, cols=4096, dtype=torch.bfloat16),
    Message(codec="int8g128", rows=1, cols=4096, dtype=torch.bfloat16),
    Message(codec="int4g32+spike", rows=64, cols=1024),
    Message(codec="int8g128", rows=1024, cols=4096, dtype=torch.bfloat16),
]
LARGE = len(MESSAGES) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An event on one rank in the course of a call."""

    call: int
    algorithm: str
    message: int
    """Place in `MESSAGES`."""
    async_op: bool
    meets: bool
    """Whether the ranks of the group have not met before."""
    kind: str
    """``raise``, ``stop`` (and go on after `STOP_S`) or ``kill``."""
    rank: int
    share: float
    """Place in the call: 0 to 1, of the steps, or of the seconds, that such a call took before."""

    def happen(self):
        if self.kind == "raise":
            raise RuntimeError("injected")
        if self.kind == "stop":
            subprocess.Popen(["sh", "-c", f"sleep {STOP_S}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP if self.kind == "stop" else signal.SIGKILL)


class Calls:
    """The calls of this rank: how many steps, and how long, each kind took, and where a fault happens."""

    def __init__(self, compiled: bool):
        self.steps, self.compiled = faults.Steps(compiled), compiled
        self.right = {
            (algorithm, number): faults.expected(algorithm, dist.get_rank(), dist.get_world_size(), message)
            for algorithm in ALGORITHMS
            for number, message in enumerate(MESSAGES)
        }
        self.took: dict[tuple, tuple[int, float]] = {}

    def start(self, algorithm: str, number: int, group: dist.ProcessGroup, async_op: bool = False):
        return faults.call(algorithm, group, async_op, MESSAGES[number])

    def outcome(self, algorithm: str, number: int, result) -> tuple[str, str]:
        """Return "right", "wrong" or the name of the error, and the text of the error."""
        try:
            value = result()
            value = value if isinstance(value, torch.Tensor) else value.wait()
        except CollectiveError as error:
            return type(error).__name__, str(error)
        return "right" if torch.equal(value, self.right[algorithm, number]) else "wrong", ""

    def learn(self, algorithm: str, number: int, group: dist.ProcessGroup, meets: bool):
        """Make a call without a fault, and remember its steps and seconds."""
        self.steps.arm(None, lambda: None)
        start = time.monotonic()
        saw = self.outcome(algorithm, number, lambda: self.start(algorithm, number, group))
        assert saw == ("right", "")
        self.took[algorithm, number, meets] = self.steps.count, time.monotonic() - start

    def meet_with(self, fault: Fault, group: dist.ProcessGroup) -> tuple[dict, str]:
        """Make the call of a fault; return a record of it, and the text of the error if there was one."""
        mine, happened = dist.get_rank() == fault.rank, []
        steps, seconds = self.took[fault.algorithm, fault.message, fault.meets]

        def happen():
            happened.append(self.steps.count)
            fault.happen()

        self.steps.arm(max(1, round(fault.share * steps)) if mine and not self.compiled else None, happen)
        timer = Timer(fault.share * seconds, happen)
        dist.barrier()
        start = time.monotonic()
        if mine and self.compiled:
            timer.start()
        call = lambda: self.start(fault.algorithm, fault.message, group, fault.async_op)  # noqa: E731
        saw, text = self.outcome(fault.algorithm, fault.message, call)
        took = time.monotonic() - start
        timer.cancel()
        self.steps.arm(None, lambda: None)
        step = happened[0] if happened else None
        return {**asdict(fault), "step": step, "steps": steps, "saw": saw, "seconds": took}, text


def descriptors() -> int:
    """Open descriptors of this process, without those of groups that are gone."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def run(count: int, seed: int, compiled: bool) -> tuple[list[dict], int]:
    """Make `count` calls, the last with a kill; return a record of each fault, and how many descriptors were left."""
    rank, size, calls = dist.get_rank(), dist.get_world_size(), Calls(compiled)
    drawn, own = random.Random(seed), random.Random(f"{seed} {rank}")
    for algorithm, number in calls.right:
        # Here kernels are compiled, which takes longer than the timeout of the groups below.
        calls.learn(algorithm, number, dist.group.WORLD, meets=False)
    group, pending, records, before = new_group(TIMEOUT_S), [], [], 0

    def finish():
        while pending:
            *kind, work = pending.pop(own.randrange(len(pending)))
            assert calls.outcome(*kind, lambda: work) == ("right", "")  # noqa: B023

    for i in range(count):
        kind = drawn.choice(ALGORITHMS), drawn.randrange(len(MESSAGES))
        async_op, last = drawn.random() < 0.4, i == count - 1
        if not last and drawn.randrange(EVERY):
            pending.append((*kind, calls.start(*kind, group, async_op)))
            if not async_op or len(pending) > 8:
                finish()
            continue
        finish()
        if compiled:
            # The others are over before a thread has begun.
            kind = kind[0], LARGE
        # Faults while ranks meet, too.
        meets = drawn.random() < 0.3
        if meets:
            fresh = new_group()
            calls.learn(*kind, fresh, meets)
            dist.destroy_process_group(fresh)
            dist.destroy_process_group(group)
            group = new_group(TIMEOUT_S)
        fault = Fault(
            call=i,
            algorithm=kind[0],
            message=kind[1],
            async_op=async_op,
            meets=meets,
            kind="kill" if last else drawn.choice(["stop"] if compiled else ["raise", "stop"]),
            rank=drawn.randrange(size),
            share=drawn.random(),
        )
        before = before or descriptors()
        left = descriptors() - before
        record, text = calls.meet_with(fault, group)
        records.append(record)
        if last:
            return records, left
        everyone: list = [None] * size
        dist.all_gather_object(everyone, (record["saw"], text))
        if any("while the ranks met" in text for _, text in everyone):
            # The next call starts clean.
            assert calls.outcome(*kind, lambda: calls.start(*kind, group)) == ("right", "")  # noqa: B023
        elif any(saw != "right" for saw, _ in everyone):
            dist.destroy_process_group(group)
            group = new_group(TIMEOUT_S)
    raise AssertionError("the last call ends this")


@pytest.mark.timeout(300 + COUNT // 5)
@pytest.mark.parametrize("by", WAYS)
def test_calls_with_faults_end_well_or_are_errors_on_time(by, tmp_path):
    world, count = ranks.Ranks(3, env=WAYS[by]), COUNT // len(WAYS)
    try:
        world.start(run, count, 1, by == COMPILED)
        outcomes = [world.outcome(rank) for rank in range(3)]
    finally:
        world.close()
    assert not any(process.is_alive() for process in world.processes)
    failures = [outcome[1] for outcome in outcomes if outcome and not outcome[0]]
    assert not failures, failures[0]
    # The rank that was killed last is missing.
    told = {rank: outcome[1] for rank, outcome in enumerate(outcomes) if outcome}
    assert len(told) >= 2
    log = []
    for number, record in enumerate(next(iter(told.values()))[0]):
        each = {rank: records[number] for rank, (records, _) in told.items()}
        fault = {name: record[name] for name in Fault.__dataclass_fields__}
        own = each.get(record["rank"])
        fault |= {"step": own and own["step"], "steps": own and own["steps"]}
        hit = own is None or own["step"] is not None
        saw = {rank: [mine["saw"], round(mine["seconds"], 3)] for rank, mine in each.items()}
        log.append({"by": by, **fault, "hit": hit, "outcomes": saw})
        for kind, seconds in saw.values():
            assert kind != "wrong", log[-1]
            assert seconds < TIMEOUT_S + SLACK_S, log[-1]
            assert kind == "right" or (hit and fault["kind"] != "stop"), log[-1]
    file = Path(os.environ.get("FLASHCOMM_FAULTS_LOG", tmp_path / "faults.jsonl"))
    with file.open("a") as lines:
        lines.writelines(json.dumps(line) + "\n" for line in log)
    kinds = Counter(line["kind"] for line in log if line["hit"])
    slowest = max(seconds for line in log for _, seconds in line["outcomes"].values())
    print(f"{by}: {count} calls, {dict(kinds)} of {len(log)} met, slowest {slowest:.1f} s; log: {file}")
    # New groups replace old ones: none of them keeps its connections.
    assert all(left < 16 for _, left in told.values()), told
