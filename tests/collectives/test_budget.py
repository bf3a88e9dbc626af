"""The path of a remembered call is short: how many functions of ours a small all-reduce runs through, and which."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import flashcomm
import ranks

SOURCES = str(Path(flashcomm.__file__).parent)


def functions_of_a_remembered_call() -> Counter:
    """Python functions of ours that one call enters on this rank, as ``file:name``."""
    x = torch.ones(4, 512)
    for _ in range(3):
        flashcomm.all_reduce(x, "int8g128", algorithm="two_step")
    seen: Counter = Counter()

    def profile(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(SOURCES):
            seen[f"{Path(code.co_filename).relative_to(SOURCES).with_suffix('')}:{code.co_name}"] += 1

    sys.setprofile(profile)
    try:
        flashcomm.all_reduce(x, "int8g128", algorithm="two_step")
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("world_size", [2, 4])
def test_in_shared_memory(world_size):
    for seen in ranks.shared(world_size).run(functions_of_a_remembered_call):
        assert seen.total() <= 12, seen


def test_over_messages():
    """Of 4 ranks: the group is asked once, and no algorithm sees it."""
    for seen in ranks.shared(4, by="connections").run(functions_of_a_remembered_call):
        of_group = {name: count for name, count in seen.items() if name.startswith("collectives/group:")}
        assert of_group == {"collectives/group:group_of": 1}
