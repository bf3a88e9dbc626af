"""`flashcomm bench ttft`."""

from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from flashcomm.cli.base import (
    Json,
    ModelDtype,
    Ranks,
    RanksPerHost,
    Rate,
    bundled_or,
    check_plot,
    checked_lab,
    codec_list,
    fail,
    in_lab,
    model_directory,
    model_dtype,
    need,
    new_table,
    stderr,
    stdout,
    warm_up,
    write_rows,
)
from flashcomm.report.rows import figure


def bench_ttft(
    model: Annotated[
        Path | None, typer.Argument(help="A Hugging Face model directory, or 'demo' for the bundled model.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Instead of a model: llama-160m or llama-1b, made with random weights.")
    ] = None,
    tp: Ranks = 2,
    codecs: Annotated[
        str, typer.Option(help="Comma-separated codecs; plain is always measured.")
    ] = "int8g128,int4g128",
    tokens: Annotated[str, typer.Option(help="Comma-separated lengths of the prompt, 256 or more.")] = "1024",
    repeats: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 5,
    dtype: ModelDtype = "auto",
    rate: Rate = None,
    ranks_per_host: RanksPerHost = 1,
    plot: Annotated[
        Path | None, typer.Option(help="Draw each rank's timeline to this file, such as out.png.", dir_okay=False)
    ] = None,
    json_file: Json = None,
):
    """Measure the time to first token: plain, compressed, overlapped and both, against max(compute, communication)."""
    import torch

    from flashcomm.bench import ttft
    from flashcomm.lab import launch
    from flashcomm.models.random import CONFIGS, random_model

    need("transformers", "transformers")
    specs = codec_list(codecs, plain_first=True)
    lengths = [_tokens(text) for text in tokens.split(",")]
    dtype = model_dtype(dtype)
    if (model is None) == (config is None):
        fail(f"give a model directory, or --config with one of {', '.join(CONFIGS)}")
    if config is not None and config not in CONFIGS:
        fail(f"unknown --config {config!r}. Allowed: {', '.join(CONFIGS)}")
    if plot:
        check_plot(plot)
    checked_lab(tp, rate, ranks_per_host)
    with ExitStack() as stack:
        if config is not None:
            with stderr.status(f"making a {config} with random weights"):
                directory = stack.enter_context(random_model(config, getattr(torch, dtype)))
        else:
            assert model is not None
            directory = bundled_or(model)
        model_directory(directory, tp, least_ranks=2)
        warm_up(specs)
        arguments = (directory, config or str(model), specs, lengths, repeats, getattr(torch, dtype))
        lab = stack.enter_context(in_lab(tp, rate, ranks_per_host))
        with stderr.status(f"measuring on {tp} ranks"):
            rows, timelines = launch.run(ttft.rank_main, arguments, ranks=tp, lab=lab)[0]
    for _, group in groupby(rows, key=lambda row: row.tokens):
        _print_ttft(list(group))
    if plot:
        from flashcomm.bench import timeline

        plot.parent.mkdir(parents=True, exist_ok=True)
        first = rows[0]
        title = f"{first.model}, {first.tokens:,} tokens, {first.dtype}, {tp} ranks, link {first.link}"
        timeline.draw(timelines, title, plot)
    write_rows(json_file, "ttft", rows)


def _print_ttft(rows: list):
    first = rows[0]
    where = "on this machine" if first.link == "local" else f"on links of {first.link}"
    table = new_table(
        f"{first.model}, {first.tokens:,} tokens, {first.dtype}, {first.ranks} ranks {where}; "
        f"compute {first.compute_ms:.0f} ms"
    )
    for name in ("codec", "parts"):
        table.add_column(name, no_wrap=True)
    for name in ("TTFT\nms", "p20", "p80", "x plain", "predicted\nms", "sums\nms", "bound\nms", "% of\nbound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("same\ntoken")
    for row in rows:
        figures = (
            row.p50_ms, row.p20_ms, row.p80_ms, row.speedup, row.predicted_ms, row.communication_ms, row.bound_ms,
            100 * row.bound_share,
        )  # fmt: skip
        what = f"overlapped, {row.parts}" if row.overlap else "in one piece"
        table.add_row(row.codec, what, *map(figure, figures), "yes" if row.same_token else "no")
    stdout.print(table)
    stdout.print(
        "bound: max(compute, sums), and what cannot overlap. predicted: by the planner, for the decoder alone.",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip


def _tokens(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 256:
        fail(f"--tokens {text!r}: give lengths of 256 or more, such as 1024,2048")
    return int(text)
