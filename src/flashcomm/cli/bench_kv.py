"""`flashcomm bench kv`."""

from pathlib import Path
from typing import Annotated

import typer

from flashcomm.cli.base import (
    Dtype,
    Json,
    Rate,
    bundled_or,
    check_calibration,
    check_dtype,
    checked_lab,
    codec_list,
    fail,
    in_lab,
    model_directory,
    need,
    new_table,
    stderr,
    stdout,
    warm_up,
    write_rows,
)
from flashcomm.report.rows import figure


def bench_kv(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model directory, or 'demo' for the bundled model.")],
    codecs: Annotated[
        str, typer.Option(help="Comma-separated codecs; raw is always measured. K:V is a pair of codecs.")
    ] = "lossless,ec8,ec6,ec4",
    tokens: Annotated[int, typer.Option(help="Tokens of the cache.", min=1)] = 4096,
    repeats: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 5,
    dtype: Dtype = "bfloat16",
    rate: Rate = None,
    json_file: Json = None,
):
    """Measure the time from a prefill to the first token of another process, with the cache on the link between."""
    import torch

    from flashcomm.bench import kv
    from flashcomm.lab import launch

    need("transformers", "transformers")
    specs = codec_list(codecs)
    check_dtype(dtype)
    for spec in specs:
        check_calibration(spec, None, 2)
        if "/" in spec:
            fail(f"--codecs {spec}: levels are for sums. Give one codec, or K's and V's, such as int8g64:ec4")
    directory = model_directory(bundled_or(model), 1)
    checked_lab(2, rate, 1)
    warm_up(specs)
    arguments = (directory, model.resolve().name, specs, tokens, repeats, getattr(torch, dtype))
    with in_lab(2, rate, 1) as lab, stderr.status("measuring between 2 processes"):
        rows = launch.run(kv.rank_main, arguments, ranks=2, timeout_s=600.0, lab=lab)[1]
    first = rows[0]
    where = "on this machine" if first.link == "local" else f"over a link of {first.link}"
    table = new_table(
        f"{first.model}, cache of {first.tokens:,} tokens, {first.dtype}, {where}; prefill {first.prefill_ms:.0f} ms"
    )
    table.add_column("codec", no_wrap=True)
    for name in ("bits", "first token\nms", "p20", "p80", "x raw", "transfer\nms", "x raw"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("same\ntoken")
    for row in rows:
        figures = (
            row.bits_per_value, row.p50_ms, row.p20_ms, row.p80_ms, row.speedup, row.transfer_ms, row.transfer_speedup,
        )  # fmt: skip
        table.add_row(row.codec, *map(figure, figures), "yes" if row.same_token else "no")
    stdout.print(table)
    stdout.print("first token: from the end of the prefill.", style="dim", highlight=False)
    write_rows(json_file, "kv", rows)
