"""`flashcomm bench codec`."""

import math
from typing import Annotated

import typer

from flashcomm.cli.base import (
    Dtype,
    Json,
    check_dtype,
    codec_list,
    demo_model,
    fail,
    need,
    new_table,
    stderr,
    stdout,
    write_rows,
)


def bench_codec(
    codecs: Annotated[
        str, typer.Option(help="Comma-separated codecs.")
    ] = "int8g128,int6g128,int5g128,int4g128,int4g32,int3g32,int2g32",
    everything: Annotated[
        bool, typer.Option("--all", help="Every kind of format, also on the bundled model's partial sums.")
    ] = False,
    mib: Annotated[int, typer.Option(help="Size of the tensor in MiB.", min=1)] = 32,
    dtype: Dtype = "bfloat16",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: Json = None,
):
    """Measure encode and decode against a copy of the same tensor; 256 rows are checked against the specification."""
    import torch

    from flashcomm.bench import codec
    from flashcomm.codecs import registry

    specs = list(registry.ALL) if everything else codec_list(codecs)
    for spec in specs:
        if ":" in spec:
            fail(f"{spec} is a pair of formats: measure its steps, {spec.replace(':', ' and ')}")
    check_dtype(dtype)
    if device == "cuda" and not torch.cuda.is_available():
        fail("no CUDA device on this machine: use --device cpu")
    torch.set_num_threads(threads)
    sums = None
    if everything:
        from flashcomm.models.partial_sums import partial_sums

        need("transformers", "transformers")
        model = demo_model()
        with stderr.status("computing the partial sums of the bundled model"):
            sums = partial_sums(model)
    with stderr.status("measuring") as status:
        rows = codec.run(
            specs,
            mib=mib,
            dtype=getattr(torch, dtype),
            repeats=repeats,
            device=device,
            partial_sums=sums,
            progress=lambda name: status.update(f"measuring {name}"),
        )
    table = new_table(f"{mib} MiB of {dtype}, {threads} thread(s), medians of {repeats}")
    table.add_column("codec", no_wrap=True)
    table.add_column("backend", no_wrap=True)
    for name in (
        "bits",
        "Gaussian\ndB",
        "heavy\ndB",
        *(["model\ndB"] * everything),
        "copy\nms",
        "encode\nms",
        "x copy",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("decode\nms", "x copy"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.codec, row.backend, f"{row.bits_per_value:.2f}", _decibels(row.sqnr_db), _decibels(row.sqnr_heavy_db),
            *([_decibels(row.sqnr_model_db)] if row.sqnr_model_db is not None else []),
            f"{row.copy_ms:.2f}", f"{row.encode_ms:.2f}", f"{row.encode_vs_copy:.2f}", f"{row.decode_ms:.2f}",
            f"{row.decode_vs_copy:.2f}",
        )  # fmt: skip
    stdout.print(table)
    stdout.print(
        "SQNR in dB: signal to quantisation noise, higher is better. Bytes checked against the specification: 256 rows."
    )
    write_rows(json_file, "codec", rows)


def _decibels(sqnr: float) -> str:
    return "exact" if math.isinf(sqnr) else f"{sqnr:.1f}"
