"""The time that a test of an engine may take: servers start for minutes, on a busy machine for more."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(1500))
