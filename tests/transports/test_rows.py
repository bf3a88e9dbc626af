"""Rows that vary in length: packed and spread to the same rows, and no message of a broken peer moves a byte."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flashcomm.transports import rows

BOUND = 40


def rows_of(lengths: list[int], seed: int = 0) -> torch.Tensor:
    """Rows [n, BOUND] of these lengths, with noise behind them."""
    generator = torch.Generator().manual_seed(seed)
    payload = torch.randint(0, 256, (len(lengths), BOUND), dtype=torch.uint8, generator=generator)
    headers = torch.tensor(lengths, dtype=torch.int32).view(torch.uint8).view(-1, rows.LENGTH_BYTES)
    payload[:, : rows.LENGTH_BYTES] = headers
    return payload


@given(st.lists(st.integers(rows.LENGTH_BYTES, BOUND), max_size=12), st.booleans())
def test_packed_rows_spread_to_the_same_rows(lengths, in_place):
    payload = rows_of(lengths)
    want = [row[:n].clone() for row, n in zip(payload, lengths, strict=True)]
    into = payload if in_place else torch.zeros_like(payload)
    packed = rows.pack(payload, into)
    assert torch.equal(packed, torch.cat([torch.empty(0, dtype=torch.uint8), *want]))
    arrived = torch.zeros(len(lengths), BOUND, dtype=torch.uint8)
    arrived.view(-1)[: len(packed)] = packed
    assert rows.spread(arrived, len(packed))
    assert all(torch.equal(row[: len(w)], w) for row, w in zip(arrived, want, strict=True))


@given(
    st.lists(st.one_of(st.integers(0, BOUND + 2), st.integers(-(2**31), 2**31 - 1)), min_size=1, max_size=5),
    st.integers(0, 5 * BOUND),
)
def test_lengths_that_do_not_add_up_are_refused_and_nothing_moves(lengths, size):
    """Each header lies where the one before says, as far as there is room."""
    arrived, end = torch.zeros(len(lengths) * BOUND, dtype=torch.uint8), 0
    size, valid = min(size, len(arrived)), True
    for length in lengths:
        if not 0 <= end <= len(arrived) - rows.LENGTH_BYTES:
            break
        arrived[end : end + rows.LENGTH_BYTES] = torch.tensor([length], dtype=torch.int32).view(torch.uint8)
        end += length
    valid = all(rows.LENGTH_BYTES <= length <= BOUND for length in lengths) and sum(lengths) == size
    before = arrived.clone()
    assert rows.spread(arrived.view(-1, BOUND), size) == valid
    assert valid or torch.equal(arrived, before)


def test_without_numba_the_same_functions_run_as_python(monkeypatch):
    python = {name: getattr(getattr(rows, name), "py_func", None) for name in ("_pack", "_spread")}
    assert all(python.values()), "numba did not compile them"
    compiled = rows.pack(rows_of([4, 40, 17]), torch.empty(3, BOUND, dtype=torch.uint8))
    monkeypatch.setattr(rows, "_move", __import__("ctypes").memmove)
    for name, function in python.items():
        monkeypatch.setattr(rows, name, function)
    packed = rows.pack(rows_of([4, 40, 17]), torch.empty(3, BOUND, dtype=torch.uint8))
    assert torch.equal(packed, compiled)
    test_packed_rows_spread_to_the_same_rows()
    test_lengths_that_do_not_add_up_are_refused_and_nothing_moves()
