"""Plugin for pytest: `pytest -p starting` with tools/ on PYTHONPATH; names the tests that start or use processes.

Their ids go, a line each, to the file that STARTING_TESTS names. A test counts where it starts Python or flashcomm,
forks, asks multiprocessing's fork server for a process, or hands a function to ranks that wait for one; where a fixture
does so, all tests of the file count, since others may use what it started.
"""

import os
import sys
from pathlib import Path

import pytest

_started = set()
_phases = {}
"""Whether each test of this worker started something, by its id: in a fixture, in the test."""


def _heard(event: str, args: tuple):
    if event == "os.fork":
        _started.add(event)
    elif event == "subprocess.Popen":
        words = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        if any("python" in os.fsdecode(word) or "flashcomm" in os.fsdecode(word) for word in words):
            _started.add(event)
    elif event == "socket.connect" and isinstance(args[1], (str, bytes)):
        # An address of this kind is a path: the fork server's.
        _started.add(event)


def pytest_collection_finish(session: pytest.Session):
    """Listen from here on, when the tests' own modules are imported."""
    sys.addaudithook(_heard)
    if ranks := sys.modules.get("ranks"):
        start = ranks.Ranks.start

        def heard(*args):
            _started.add("ranks")
            return start(*args)

        ranks.Ranks.start = heard


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Attach to each report whether its phase started something."""
    report = yield
    report.started = bool(_started)
    _started.clear()
    return report


def pytest_runtest_logreport(report: pytest.TestReport):
    """Collect what the workers report, in the process that they report to."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _phases.setdefault(report.nodeid, {})[report.when] = report.started


def pytest_sessionfinish(session: pytest.Session):
    """Write the ids."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    fixtures = {name.partition("::")[0] for name, phases in _phases.items() if phases.get("setup")}
    # In the order of their files, since the last tests of a file may end a server that the others share.
    names = (name for name, phases in _phases.items() if phases.get("call") or name.partition("::")[0] in fixtures)
    Path(os.environ["STARTING_TESTS"]).write_text("".join(f"{name}\n" for name in names))
