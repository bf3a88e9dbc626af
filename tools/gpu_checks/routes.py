"""Collectives over process groups: their cost beside the transfers, the project's GPU tests, compiled graphs."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

import flashcomm
from flashcomm import kernels
from gpu_checks.measuring import DEVICE, DRY, device_ms, host_us, note, values

ROOT = Path(__file__).parents[2]
_VERBS = ("encode", "decode", "decode_sum", "decode_sum_encode")


def join_fake(ranks: int):
    """Join a group of torch's that sends nothing; streams, buffers and kernels are those of NCCL's route."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(FLASHCOMM_SHARED_MEMORY="0", FLASHCOMM_CONNECTIONS="0")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def route():
    """Note how many kernels a sum over a group launches, and what it costs the host and the device."""
    launches: Counter[str] = Counter()
    for name in _VERBS:
        setattr(kernels, name, _counted(getattr(kernels, name), name, launches))
    table = {}
    for ranks in (2, 4, 8):
        join_fake(ranks)
        for kib in (64,) if DRY else (64, 1024, 16384):
            x = torch.randn(kib * 512 // 4096, 4096, device=DEVICE).bfloat16()
            for algorithm in ("one_step", "two_step"):
                call = lambda x=x, algorithm=algorithm: flashcomm.all_reduce(x, "int8g128", algorithm=algorithm)  # noqa: E731
                call()
                launches.clear()
                call()
                row: dict[str, float] = {"kernels": sum(launches.values())}
                if not DRY:
                    row |= {"host_us": host_us(call, 20), "device_us": round(1e3 * device_ms(call, 5), 1)}
                table[f"R={ranks} {algorithm} {kib} KiB"] = row
                print(f"R={ranks} {algorithm} {kib} KiB: {row}", flush=True)
        note(table=table)
        dist.destroy_process_group()


def warm():
    """Note how many kernels Triton compiles for sums of many lengths after `warm_up`; there must be none."""
    from flashcomm.kernels.gpu.tiles.move import move

    def compiled_so_far() -> int:
        return sum(len(cache[0]) for cache in getattr(move, "device_caches", {}).values())

    table, wrong = {}, []
    for spec, cols in (("int8g128", 512 if DRY else 4096), *(() if DRY else (("int8g128", 2880),))):
        made = kernels.warm_up(spec, cols, device=DEVICE)
        ready = compiled_so_far()
        join_fake(4)
        for tokens in (1, 3) if DRY else (*range(1, 70), 1000, 4095, 4096):
            x = torch.zeros(tokens, cols, dtype=torch.bfloat16, device=DEVICE)
            for algorithm in ("one_step", "two_step"):
                flashcomm.all_reduce(x, spec, algorithm=algorithm)
        dist.destroy_process_group()
        table[f"{spec} {cols}"] = {"calls": len(made), "compiled": ready, "afterwards": compiled_so_far() - ready}
        wrong += [f"{spec} {cols} compiled while serving"] * (compiled_so_far() > ready)
    note(table=table, wrong=wrong)
    print(table)


def _counted(function, name: str, launches: Counter):
    def counting(*args, **kwargs):
        launches[name] += 1
        return function(*args, **kwargs)

    return counting


def gpu_tests():
    """Run the tests that are marked for GPUs: gloo and NCCL, symmetric memory, graphs, prompts, measuring."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    # To skip those of one file shows as much as to skip all.
    files = files[:1] if DRY else files
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rA", "--durations=0", *files]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    lines = re.findall(r"^(?:PASSED|FAILED|ERROR|SKIPPED) .*", done.stdout, re.MULTILINE)
    skipped = [line.removeprefix("SKIPPED ") for line in lines if line.startswith("SKIPPED")]
    wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode not in (0, 1):
        wrong.append(f"pytest ended with status {done.returncode}")
    note(passed=[line.removeprefix("PASSED ") for line in lines if line.startswith("PASSED")], skipped=skipped)
    note(wrong=wrong)
    print((done.stdout + done.stderr)[-3000:])


def compiled():
    """Compare a sum inside a compiled function of two ranks with the eager one."""
    import ranks

    group = ranks.Ranks(2)
    found = group.run(_compiled)
    group.close()
    note(seconds_and_difference=found, wrong=[row for row in found if any(gap for _, gap in row.values())])
    print(found)


def _compiled() -> dict[str, tuple[float, float]]:
    device, found = torch.device(DEVICE), {}
    weight = values(9, 512, 512).to(device)

    def forward(x):
        return flashcomm.all_reduce(x @ weight, "int8g128", algorithm="two_step") + x

    x = values(dist.get_rank(), 64, 512).to(device)
    with torch.no_grad():
        want = forward(x)
        for backend in ("aot_eager",) if DRY else ("aot_eager", "inductor"):
            start = time.monotonic()
            got = torch.compile(forward, backend=backend, fullgraph=True)(x)
            gap = float((got.float() - want.float()).abs().max())
            # Inductor may add in another order.
            found[backend] = (round(time.monotonic() - start, 1), gap if backend == "aot_eager" else 0.0)
            found[f"{backend} differs by {gap:.3g}"] = (0.0, 0.0)
    return found
