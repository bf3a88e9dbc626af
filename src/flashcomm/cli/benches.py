"""The commands of `flashcomm bench`."""

import os
import re
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import flashcomm
from flashcomm.cli.base import (
    Dtype,
    Json,
    Ranks,
    RanksPerHost,
    Rate,
    check_dtype,
    check_plot,
    checked_lab,
    codec_list,
    fail,
    figure,
    in_lab,
    model_directory,
    need,
    new_table,
    stderr,
    stdout,
    warm_up,
    write_json,
)
from flashcomm.planner import ALGORITHMS


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
    """Encode and decode against a copy of the same tensor; 256 rows are checked against the specification first."""
    import torch

    from flashcomm.bench import codec

    specs = list(codec.ALL) if everything else codec_list(codecs)
    for spec in specs:
        if ":" in spec:
            fail(f"{spec} is a pair of formats: measure its steps, {spec.replace(':', ' and ')}")
    check_dtype(dtype)
    if device == "cuda" and not torch.cuda.is_available():
        fail("no CUDA device on this machine: use --device cpu")
    torch.set_num_threads(threads)
    sums = None
    if everything:
        from flashcomm.demo.partial_sums import partial_sums

        need("transformers", "transformers")
        with stderr.status("computing the partial sums of the bundled model"):
            sums = partial_sums()
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
            row.codec, row.backend, f"{row.bits_per_value:.2f}", f"{row.sqnr_db:.1f}", f"{row.sqnr_heavy_db:.1f}",
            *([f"{row.sqnr_model_db:.1f}"] if row.sqnr_model_db is not None else []),
            f"{row.copy_ms:.2f}", f"{row.encode_ms:.2f}", f"{row.encode_vs_copy:.2f}", f"{row.decode_ms:.2f}",
            f"{row.decode_vs_copy:.2f}",
        )  # fmt: skip
    stdout.print(table)
    stdout.print(
        "SQNR in dB: signal to quantisation noise, higher is better. Bytes checked against the specification: 256 rows."
    )
    _write_rows(json_file, "codec", rows)


def bench_gpu(
    codecs: Annotated[str, typer.Option(help="Comma-separated codecs.")] = ",".join(
        ("int8g128", "int4g128", "int4g32", "mxfp4", "nvfp4", "fp8g128", "int2g32+spike")
    ),
    targets: Annotated[
        str | None, typer.Option(help="Compile for these instead of measuring: sm_80, sm_90, gfx942; no GPU is needed.")
    ] = None,
    tp: Annotated[
        str | None,
        typer.Option(help="Measure all-reduces over these world sizes, such as 2,4,8, which share the GPUs."),
    ] = None,
    mib: Annotated[
        int | None, typer.Option(help="Size of the tensor in MiB; 256 if not given, with --tp 16.", min=1)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 15,
    json_file: Json = None,
):
    """The Triton kernels against a copy; without a GPU, what they compile to: registers, spills, bytes, the floor."""
    import torch

    from flashcomm import kernels
    from flashcomm.bench import gpu
    from flashcomm.lab import launch

    specs = codec_list(codecs)
    if tp and (targets or not torch.cuda.is_available()):
        fail("--tp measures all-reduces and needs a CUDA device" + (": leave out --targets" if targets else ""))
    worlds = [_number(text, "--tp") for text in tp.split(",")] if tp else []
    if targets is None and not torch.cuda.is_available():
        targets = ",".join(gpu.TARGETS)
        stderr.print("no CUDA device on this machine: compiling for " + targets)
    need("triton", "gpu")
    for spec in specs:
        if missing := kernels.any_missing(flashcomm.codec(spec), "cuda") or (":" in spec and "a pair of formats"):
            fail(f"{spec} has no kernel of its own: {missing}")
    for name in targets.split(",") if targets else ():
        if not re.fullmatch(r"sm_[0-9]+|gfx[0-9a-f]+", name.strip()):
            fail(f"unknown target {name!r}: give names such as {', '.join(gpu.TARGETS)}")
    with stderr.status("warming up") as status:
        update = lambda what: status.update(f"at {what}")  # noqa: E731
        if targets:
            title = "compiled ahead of time; floor: 256 MiB of bf16 on an H200"
            rows = gpu.compiled(specs, [name.strip() for name in targets.split(",")], update)
        elif worlds:
            title, rows = f"{mib or 16} MiB of bfloat16 on each rank", []
            # In one launch where the GPUs can; ranks may share one.
            os.environ.update(FLASHCOMM_FUSED="1", TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1")
            for ranks in worlds:
                update(f"{ranks} ranks")
                rows += launch.run(gpu.all_reduces, (specs, mib or 16, repeats), ranks=ranks)[0]
        else:
            title = f"{mib or 256} MiB of bfloat16"
            rows = gpu.measure(specs, mib=mib or 256, repeats=repeats, progress=update)
    table = new_table(title)
    names = [name for name in rows[0].as_dict() if name != "mib"]
    for i, name in enumerate(names):
        table.add_column(name.replace("_", "\n"), justify="left" if i < 3 else "right", no_wrap=True)
    for row in rows:
        figures = row.as_dict()
        table.add_row(
            *(f"{figures[name]:.4g}" if isinstance(figures[name], float) else str(figures[name]) for name in names)
        )
    stdout.print(table)
    _write_rows(json_file, "gpu", rows)


def bench_collective(op: str):
    """The command that measures `op`."""

    def command(
        tp: Annotated[
            str | None, typer.Option(help="Comma-separated world sizes, 2,4 if not given; under torchrun its own.")
        ] = None,
        codecs: Annotated[
            str, typer.Option(help="Comma-separated codecs; plain is always measured.")
        ] = "int8g128,int4g128",
        sizes: Annotated[
            str, typer.Option(help="Comma-separated message sizes: 64k, 16m or bytes.")
        ] = "4k,64k,1m,16m,64m",
        algorithms: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(_algorithms(op))}.")] = "auto",
        repeats: Annotated[int, typer.Option(help="Timed rounds; more for messages up to 1 MiB.", min=1)] = 11,
        dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
        rate: Rate = None,
        ranks_per_host: RanksPerHost = 1,
        mpi: Annotated[bool, typer.Option("--mpi", help="Also Open MPI over shared memory, fp32.")] = False,
        plot: Annotated[
            Path | None, typer.Option(help="Draw time over size to this file, such as out.png.", dir_okay=False)
        ] = None,
        json_file: Json = None,
    ):
        import torch

        from flashcomm.bench import collectives
        from flashcomm.bench import mpi as open_mpi
        from flashcomm.lab import launch

        # Every rank checks its input, and one says what is wrong with it.
        stderr.quiet = launch.joined() and os.environ["RANK"] != "0"
        specs = codec_list(codecs)
        byte_sizes = [_size(text) for text in sizes.split(",")]
        chosen = algorithms.split(",")
        for name in chosen:
            if name not in _algorithms(op):
                fail(f"unknown algorithm {name!r}. Allowed: {', '.join(_algorithms(op))} (plain is always measured)")
        check_dtype(dtype)
        if plot:
            check_plot(plot)
        if mpi and (rate or launch.joined()):
            fail("--mpi compares ranks of this machine without a slow link: leave out --rate, and torchrun")
        if mpi and (reason := open_mpi.unavailable()):
            fail(reason)
        worlds = [_number(text, "--tp") for text in (tp or "2,4").split(",")]
        for ranks in worlds:
            checked_lab(ranks, rate, ranks_per_host)
        warm_up(specs)
        if launch.joined():
            rows = _join(tp, rate, (op, specs, byte_sizes, chosen, repeats, getattr(torch, dtype)))
            if rows is None:
                return
        else:
            rows = []
            for ranks in worlds:
                with in_lab(ranks, rate, ranks_per_host) as lab, stderr.status(f"measuring on {ranks} ranks"):
                    what = {"ranks": ranks, "sizes": byte_sizes, "repeats": repeats, "dtype": getattr(torch, dtype)}
                    measure = partial(collectives.run, op, specs, algorithms=chosen, lab=lab, **what)
                    rows += open_mpi.around(measure, op, **what) if mpi else measure()
        for _, table in groupby(rows, key=lambda row: row.ranks):
            _print_collectives(list(table))
        if plot:
            from flashcomm.bench.plot import draw

            plot.parent.mkdir(parents=True, exist_ok=True)
            draw(rows, plot)
        _write_rows(json_file, op, rows)

    command.__doc__ = f"Compressed {op} against the backend's own, taking turns; every answer is checked first."
    return command


def _algorithms(op: str) -> tuple[str, ...]:
    return tuple(name for name in ALGORITHMS if name != "plain") if op == "all_reduce" else ("auto", "one_step")


def _join(tp: str | None, rate: str | None, arguments: tuple) -> list | None:
    """Measure as one rank of those that torchrun or `flashcomm lab` started; rows on rank 0, None on the others."""
    from flashcomm.bench import collectives
    from flashcomm.lab import launch

    world = os.environ["WORLD_SIZE"]
    if tp not in (None, world) or int(world) < 2:
        fail(f"--tp {tp or world} on a rank of {world}: start 2 ranks or more, and leave --tp out")
    if rate:
        fail(f"--rate {rate} starts ranks of its own, and this is a rank already: leave it out")
    rows = launch.join(collectives.measure, arguments)
    return rows if os.environ["RANK"] == "0" else None


_NOTES = {
    "link": "% of link: the time in which the link carries what the host's interface sent, over the measured time",
    "copy": "% of copy: the time of a copy of the message in memory, over the measured time",
    "mpi": "Open MPI: fp32 over shared memory, messages of as many bytes; measured before and after, the better counts",
}


def _print_collectives(rows: list):
    from flashcomm.units import bytes_text

    first = rows[0]
    where = {"local": "on this machine", "network": "over a network"}.get(first.link, f"on links of {first.link}")
    hosts = f", {first.ranks_per_host} to a host" if 1 < first.ranks_per_host < first.ranks else ""
    table = new_table(f"{first.op}, {first.dtype}, {first.ranks} ranks{hosts}, {first.backend} {where}")
    table.add_column("message", justify="right", no_wrap=True)
    for name in ("codec", "algorithm"):
        table.add_column(name, no_wrap=True)
    interface = first.interface_bytes is not None
    for name in (
        "ms", "p20", "p80", "x plain", "GB/s\nmessage", "GB/s\nsent", "MiB\nsent",
        *(["MiB\niface"] * interface), f"% of\n{first.ceiling}", "SQNR\ndB",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        ran = row.algorithm if row.algorithm == row.chosen else f"{row.algorithm}: {row.chosen}"
        ran += f" of {row.sent}" if row.sent not in (None, row.codec) else ""
        names = (row.codec, ran) if row.backend == first.backend else (row.backend, row.dtype)
        figures = (
            row.p50_ms, row.p20_ms, row.p80_ms, row.speedup, row.algorithm_gbps, row.wire_gbps, _mib(row.wire_bytes),
            *([_mib(row.interface_bytes)] * interface), row.ceiling_share and 100 * row.ceiling_share, row.sqnr_db,
        )  # fmt: skip
        table.add_row(bytes_text(row.message_bytes), *names, *map(figure, figures))
    # A narrow terminal may break the lines; shortened figures would be none.
    Console(width=max(stdout.width, 130)).print(table)
    others = ["mpi"] if any(row.backend != first.backend for row in rows) else []
    for note in (first.ceiling, *others):
        stdout.print(_NOTES[note], style="dim", highlight=False, soft_wrap=True)


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


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
    dtype: Dtype = "bfloat16",
    rate: Rate = None,
    ranks_per_host: RanksPerHost = 1,
    plot: Annotated[
        Path | None, typer.Option(help="Draw who computed and who sent to this file, such as out.png.", dir_okay=False)
    ] = None,
    json_file: Json = None,
):
    """Time to first token: plain, compressed, overlapped and both, against max(compute, communication)."""
    import torch

    from flashcomm.bench import ttft
    from flashcomm.demo import MODEL
    from flashcomm.lab import launch

    need("transformers", "transformers")
    specs = codec_list(codecs, plain_first=True)
    lengths = [_tokens(text) for text in tokens.split(",")]
    check_dtype(dtype)
    if (model is None) == (config is None):
        fail(f"give a model directory, or --config with one of {', '.join(ttft.CONFIGS)}")
    if config is not None and config not in ttft.CONFIGS:
        fail(f"unknown --config {config!r}. Allowed: {', '.join(ttft.CONFIGS)}")
    if plot:
        check_plot(plot)
    checked_lab(tp, rate, ranks_per_host)
    with ExitStack() as stack:
        if config is not None:
            with stderr.status(f"making a {config} with random weights"):
                directory = stack.enter_context(ttft.random_model(config, getattr(torch, dtype)))
        else:
            directory = MODEL if str(model) == "demo" else model
        assert directory is not None
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
    _write_rows(json_file, "ttft", rows)


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


def _number(text: str, option: str) -> int:
    if not text.strip().isdigit() or int(text) < 2:
        fail(f"{option} {text!r}: give numbers of ranks of 2 or more, such as 2,4")
    return int(text)


def _tokens(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 256:
        fail(f"--tokens {text!r}: give lengths of 256 or more, such as 1024,2048")
    return int(text)


def _size(text: str) -> int:
    number, unit = text.strip().lower().rstrip("ib"), 1
    if number and number[-1] in "km":
        number, unit = number[:-1], {"k": 1 << 10, "m": 1 << 20}[number[-1]]
    if not number.isdigit() or int(number) == 0:
        fail(f"size {text!r}: give bytes, or a number with k or m, such as 64k,16m")
    return int(number) * unit


def _write_rows(path: Path | None, op: str, rows: list):
    from flashcomm import machine

    write_json(path, {"op": op, "machine": machine.describe(), "rows": [row.as_dict() for row in rows]})
