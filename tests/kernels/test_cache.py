"""Compiled kernels on a disk that is full, closed or broken: they are compiled, and kept in the process."""

import os
import pickle
import subprocess
import sys

import pytest
from numba import cfunc, njit, types
from numba.core import caching, config

from flashcomm.kernels.cpu.ops import base, compiled


def raising(error):
    def fail(*args):
        raise error

    return fail


FAULTS = {
    "full": ("_save_data", OSError(28, "No space left on device")),
    "over quota": ("_save_index", OSError(122, "Disk quota exceeded")),
    "closed": ("_load_index", PermissionError(13, "Permission denied")),
    "broken": ("_load_index", pickle.UnpicklingError("pickle data was truncated")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_does_not_serve_is_said_once(fault, monkeypatch, caplog, tmp_path):
    method, error = FAULTS[fault]
    monkeypatch.setattr(caching.IndexDataCacheFile, method, raising(error))
    monkeypatch.setattr(base, "_said", set())
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    for number in range(2):

        def more(x):
            return x + number  # noqa: B023

        later = compiled(lambda cache: njit(cache=cache)(more))
        assert later(3) == 3 + number
        now = compiled(lambda cache: cfunc(types.int64(types.int64), cache=cache)(more))
        assert now.ctypes(3) == 3 + number
    assert [record.message for record in caplog.records] == [
        "compiled CPU kernels cannot be kept on disk, so every process compiles them anew (two to four seconds): "
        f"{type(error).__name__}: {error}. Set NUMBA_CACHE_DIR to a folder with room"
    ]


def test_what_is_no_fault_of_the_disk_is_raised():
    def wrong(x):
        return x + nonsense  # noqa: F821

    with pytest.raises(Exception, match="nonsense"):
        compiled(lambda cache: cfunc(types.int64(types.int64), cache=cache)(wrong))


def test_a_process_that_may_write_no_file_encodes(tmp_path):
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "import torch, flashcomm\n"
        "x = torch.ones(2, 64)\n"
        "print(flashcomm.decode(flashcomm.encode(x, 'fp32'), 'fp32', cols=64, dtype=x.dtype).sum().item())\n"
    )
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=200)
    assert done.stdout == "128.0\n", done.stderr
    assert done.stderr.count("compiled CPU kernels cannot be kept on disk") == 1
    assert "File too large" in done.stderr


def test_the_first_call_on_a_machine_compiles_little(tmp_path):
    script = (
        "import time, torch, flashcomm\n"
        "from numba.core.event import install_recorder\n"
        "with install_recorder('numba:run_pass') as passes:\n"
        "    before = time.process_time()\n"
        "    flashcomm.kernels.warm_up('ec4.25')\n"
        "    seconds = time.process_time() - before\n"
        "ends = [event.data['name'] for _, event in passes.buffer if event.is_end]\n"
        "print(sum(name.startswith('native_lowering') for name in ends), seconds)\n"
    )
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=200)
    functions, seconds = (float(word) for word in done.stdout.split())
    # Some 0.12 s each. numba compiles what a kernel uses of its library too: min, max, new arrays.
    assert 10 < functions <= 26, done.stderr
    # 3.5 s of CPU time on a quiet core; a neighbour on the same core may double it.
    assert seconds < 12, functions
