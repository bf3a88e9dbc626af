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

import pytest
import torch
import torch.distributed as dist

import faults
import ranks
from calls import new_group
from flashcomm.errors import CollectiveError

COUNT = int(os.environ.get("FLASHCOMM_FAULTS", "300"))
EVERY = 60
"""Calls for each fault."""
TIMEOUT_S, STOP_S = 5.0, 2.0
SLACK_S = 20.0
"""For a machine that is busy: the alternative is to wait for ever."""
MOST_STEPS = 12
"""A fault may be due after the last step of its call; then nothing happens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An event on one rank at one step of a call."""

    call: int
    algorithm: str
    kind: str
    """``raise``, ``stop`` (and go on after `STOP_S`) or ``kill``."""
    rank: int
    step: int

    def happen(self):
        if self.kind == "raise":
            raise RuntimeError("injected")
        if self.kind == "stop":
            subprocess.Popen(["sh", "-c", f"sleep {STOP_S}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP if self.kind == "stop" else signal.SIGKILL)


def outcome(call) -> tuple[str, str]:
    """Return "right", "wrong" or the name of the error, and the text of the error."""
    algorithm, start = call
    try:
        work = start()
        result = work if isinstance(work, torch.Tensor) else work.wait()
    except CollectiveError as error:
        return type(error).__name__, str(error)
    right = faults.expected(algorithm, dist.get_rank(), dist.get_world_size())
    return "right" if torch.equal(result, right) else "wrong", ""


def descriptors() -> int:
    """Open descriptors of this process, without those of groups that are gone."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def run(count: int, seed: int) -> tuple[list[dict], int]:
    """Make `count` calls, the last with a kill; return a record of each fault, and how many descriptors were left."""
    rank, size, steps = dist.get_rank(), dist.get_world_size(), faults.Steps()
    drawn, own = random.Random(seed), random.Random(f"{seed} {rank}")
    algorithms = [name for name in faults.ALGORITHMS if name != "hierarchical"]
    group, pending, records, before = new_group(TIMEOUT_S), [], [], 0

    def finish():
        while pending:
            algorithm, work = pending.pop(own.randrange(len(pending)))
            assert outcome((algorithm, lambda: work)) == ("right", "")  # noqa: B023

    for i in range(count):
        algorithm, async_op, last = drawn.choice(algorithms), drawn.random() < 0.4, i == count - 1
        if not last and drawn.randrange(EVERY):
            pending.append((algorithm, faults.call(algorithm, group, async_op)))
            if not async_op or len(pending) > 8:
                finish()
            continue
        finish()
        kind, who, at = drawn.choice(["raise", "stop"]), drawn.randrange(size), drawn.randint(1, MOST_STEPS)
        fault = Fault(call=i, algorithm=algorithm, kind="kill" if last else kind, rank=who, step=at)
        if drawn.random() < 0.3:
            # These ranks have not met yet, so the fault may be in their meeting.
            dist.destroy_process_group(group)
            group = new_group(TIMEOUT_S)
        before = before or descriptors()
        left = descriptors() - before
        dist.barrier()
        steps.arm(fault.step if rank == fault.rank else None, fault.happen)
        start = time.monotonic()
        saw, text = outcome((algorithm, lambda: faults.call(algorithm, group, async_op)))  # noqa: B023
        seconds = time.monotonic() - start
        records.append({**asdict(fault), "async_op": async_op, "met": steps.count, "saw": saw, "seconds": seconds})
        steps.arm(None, lambda: None)
        if last:
            return records, left
        everyone: list = [None] * size
        dist.all_gather_object(everyone, (saw, text))
        if any("while the ranks met" in text for _, text in everyone):
            # The next call starts clean.
            assert outcome((algorithm, lambda: faults.call(algorithm, group))) == ("right", "")  # noqa: B023
        elif any(saw != "right" for saw, _ in everyone):
            dist.destroy_process_group(group)
            group = new_group(TIMEOUT_S)
    raise AssertionError("the last call ends this")


@pytest.mark.timeout(300 + COUNT // 5)
@pytest.mark.parametrize("by", ranks.WAYS)
def test_calls_with_faults_end_well_or_are_errors_on_time(by, tmp_path):
    world = ranks.Ranks(3, env=ranks.WAYS[by])
    try:
        world.start(run, COUNT // len(ranks.WAYS), 1)
        outcomes = [world.outcome(rank) for rank in range(3)]
    finally:
        world.close()
    assert not any(process.is_alive() for process in world.processes)
    failures = [outcome[1] for outcome in outcomes if outcome and not outcome[0]]
    assert not failures, failures[0]
    # The rank that was killed last is missing, if the call had as many steps.
    told = {rank: outcome[1] for rank, outcome in enumerate(outcomes) if outcome}
    assert len(told) >= 2
    log = []
    for number, record in enumerate(next(iter(told.values()))[0]):
        each = {rank: records[number] for rank, (records, _) in told.items()}
        fault = {name: record[name] for name in ("call", "algorithm", "kind", "rank", "step", "async_op")}
        hit = record["rank"] not in each or each[record["rank"]]["met"] >= record["step"]
        saw = {rank: [mine["saw"], round(mine["seconds"], 3)] for rank, mine in each.items()}
        log.append({"by": by, **fault, "hit": hit, "saw": saw})
        for kind, seconds in saw.values():
            assert kind != "wrong", log[-1]
            assert seconds < TIMEOUT_S + SLACK_S, log[-1]
            assert kind == "right" or (hit and fault["kind"] != "stop"), log[-1]
    file = Path(os.environ.get("FLASHCOMM_FAULTS_LOG", tmp_path / "faults.jsonl"))
    with file.open("a") as lines:
        lines.writelines(json.dumps(line) + "\n" for line in log)
    kinds = Counter(line["kind"] for line in log if line["hit"])
    slowest = max(seconds for line in log for _, seconds in line["saw"].values())
    print(f"{by}: {COUNT // len(ranks.WAYS)} calls, {dict(kinds)} met, slowest {slowest:.1f} s; log: {file}")
    # New groups replace old ones: none of them keeps its connections.
    assert all(left < 16 for _, left in told.values()), told
