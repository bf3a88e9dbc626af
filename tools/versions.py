"""Test flashcomm with other versions of Python and of its dependencies: `make test-matrix`, `make test-smoke`.

    python tools/versions.py                     all environments of constraints/versions.toml, and this one
    python tools/versions.py oldest today        these
    python tools/versions.py --smoke oldest      the shortest tests that tell about versions

An environment is made in .venv-versions/NAME when it is first needed (five to seven GB: torch brings its CUDA), with
the interpreter that PYTHON310 (or PYTHON312, ...) names, or that is found as python3.10, by pyenv or by uv. What ran
is kept in results/versions.json and shown in docs/versions.md.
"""

import argparse
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "versions.json"
TODAY = "today"
"""The environment that runs this file, which `make setup` makes from constraints.txt."""

SMOKE = ("tests/test_versions.py", "tests/collectives/test_graph.py", "tests/codecs/test_spec.py")
"""Tests of what has broken between versions."""

TESTS = (
    *SMOKE,
    "tests/codecs",
    "tests/kernels",
    "tests/collectives/test_verbs.py",
    "tests/collectives/test_meshes.py",
    "tests/integrations",
    "tests/overlap",
    "tests/bench/test_bench_gpu.py",
    "tests/test_gpu_check.py",
    "tests/test_package.py",
)
"""Codecs, kernels, collectives, compiled graphs, engines, and kernels for GPUs that are compiled ahead of time. The
rest of the suite looks at sockets, processes and figures, where versions of packages hardly matter."""


def table() -> dict:
    """The environments, by name."""
    return tomllib.loads((ROOT / "constraints" / "versions.toml").read_text())


def interpreter(version: str) -> str:
    """The command of a Python such as 3.12.

    Raises:
        SystemExit: there is none; the message says where it was looked for.
    """
    variable, name = "PYTHON" + version.replace(".", ""), f"python{version}"
    if given := os.environ.get(variable):
        return given
    found = shutil.which(name)
    # A shim of pyenv is there for versions that are not chosen, and then fails.
    if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
        return found
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for folder in sorted(pyenv.glob(f"{version}*"), reverse=True):
        return str(folder / "bin" / name)
    if shutil.which("uv"):
        found = subprocess.run(["uv", "python", "find", version], capture_output=True, text=True).stdout.strip()
        if found:
            return found
    sys.exit(
        f"no Python {version}: looked for {name} on PATH, in pyenv's {pyenv} and with uv. Install it, or set "
        f"{variable} to its command"
    )


def environment(name: str, folder: Path) -> Path:
    """The Python of an environment, which is made if it is not there as the table wants it.

    Raises:
        SystemExit: it cannot be made here; the message says why.
    """
    if name == TODAY:
        return Path(sys.executable)
    wanted = table()[name]
    here, python = folder / name, folder / name / "bin" / "python"
    packages = [*wanted["packages"], (ROOT / "pyproject.toml").read_text()]
    digest = hashlib.blake2b("\n".join(packages).encode(), digest_size=8).hexdigest()
    stamp = here / ".current"
    if stamp.exists() and stamp.read_text() == digest:
        return python
    command = interpreter(wanted["python"])
    print(f"installing {name} into {here} ({wanted['reason']}) ...", file=sys.stderr, flush=True)
    _install([command, "-m", "venv", str(here)])
    fixed = here / "constraints.txt"
    fixed.write_text("\n".join(wanted["packages"]) + "\n")
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    _install([*pip, "--upgrade", "pip"])
    _install([*pip, "-c", str(fixed), "-e", ".[gpu,transformers,test]"])
    stamp.write_text(digest)
    return python


def _install(command: list[str]):
    """Run a step of an installation.

    Raises:
        SystemExit: this machine cannot do it, for want of a package index, room or an interpreter.
        RuntimeError: nobody can, since the wanted versions exclude each other.
    """
    try:
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        sys.exit(f"cannot install it: {error}")
    if "ResolutionImpossible" in done.stderr:
        raise RuntimeError(done.stderr)
    if done.returncode:
        sys.exit(f"cannot install it: {done.stderr.strip()}")


def run(name: str, python: Path, smoke: bool, limit_s: float) -> dict:
    """Run the tests in an environment; returns the row of its results."""
    tests = SMOKE if smoke else TESTS
    report = python.parents[1] / "versions.xml"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    print(f"{name}: {' '.join(tests)}", file=sys.stderr, flush=True)
    command = [str(python), "-m", "pytest", "-q", "-n", "2", f"--junitxml={report}", *tests]
    code = subprocess.run(command, cwd=ROOT, timeout=limit_s).returncode
    if code not in (0, 1):
        sys.exit(f"{name}: pytest ended with status {code}")
    ran = cases(report)
    reasons = Counter(part.get("message") for case in ran for part in case.iter("skipped"))
    describe = "import json; from flashcomm import machine; print(json.dumps(machine.describe()))"
    facts = json.loads(subprocess.run([python, "-c", describe], cwd=ROOT, capture_output=True, check=True).stdout)
    return {
        "environment": name,
        "tests": "smoke" if smoke else "all",
        **{package: facts["versions"].get(package) for package in PACKAGES},
        **counts(ran),
        "seconds": round(time.monotonic() - start),
        "date": datetime.date.today().isoformat(),
        "commit": facts["commit"],
        "skips": [[count, reason] for reason, count in sorted(reasons.items())],
    }


def cases(report: Path) -> list[ElementTree.Element]:
    """The tests of a report in JUnit's format."""
    return list(ElementTree.parse(report).getroot().iter("testcase"))


def counts(ran: list[ElementTree.Element]) -> dict[str, int]:
    """The number of tests that passed, failed and were skipped."""
    kinds = Counter(next((part.tag for part in case if part.tag in _KINDS), "passed") for case in ran)
    return {"passed": kinds["passed"], "failed": kinds["failure"] + kinds["error"], "skipped": kinds["skipped"]}


_KINDS = ("failure", "error", "skipped")
PACKAGES = ("python", "torch", "triton", "numpy", "numba", "transformers")


def keep(row: dict):
    """Put a row in place of the one of its environment, also in docs/: a test compares them."""
    from flashcomm import machine
    from flashcomm.report.rows import write_json

    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    order = [*table(), TODAY]
    rows = [row, *(other for other in kept if other["environment"] != row["environment"])]
    rows.sort(key=lambda one: order.index(one["environment"]))
    write_json(RESULTS, {"op": "versions", "machine": machine.describe(), "rows": rows})
    subprocess.run([sys.executable, str(ROOT / "tools" / "make_docs.py")], check=True)


def main() -> int:
    """Run what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"environments: {', '.join([*table(), TODAY])}")
    parser.add_argument("--smoke", action="store_true", help="the shortest tests; nothing is kept")
    parser.add_argument("--or-skip", action="store_true", help="skip what cannot be installed here, and say why")
    parser.add_argument("--keep", action="store_true", help="keep it all the same")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-versions", help="where environments are made")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that tests of one environment may take")
    given = parser.parse_args()
    names = given.names or [*table(), TODAY]
    if unknown := [name for name in names if name not in (*table(), TODAY)]:
        parser.error(f"no environment {unknown[0]!r}: {', '.join([*table(), TODAY])}")
    failed = 0
    for name in names:
        try:
            python = environment(name, given.folder)
        except SystemExit as error:
            if not given.or_skip:
                raise
            print(f"{name}: skipped: {error}")
            continue
        row = run(name, python, given.smoke, given.limit)
        failed += row["failed"]
        print(f"{name}: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped, {row['seconds']} s")
        if given.keep or not given.smoke:
            keep(row)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
