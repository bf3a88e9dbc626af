"""Test under load: `make test-load`.

    python tools/load.py                  ten rounds
    python tools/load.py --rounds 2       two
    python tools/load.py tests/engines    vLLM's servers, which `make test` leaves out
    python tools/load.py --more           what is missing of ten rounds, after those that are kept

Runs the tests that start ranks or servers, while a busy process for each core takes its share. A test that waits for
time to pass, where it should wait for an event, fails in one of the rounds, which ends the run. The first round runs
all tests of the files that may start some, and finds out which tests do (tools/starting.py); the others run these
alone. The rounds are kept in results/load_cpu.json, those of engines in results/load_engines_cpu.json, and those of
other tests nowhere.
"""

import argparse
import json
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

STARTS = re.compile(r"\b(import ranks|multiprocessing|Popen|LaunchConfig|lab import|forked_launch|CliRunner)\b")
"""Signs in a test file that it may start ranks or servers."""
_BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"


def files() -> list[str]:
    """The test files that may start ranks or servers, as paths in the repository; engines have to be asked for."""
    found = sorted((versions.ROOT / "tests").rglob("test_*.py"))
    names = [str(path.relative_to(versions.ROOT)) for path in found if STARTS.search(path.read_text())]
    return [name for name in names if not name.startswith("tests/engines")]


def main() -> int:
    """Run the rounds; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="files or folders of tests; all but engines if none is given")
    parser.add_argument("--rounds", type=int, default=10, help="how many times the tests run")
    parser.add_argument("--more", action="store_true", help="count the rounds that are kept, of this day or another")
    parser.add_argument("--workers", type=int, default=2, help="how many tests run at once")
    given = parser.parse_args()
    name = {(): "load_cpu", ("tests/engines",): "load_engines_cpu"}.get(tuple(given.tests))
    kept = versions.ROOT / "results" / f"{name}.json" if name else None
    if given.more and not (kept and kept.exists()):
        parser.error("--more: no rounds of these tests are kept")
    rows = json.loads(kept.read_text())["rows"] if kept and given.more else []
    if any(row["failed"] for row in rows):
        parser.error("--more: a round that is kept has failed, so the rounds begin anew without --more")
    tests, code = given.tests or files(), 0
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report, starting = folder / "report.xml", folder / "starting.txt"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "STARTING_TESTS": str(starting)}
        for _ in range(cores):
            busy = subprocess.Popen([sys.executable, "-c", _BUSY, str(os.getpid())])
            stack.callback(busy.kill)
        command = [sys.executable, "-m", "pytest", "-p", "starting", f"--junitxml={report}"]
        if given.workers > 1:
            command += ["-n", str(given.workers)]
        for number in range(len(rows) + 1, given.rounds + 1):
            start = time.monotonic()
            report.unlink(missing_ok=True)
            code = subprocess.run([*command, *tests], cwd=versions.ROOT, env=env).returncode
            here = machine.describe()
            row = {"round": number, "date": here["date"], "commit": here["commit"]}
            row |= versions.counts(versions.cases(report))
            rows.append({**row, "busy": cores, "seconds": round(time.monotonic() - start)})
            print(rows[-1], flush=True)
            write_json(kept, {"op": "load", "machine": here, "rows": rows})
            # The next round's tests may compare the rows with their table.
            subprocess.run([sys.executable, str(versions.ROOT / "tools" / "make_docs.py")], check=True)
            if code:
                break
            tests = starting.read_text().splitlines()
    return code


if __name__ == "__main__":
    sys.exit(main())
