"""Test under load: `make test-load`.

    python tools/load.py               ten rounds
    python tools/load.py --rounds 2    two

Runs every test file that starts ranks or servers, in two workers, while a busy process for each core takes its share.
A test that waits for time to pass, where it should wait for an event, fails in one of the rounds, which ends the run.
The rounds are kept in results/load_cpu.json.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import versions

from flashcomm import machine
from flashcomm.report.rows import write_json

RESULTS = versions.ROOT / "results" / "load_cpu.json"
STARTS = re.compile(r"\b(import ranks|multiprocessing|Popen|LaunchConfig|lab import|forked_launch|CliRunner)\b")
"""Signs in a test file that it starts ranks or servers, which run beside it."""
_BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"


def files() -> list[str]:
    """The test files that start ranks or servers, as paths in the repository; engines are tested elsewhere."""
    found = sorted((versions.ROOT / "tests").rglob("test_*.py"))
    names = [str(path.relative_to(versions.ROOT)) for path in found if STARTS.search(path.read_text())]
    return [name for name in names if not name.startswith("tests/engines")]


def main() -> int:
    """Run the rounds; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="how many times the tests run")
    parser.add_argument("--workers", type=int, default=2, help="how many tests run at once")
    given = parser.parse_args()
    tests, rows, code = files(), [], 0
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        report = Path(stack.enter_context(tempfile.TemporaryDirectory()), "report.xml")
        for _ in range(cores):
            busy = subprocess.Popen([sys.executable, "-c", _BUSY, str(os.getpid())])
            stack.callback(busy.kill)
        while len(rows) < given.rounds and not code:
            start = time.monotonic()
            report.unlink(missing_ok=True)
            command = [sys.executable, "-m", "pytest", "-n", str(given.workers), f"--junitxml={report}", *tests]
            code = subprocess.run(command, cwd=versions.ROOT).returncode
            row = {"round": len(rows) + 1, "files": len(tests), **versions.counts(versions.cases(report))}
            rows.append({**row, "busy": cores, "seconds": round(time.monotonic() - start)})
            print(rows[-1], flush=True)
    # Not before: the tests compare the files in results/ with their tables.
    write_json(RESULTS, {"op": "load", "machine": machine.describe(), "rows": rows})
    subprocess.run([sys.executable, str(versions.ROOT / "tools" / "make_docs.py")], check=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
