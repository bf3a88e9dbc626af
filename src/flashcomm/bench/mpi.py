"""Open MPI's collectives over shared memory, on the ranks of one machine: `flashcomm bench all_reduce --mpi`.

A program of its own, since `mpirun` starts its ranks: ``mpirun -np 4 python -m flashcomm.bench.mpi all_reduce 11 64``.
It cannot take turns with the other variants, so `around` runs it before and after them, and the better of the two
medians is the row.

Hazard: MPI has no bf16, so it sums fp32 of the same number of bytes, half as many values.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
import torch

from flashcomm.bench.collectives import CollectiveRow, message_bytes, rounds_and_calls
from flashcomm.bench.timing import Times
from flashcomm.lab.launch import RankError


def unavailable() -> str | None:
    """The reason that Open MPI cannot be measured here, with its remedy; None if it can."""
    if shutil.which("mpirun") is None:
        return "the command 'mpirun' is missing: apt-get install openmpi-bin libopenmpi-dev"
    if find_spec("mpi4py") is None:
        return "mpi4py is missing: pip install 'flashcomm[mpi]'"
    return None


def around(
    measure: Callable[[], list[CollectiveRow]],
    op: str,
    *,
    ranks: int,
    sizes: Sequence[int],
    repeats: int,
    dtype: torch.dtype,
) -> list[CollectiveRow]:
    """Return the rows of `measure`, each size followed by a row of Open MPI's better run, the one before or after.

    Args:
        measure: returns rows in the order of `sizes`, plain first.
        op, ranks, sizes, repeats, dtype: see `flashcomm.bench.collectives.run`.

    Raises:
        flashcomm.lab.launch.RankError: `mpirun` failed, or an answer is wrong.
    """
    sizes = [message_bytes(op, size, ranks, dtype) for size in sizes]
    before = _mpirun(op, ranks, sizes, repeats)
    rows = measure()
    after = _mpirun(op, ranks, sizes, repeats)
    starts = [i for i, row in enumerate(rows) if row.codec == "none"]
    table = []
    for start, end, *runs in zip(starts, [*starts[1:], len(rows)], before, after, strict=True):
        plain, best = rows[start], min(runs, key=lambda run: run["p50_ms"])
        table += rows[start:end]
        table.append(
            CollectiveRow(
                op=op,
                ranks=ranks,
                ranks_per_host=ranks,
                dtype="float32",
                link="local",
                codec="none",
                algorithm="plain",
                chosen="plain",
                sent=None,
                speedup=plain.p50_ms / best["p50_ms"],
                algorithm_gbps=best["message_bytes"] / best["p50_ms"] / 1e6,
                wire_gbps=None,
                wire_bytes=None,
                interface_bytes=None,
                cpu_ms=None,
                ceiling=None,
                ceiling_share=None,
                sqnr_db=None,
                **best,
            )
        )
    return table


def _mpirun(op: str, ranks: int, sizes: Sequence[int], repeats: int) -> list[dict]:
    launcher = ["mpirun", "-np", str(ranks), "--allow-run-as-root", "--oversubscribe"]
    program = [sys.executable, "-m", "flashcomm.bench.mpi", op, str(repeats), *map(str, sizes)]
    paths = os.pathsep.join(path for path in sys.path if path)
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
    done = subprocess.run([*launcher, *program], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RankError(f"`{' '.join(launcher)} ...` failed: {done.stderr.strip() or done.stdout.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _rank_main(op: str, repeats: int, sizes: Sequence[int]):
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    ranks, rank = world.Get_size(), world.Get_rank()
    library = MPI.Get_library_version().split(",")[0]
    rows = []
    for size in sizes:
        part = max(1, size // 4 // (1 if op == "all_reduce" else ranks))
        values = part * (ranks if op in ("reduce_scatter", "all_to_all") else 1)
        xs = [np.random.default_rng(r).standard_normal(values, dtype=np.float32) for r in range(ranks)]
        x, terms = xs[rank], xs
        if op in ("reduce_scatter", "all_to_all"):
            terms = [sent.reshape(ranks, part)[rank] for sent in xs]
        summed = op in ("all_reduce", "reduce_scatter")
        exact = np.sum(terms, axis=0, dtype=np.float64) if summed else np.concatenate(terms)
        out = np.empty(exact.shape, np.float32)
        call = {
            "all_reduce": world.Allreduce,
            "reduce_scatter": world.Reduce_scatter_block,
            "all_gather": world.Allgather,
            "all_to_all": world.Alltoall,
        }[op]
        call(x, out)
        allowed = ranks * np.finfo(np.float32).eps * np.sum(np.abs(terms), axis=0) if summed else 0.0
        if not (np.abs(out - exact) <= allowed).all():
            raise RuntimeError(f"{op} of {size} bytes: rank {rank} got a wrong result from {library}")
        moved = max(x.nbytes, out.nbytes)
        rounds, calls = rounds_and_calls(moved, repeats)
        seconds = np.empty(rounds)
        for round_number in range(-2, rounds):
            world.Barrier()
            start = time.perf_counter()
            for _ in range(calls):
                call(x, out)
            if round_number >= 0:
                seconds[round_number] = (time.perf_counter() - start) / calls
        slowest = np.empty_like(seconds)
        world.Allreduce(seconds, slowest, MPI.MAX)
        times = Times(seconds=tuple(sorted(slowest.tolist())))
        figures = {"p20_ms": times.p20_ms, "p50_ms": times.p50_ms, "p80_ms": times.p80_ms}
        row = {"backend": library, "message_bytes": moved, "repeats": rounds, "calls_per_time": calls}
        rows.append({**row, **figures})
    if rank == 0:
        print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    _rank_main(sys.argv[1], int(sys.argv[2]), [int(size) for size in sys.argv[3:]])
