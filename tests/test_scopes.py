"""What the tests of one worker are: `conftest` hands out the cases of a function together, or one by one."""

import pytest
import torch


@pytest.fixture
def scope(request):
    """The function of tests/conftest.py."""
    plugins = request.config.pluginmanager.get_plugins()
    return next(plugin for plugin in plugins if hasattr(plugin, "pytest_xdist_make_scheduler"))._scope


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_cases_that_compile_on_a_gpu_spread_over_workers(on_a_gpu, scope, monkeypatch):
    """One worker compiled the 500 kernels of all formats, while the others had nothing left to do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_a_gpu)
    cases = {scope(f"tests/kernels/test_tiles.py::test_same_bytes_as_the_specification[{n}]") for n in range(5)}
    assert len(cases) == (5 if on_a_gpu else 1)
    # Tests that share ranks stay together.
    assert len({scope(f"tests/kernels/test_fused.py::test_sums[{n}]") for n in range(5)}) == 1
