"""Cases that repeat in more sizes, or for longer, what shorter ones show.

`make test` leaves them out, which keeps it near ten minutes on two cores; `make test-thorough` runs them.
"""

import pytest


def thorough(*values):
    """A set of parameters for `make test-thorough`."""
    return pytest.param(*values, marks=pytest.mark.thorough)
