"""Buffers: calls share them, and a CUDA graph keeps those that its replays write to."""

import gc
import weakref

import pytest
import torch

from flashcomm.transports import buffers

CPU = torch.device("cpu")


def test_a_longer_call_gets_a_new_buffer_and_a_shorter_one_the_same():
    taken = buffers.Buffers()
    first = taken.take("sent", CPU, 4, 16)
    assert taken.take("sent", CPU, 2, 8).data_ptr() == first.data_ptr()
    assert taken.take("received", CPU, 4, 16).data_ptr() != first.data_ptr()
    assert taken.take("sent", CPU, 4, 17).data_ptr() != first.data_ptr()


@pytest.mark.parametrize("in_a_graph", [False, True])
def test_a_buffer_that_a_graph_has_captured_lives_on(in_a_graph, monkeypatch):
    """A replay would write into memory that torch has given to somebody else."""
    taken = buffers.Buffers()
    monkeypatch.setattr(buffers, "capturing", lambda device: in_a_graph)
    held = weakref.ref(taken.take("sent", CPU, 64)._base)
    monkeypatch.setattr(buffers, "capturing", lambda device: False)
    taken.take("sent", CPU, 1 << 20)
    gc.collect()
    assert (held() is not None) == in_a_graph
