import pytest
import torch

import ranks


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
def fresh_ranks():
    """A set of ranks for a test that breaks them; stopped at its end."""
    made = []

    def make(*args, **kwargs):
        made.append(ranks.Ranks(*args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()
