"""`flashcomm demo`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from flashcomm.cli.base import (
    DEMO_PROMPT,
    Algorithm,
    Json,
    ModelDtype,
    Ranks,
    RanksPerHost,
    Rate,
    bundled_or,
    check_algorithm,
    codec_list,
    fail,
    in_lab,
    model_directory,
    model_dtype,
    need,
    new_table,
    read_text,
    stderr,
    stdout,
    warm_up,
)
from flashcomm.cli.simulation import Texts
from flashcomm.report.rows import figure, write_json

DEMO_CODECS = (
    "none,ec8,int8g128+hadamard,int8g128,fp8g128,ec6,int6g128+hadamard,int6g128,ec5,int5g128+hadamard,ec4.25,"
    "int4g128+hadamard,int4g128+keep64,int4g128,nvfp4,ec3.5"
)


def demo(
    tp: Ranks = 2,
    codecs: Annotated[str, typer.Option(help="Comma-separated codecs; plain is always measured.")] = DEMO_CODECS,
    algorithm: Algorithm = "auto",
    prompt: Annotated[str, typer.Option(help="What the model continues.")] = DEMO_PROMPT,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face model directory instead of the bundled model.")
    ] = None,
    text: Texts = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Held-out tokens for perplexity, KL and top-1: 16,384 of the bundled model, 2,048 of others.", min=1024
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate with each codec.", min=1)] = 48,
    repeats: Annotated[int, typer.Option(help="Timed rounds of the time to first token.", min=1)] = 9,
    dtype: ModelDtype = "auto",
    rate: Rate = None,
    ranks_per_host: RanksPerHost = 1,
    overlap: Annotated[
        bool, typer.Option("--overlap", help="Also the time to first token while parts of the prompt take turns.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.", file_okay=False)] = Path(
        "flashcomm-demo"
    ),
    json_file: Json = None,
):
    """Run a model tensor parallel, the bundled one if none is given, and show what each codec costs and saves."""
    from flashcomm import machine
    from flashcomm.lab import launch

    specs = codec_list(codecs, plain_first=True)
    directory = model_directory(bundled_or(model or Path("demo")), tp, least_ranks=2)
    dtype = model_dtype(dtype)
    need("matplotlib", "plot")
    warm_up(specs)
    check_algorithm(algorithm, specs, tp)
    sources = [*map(read_text, text or [])]
    tokens = tokens or (16384 if model is None else 2048)
    arguments = (directory, specs, algorithm, prompt, tokens, new_tokens, repeats, dtype, overlap, sources)
    from flashcomm.demo import measure, report
    from flashcomm.models.text import HELD_OUT_NAME

    stderr.print(f"loading the model on {tp} ranks ...", style="dim")
    with in_lab(tp, rate, ranks_per_host) as lab:
        rows, eval_tokens = launch.run(measure.rank_main, arguments, ranks=tp, lab=lab)[0]
    facts = {
        "model": "the bundled model" if model is None else model.resolve().name,
        "ranks": tp,
        "dtype": dtype,
        "text": ", ".join(path.name for path in text) if text else HELD_OUT_NAME,
        "eval_tokens": eval_tokens,
        "prompt_tokens": 1024,
        "prompt": prompt,
        **({"rate": rate, "ranks_per_host": ranks_per_host} if rate else {}),
        "machine": machine.describe(),
    }
    table = new_table(f"{facts['model']} on {tp} ranks, {dtype}; plain perplexity {rows[0].perplexity:.3f}")
    table.add_column("codec", no_wrap=True)
    for name in ("bits", "wire\nB/token", "TTFT\nms", "vs\nplain", "perplexity", "KL", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ranks\nidentical")
    for row in rows:
        table.add_row(
            row.codec, f"{row.bits_per_value:.2f}", f"{row.wire_bytes_per_token:,.0f}", f"{row.ttft_ms:.0f}",
            f"{row.ttft_vs_plain:.2f}x", f"{100 * row.perplexity_change:+.3f}%", f"{row.kl:.1e}",
            f"{100 * row.top1:.2f}%", "yes" if row.ranks_identical else Text("NO", "red"),
        )  # fmt: skip
    stdout.print(table)
    if overlap:
        _print_overlap(rows)
    stdout.print(report.link(facts), style="dim", highlight=False, soft_wrap=True)
    for written, writers in report.by_text(rows).items():
        stdout.print(Text.assemble("\n", (", ".join(writers), "bold"), " continue ", (repr(prompt), "italic"), " with"))
        stdout.print(written, highlight=False)
    document = {**facts, "rows": [asdict(row) for row in rows]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(report.render(rows, facts))
    write_json(out / "report.json", document)
    write_json(json_file, document)
    stdout.print(f"\nReport with plots: {out / 'report.html'}", highlight=False)
    if not all(row.ranks_identical for row in rows):
        fail("ranks ended with different bits: please report this as a bug")


def _print_overlap(rows: list):
    table = new_table(
        "overlapped: the parts of the prompt take turns; predicted: by the planner, for the decoder alone"
    )
    for name in ("codec", "parts"):
        table.add_column(name, no_wrap=True)
    for name in ("TTFT\nms", "overlapped\nms", "predicted\nms", "vs\nplain"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        figures = figure(row.ttft_ms), figure(row.overlapped_ms), figure(row.predicted_ms)
        table.add_row(row.codec, row.parts, *figures, f"{row.overlapped_vs_plain:.2f}x")
    stdout.print(table)
