"""Rows of results: as JSON that tools read again, as Markdown, and figures with the digits that they deserve."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flashcomm import machine


def document(op: str, rows: Sequence[Any]) -> dict:
    """A file of `results/`: the operation, the machine, and each row's fields by name.

    Args:
        op: such as ``all_reduce`` or ``codec``.
        rows: dataclasses of one kind.
    """
    return {"op": op, "machine": machine.describe(), "rows": [asdict(row) for row in rows]}


def write_json(path: Path | None, content: object):
    """Write `content` to `path` as strict JSON, and make its folder; do nothing if `path` is None.

    JSON has no infinity and no NaN: they become null.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    """Replace floats that JSON cannot hold by None."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def figure(value: float | None) -> str:
    """Three digits, but no more than three decimals.

    >>> figure(1234.5), figure(12.34), figure(0.01234), figure(0), figure(None)
    ('1234', '12.3', '0.012', '0', '')
    """
    if value is None:
        return ""
    return f"{value:.{max(0, min(3, 2 - math.floor(math.log10(value))))}f}" if value > 0 else f"{value:g}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table: text on the left, figures on the right.

    >>> markdown_table(["codec", "ms"], [["int8g128", "1.2"]])
    ['| codec | ms |', '| --- | ---: |', '| int8g128 | 1.2 |']
    """
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]
