"""`flashcomm bench attention`."""

from itertools import groupby
from typing import Annotated

import typer

from flashcomm.cli.base import (
    Dtype,
    Json,
    RanksPerHost,
    Rate,
    check_dtype,
    checked_lab,
    codec_list,
    fail,
    in_lab,
    new_table,
    number_of_ranks,
    stderr,
    stdout,
    warm_up,
    write_rows,
)
from flashcomm.report.rows import figure


def bench_attention(
    tp: Annotated[str, typer.Option(help="Number of ranks that share queries and keys, on this machine.")] = "4",
    sizes: Annotated[str, typer.Option(help="Comma-separated numbers of queries x keys of all ranks.")] = "64x1024",
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 32,
    key_heads: Annotated[str, typer.Option(help="Comma-separated numbers of key heads.")] = "32,8",
    head_size: Annotated[int, typer.Option(help="Values of a head.", min=1)] = 128,
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 1,
    codecs: Annotated[str, typer.Option(help="Comma-separated codecs.")] = "bf16,int8g128,int4g128",
    repeats: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 7,
    dtype: Dtype = "bfloat16",
    rate: Rate = None,
    ranks_per_host: RanksPerHost = 1,
    json_file: Json = None,
):
    """Measure attention to keys that are spread over ranks, against a ring of keys; every answer is checked first."""
    import torch

    from flashcomm.bench import attention

    ranks = number_of_ranks(tp)
    specs = codec_list(codecs)
    check_dtype(dtype)
    pairs = [_pair(text, ranks) for text in sizes.split(",")]
    counts = [_key_heads(text, heads) for text in key_heads.split(",")]
    checked_lab(ranks, rate, ranks_per_host)
    warm_up(specs)
    shapes = [
        attention.Shape(batch=batch, heads=heads, key_heads=count, queries=queries, keys=keys, head_size=head_size)
        for count in counts
        for queries, keys in pairs
    ]
    with in_lab(ranks, rate, ranks_per_host) as lab, stderr.status(f"measuring on {ranks} ranks"):
        rows = attention.run(shapes, specs, ranks=ranks, repeats=repeats, dtype=getattr(torch, dtype), lab=lab)
    for _, group in groupby(rows, key=lambda row: (row.key_heads, row.queries, row.keys)):
        _print_attention(list(group))
    write_rows(json_file, "attention", rows)


def _pair(text: str, ranks: int) -> tuple[int, int]:
    """Parse ``QUERIESxKEYS``, which the ranks must divide."""
    queries, _, keys = text.strip().partition("x")
    if not (queries.isdigit() and keys.isdigit()) or any(int(n) < 1 or int(n) % ranks for n in (queries, keys)):
        fail(f"--sizes {text!r}: give QUERIESxKEYS, multiples of the {ranks} ranks, such as 64x1024")
    return int(queries), int(keys)


def _key_heads(text: str, heads: int) -> int:
    if not text.strip().isdigit() or int(text) < 1 or heads % int(text):
        fail(f"--key-heads {text!r}: give divisors of the {heads} query heads")
    return int(text)


def _print_attention(rows: list):
    first = rows[0]
    where = "on this machine" if first.link == "local" else f"on links of {first.link}"
    table = new_table(
        f"attention of {first.queries:,} queries to {first.keys:,} keys, {first.heads} and {first.key_heads} heads of "
        f"{first.head_size}, {first.dtype}, {first.ranks} ranks {where}"
    )
    for name in ("way", "codec"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "p20", "p80", "ring /\nthis", "MiB\nsent", "CPU ms\na rank", "SQNR\ndB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        figures = (
            row.p50_ms,
            row.p20_ms,
            row.p80_ms,
            row.ring_over_this,
            row.wire_bytes / 2**20,
            row.cpu_ms,
            row.sqnr_db,
        )
        table.add_row(row.way, row.codec, *map(figure, figures))
    stdout.print(table)
    note = "ring: keys and values go around; merge: they stay; alone: no exchange, each rank its own keys"
    stdout.print(note, style="dim", highlight=False, soft_wrap=True)
