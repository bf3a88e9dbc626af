import functools
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

# numba notices changes of the file that defines a kernel, not of the lanes that the kernel is made of.
_kernels = Path(__file__).parents[1] / "src" / "flashcomm" / "kernels"
_digest = hashlib.blake2b(b"".join(path.read_bytes() for path in sorted(_kernels.rglob("*.py"))), digest_size=8)
_cache = f"flashcomm-kernels-{os.getuid()}-{_digest.hexdigest()}"
_cache_dir = Path(tempfile.gettempdir()) / _cache
os.environ["NUMBA_CACHE_DIR"] = str(_cache_dir)

# What was measured on this machine must not change what is tested.
os.environ["FLASHCOMM_TUNING"] = str(Path(tempfile.gettempdir()) / "flashcomm-no-tuning.json")

collect_ignore = [] if importlib.util.find_spec("vllm") else ["engines"]
"""Tests of engines run in an environment of their own: make test-engines."""

import pytest  # noqa: E402
import torch  # noqa: E402

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # An example may be the one for which kernels are compiled.
    settings.register_profile("flashcomm", deadline=None)
    settings.load_profile("flashcomm")

if not torch.cuda.is_available():
    # Triton looks at this when it sees a kernel's definition.
    os.environ["TRITON_INTERPRET"] = "1"

import ranks  # noqa: E402
from flashcomm import machine  # noqa: E402

# Whoever runs the tests may ignore these, as nohup and a shell in the background do; unlike a handler, children would
# inherit that, and could not be interrupted.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

_LABS = {
    "test_addresses.py",
    "test_cli.py",
    "test_collectives.py",
    "test_lab.py",
    "test_hierarchical.py",
    "test_planning.py",
}
"""Labs are of the whole machine, and these tests look for what is left of them."""


@functools.cache
def _shares(path: str) -> bool:
    """Whether tests of a file share ranks, or a fixture."""
    text = (Path(__file__).parents[1] / path).read_text()
    return "ranks.shared(" in text or 'scope="module"' in text


def _scope(nodeid: str) -> tuple[int, str]:
    """When a test runs, and what it runs together with on one worker."""
    path = nodeid.partition("::")[0]
    if path.rpartition("/")[2] in _LABS:
        return 0, "labs"
    if _shares(path):
        return 1, path
    # On a GPU a case compiles kernels of its own, for seconds; elsewhere it shares what the function has made.
    return 2, nodeid if torch.cuda.is_available() else nodeid.partition("[")[0]


def pytest_sessionstart(session):
    """Compile what runs on the CPU before workers start, which would do it several times over."""
    workers = getattr(session.config.option, "numprocesses", None)
    if workers and not _cache_dir.exists() and not machine.why_not_compiled():
        script = str(Path(__file__).with_name("compile_kernels.py"))
        subprocess.run([sys.executable, script, str(workers)], check=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Large scopes go first, and single functions fill what is left, so that workers end together."""
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return _scope(nodeid)[1]

    config.option.loadscopereorder = False
    return ByScope(config, log)


def pytest_collection_modifyitems(config, items):
    """Hand out the same order on every worker; inside of a kind, what has a time limit of its own goes first."""
    if hasattr(config, "workerinput"):
        scopes = {item: _scope(item.nodeid) for item in items}
        sizes = Counter(scopes.values())
        long = {scopes[item] for item in items if item.get_closest_marker("timeout")}
        items.sort(key=lambda item: (scopes[item][0], scopes[item] not in long, -sizes[scopes[item]]))


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_no_ranks_left():
    torch.set_num_threads(1)
    yield
    ranks.close_shared()


@pytest.fixture(autouse=True)
def _skip_without_gpu(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")


@pytest.fixture
def forked_launch(monkeypatch, tmp_path):
    """Ranks that `lab.launch` starts are forked from a process that has imported much; returns what they printed."""
    from flashcomm.lab import launch

    logs = tmp_path / "logs of ranks"
    monkeypatch.setattr(launch, "LaunchConfig", ranks.forking(logs))
    return lambda: "".join(path.read_text() for path in sorted(logs.rglob("std*.log")))


@pytest.fixture
def fresh_ranks():
    """A set of ranks for a test that breaks them; stopped at its end."""
    made = []

    def make(*args, **kwargs):
        made.append(ranks.Ranks(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()
