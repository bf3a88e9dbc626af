"""The rows of `flashcomm bench attention`, and the ring that they are compared with."""

import pytest
import torch

import ranks
from flashcomm import attention
from flashcomm.bench import attention as bench

SHAPE = bench.Shape(batch=1, heads=4, key_heads=2, queries=8, keys=128, head_size=64)


def rows_and_errors():
    """Rows; the error of a wrong result; the error of other bytes than the formula's."""
    rows = bench.measure([SHAPE], ("int4g128", "int8g64:int4g128"), 1, torch.bfloat16)
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        wrong = attention.scaled_dot_product_attention
        patch.setattr(attention, "scaled_dot_product_attention", lambda *args, **how: 1.01 * wrong(*args, **how))
        with pytest.raises(RuntimeError) as error:
            bench.measure([SHAPE], ("int4g128",), 1, torch.bfloat16)
        errors.append(str(error.value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "merge_bytes", lambda *_: 7)
        with pytest.raises(RuntimeError) as error:
            bench.measure([SHAPE], ("int4g128",), 1, torch.bfloat16)
        errors.append(str(error.value))
    return rows, errors


def test_rows():
    (rows, errors), *_ = ranks.shared(2).run(rows_and_errors)
    assert [(row.way, row.codec) for row in rows] == [
        ("ring", "none"), ("alone", "none"), ("merge", "int4g128"), ("merge", "int8g64:int4g128"),
    ]  # fmt: skip
    # Of 2 ranks: a share of keys and values; half of the queries, of the outputs, and of the log-sum-exps.
    assert rows[0].wire_bytes == 2 * 2 * 64 * 64 * 2
    assert rows[2].wire_bytes == 4 * (2 * 256 * 4.25 / 8 + 4 * 4)
    assert rows[0].ring_over_this == 1
    assert rows[0].sqnr_db > 40 and rows[1].sqnr_db is None and 15 < rows[2].sqnr_db < rows[3].sqnr_db
    assert all(0 < row.p20_ms <= row.p50_ms <= row.p80_ms and row.link == "local" for row in rows)
    assert "other values than one process computes" in errors[0]
    assert "and the formula says 7" in errors[1]
