"""Collect evidence from one GPU in ten minutes: bytes, speeds, launches, graphs, routes, prompts.

    python tools/gpu_check.py OUT [check ...]
    DRY=1 python tools/gpu_check.py OUT

Each check runs in a process with a limit of seconds, so a crash or a hang costs that check alone. OUT/results.json is
written after every check; docs may quote a copy of it in results/. `DRY=1` runs the logic on a CPU, kernels in Triton's
interpreter, and leaves out what only a GPU has. The exit status is 1 if a check failed, or found something wrong.

Needs Triton, numba and pytest; `iso` needs greenlet. Works without an installed flashcomm, and without a network.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DRY = os.environ.get("DRY") == "1"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tools")]


class Check(NamedTuple):
    """A function of `gpu_checks`."""

    name: str
    module: str
    seconds: float
    """The most that it may take; about twice what it should."""
    dry: bool = True
    """Whether its logic runs without a GPU, in seconds."""


CHECKS = (
    Check("env", "kernels", 40),
    Check("bytes_of_formats", "kernels", 150),
    Check("ceilings", "kernels", 40, dry=False),
    Check("bandwidth", "kernels", 90),
    Check("fused", "launches", 120),
    Check("collectives", "launches", 100),
    Check("graphs", "launches", 60, dry=False),
    Check("route", "routes", 90),
    Check("counters", "kernels", 90, dry=False),
    Check("far_apart", "kernels", 30),
    Check("warm", "routes", 60),
    Check("gpu_tests", "routes", 240),
    Check("model", "prompts", 110, dry=False),
    Check("iso", "prompts", 120),
    Check("sanitizer", "launches", 160, dry=False),
    Check("compiled", "routes", 120),
)
"""Checks in the order of their worth: those come first that only a GPU can answer."""
_PARTS = (
    Check("few_kernels", "kernels", 60, dry=False),
    Check("few_launches", "launches", 60, dry=False),
)
"""Programs that other checks start under a profiler."""
_LEAST_S = 10.0
_DRY_S = 300.0
"""Limit of every check on a CPU, which others may use at the same time."""


def main() -> int:
    """Run the checks that the command line names, all if none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for results.json")
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(check.name for check in CHECKS)}")
    parser.add_argument("--seconds", type=float, default=555, help="for all checks together")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.one:
        _run_here(given.one, given.out)
        return 0
    if unknown := set(given.checks) - {check.name for check in CHECKS}:
        parser.error(f"unknown checks: {', '.join(sorted(unknown))}. Allowed: {', '.join(c.name for c in CHECKS)}")
    return _run_all(given.out, set(given.checks), time.monotonic() + given.seconds)


def _run_here(name: str, out: Path):
    from gpu_checks import measuring

    check = next(check for check in (*CHECKS, *_PARTS) if check.name == name)
    measuring.keep_in(_notes_of(name, out))
    getattr(import_module(f"gpu_checks.{check.module}"), name)()


def _run_all(out: Path, names: set[str], end: float) -> int:
    from flashcomm.report.rows import write_json

    results: dict[str, dict] = {}

    def run(check: Check):
        if DRY and not check.dry:
            results[check.name] = {"left_out": "for a GPU"}
        elif (left := min(_DRY_S if DRY else check.seconds, end - time.monotonic())) < _LEAST_S:
            results[check.name] = {"left_out": "no time left"}
        else:
            results[check.name] = _in_a_process(check.name, out, left)
        write_json(out / "results.json", {c.name: results[c.name] for c in CHECKS if c.name in results})
        result = results[check.name]
        print(
            f"== {check.name}: {result.get('left_out') or result['ended']}\n{result.get('log', '')[-1400:]}", flush=True
        )

    # On a GPU two checks at once would disturb each other's times.
    with ThreadPoolExecutor(2 if DRY else 1) as pool:
        list(pool.map(run, (check for check in CHECKS if not names or check.name in names)))
    bad = [name for name, result in results.items() if result.get("ended", "well") != "well" or result.get("wrong")]
    print(f"not well: {', '.join(bad)}" if bad else "all well")
    return 1 if bad else 0


def _notes_of(name: str, out: Path) -> Path:
    return out / f"{name}.notes.json"


def _in_a_process(name: str, out: Path, seconds: float) -> dict:
    """Run one check; return how it ended, its seconds, the facts that it noted, and its output."""
    start, log, notes = time.monotonic(), out / f"{name}.txt", _notes_of(name, out)
    path = os.pathsep.join([*sys.path[:3], os.environ.get("PYTHONPATH", "")])
    # Ranks that are streams of one process must not wait for each other's queues.
    env = {**os.environ, "PYTHONPATH": path, "CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTHONUNBUFFERED": "1"}
    env |= {"TRITON_INTERPRET": "1"} if DRY else {}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, str(out), "--one", name],
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=env,
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
            ended = "well" if code == 0 else f"with status {code}"
        except subprocess.TimeoutExpired:
            ended = f"not within {seconds:.0f} s"
        finally:
            # Its own processes may still be there.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    facts = json.loads(notes.read_text()) if notes.exists() else {}
    text = log.read_text(errors="replace")
    for path in (log, notes):
        path.unlink(missing_ok=True)
    return {"ended": ended, "seconds": round(time.monotonic() - start, 1), **facts, "log": text[-6000:]}


if __name__ == "__main__":
    sys.exit(main())
