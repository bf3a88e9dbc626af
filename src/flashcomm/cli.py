"""The `flashcomm` command: every subcommand checks its input before it starts a process."""

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import flashcomm
from flashcomm.bench.lab import Lab
from flashcomm.planner import ALGORITHMS, Group
from flashcomm.planner.prefill import CODECS as PLAN_CODECS

app = typer.Typer(
    help="Tensor-parallel LLM inference with activations in 2 to 8 bits on the wire.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure on this machine, always against plain.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

# Tables keep their shape where there is no terminal to fit.
_out = Console(width=None if sys.stdout.isatty() else 110)
_err = Console(stderr=True)

DEMO_CODECS = (
    "none,int8g128,fp8g128,int6g128,int5g128,fp5_e2m2g32,int4g32,int4g128:int8g128,int4g128+keep64,int4g128,nvfp4,mxfp4,"
    "int3g32,int2g32+spike,int2g32"
)
DEMO_PROMPT = "def read_config(path):\n    "

Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.", dir_okay=False)]
Ranks = Annotated[int, typer.Option("--tp", help="Tensor-parallel ranks, all on this machine.", min=1)]
Algorithm = Annotated[str, typer.Option(help="auto, one_step, two_step or hierarchical; see docs/algorithms.md.")]
Calibration = Annotated[
    Path | None, typer.Option(help="File from 'flashcomm calibrate', for codecs that need one.", dir_okay=False)
]
Rate = Annotated[
    str | None, typer.Option(help="Put each host behind a link of this rate, such as 1gbit; see docs/guide-lab.md.")
]
RanksPerHost = Annotated[int, typer.Option(help="Ranks that share a host, with --rate.", min=1)]
Dtype = Annotated[str, typer.Option(help="Type of the weights and activations: bfloat16, float16 or float32.")]


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
):
    if version:
        typer.echo(flashcomm.__version__)
        raise typer.Exit


@app.command()
def demo(
    tp: Ranks = 2,
    codecs: Annotated[str, typer.Option(help="Comma-separated codecs; plain is always measured.")] = DEMO_CODECS,
    algorithm: Algorithm = "auto",
    prompt: Annotated[str, typer.Option(help="What the model continues.")] = DEMO_PROMPT,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face model directory instead of the bundled model.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Held-out tokens for perplexity, KL and top-1.", min=1024)] = 16384,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate with each codec.", min=1)] = 48,
    repeats: Annotated[int, typer.Option(help="Timed rounds of the time to first token.", min=1)] = 9,
    dtype: Dtype = "bfloat16",
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
    """Run a real model tensor parallel with every codec, and show what each costs and saves."""
    from flashcomm.bench import launch, machine
    from flashcomm.demo import MODEL

    specs = _codec_list(codecs, plain_first=True)
    directory = _model_directory(model or MODEL, tp, least_ranks=2)
    _check_dtype(dtype)
    _need("matplotlib", "plot")
    _warm_up(specs)
    _check_algorithm(algorithm, specs, tp)
    arguments = (directory, specs, algorithm, prompt, tokens, new_tokens, repeats, dtype, overlap)
    from flashcomm.demo import measure, report

    _err.print(f"loading the model on {tp} ranks ...", style="dim")
    with _lab(tp, rate, ranks_per_host) as lab:
        rows, eval_tokens = launch.run(measure.rank_main, arguments, ranks=tp, lab=lab)[0]
    facts = {
        "model": "the bundled model" if model is None else str(model),
        "ranks": tp,
        "dtype": dtype,
        "eval_tokens": eval_tokens,
        "prompt_tokens": 1024,
        "prompt": prompt,
        **({"rate": rate, "ranks_per_host": ranks_per_host} if rate else {}),
        "machine": machine.describe(),
    }
    table = _table(f"{facts['model']} on {tp} ranks, {dtype}; plain perplexity {rows[0].perplexity:.3f}")
    table.add_column("codec", no_wrap=True)
    for name in ("bits", "wire\nB/token", "TTFT\nms", "vs\nplain", "perplexity", "KL", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ranks\nidentical")
    for row in rows:
        table.add_row(
            row.codec, f"{row.bits_per_value:.2f}", f"{row.wire_bytes_per_token:,.0f}", f"{row.ttft_ms:.0f}",
            f"{row.ttft_vs_plain:.2f}x", f"{100 * row.perplexity_change:+.3f}%", f"{row.kl:.1e}",
            f"{100 * row.top1:.2f}%", "yes" if row.ranks_identical else "[red]NO[/red]",
        )  # fmt: skip
    _out.print(table)
    if overlap:
        _print_overlap(rows)
    _out.print(report.link(facts), style="dim", highlight=False, soft_wrap=True)
    for text, writers in report.by_text(rows).items():
        _out.print(f"\n[bold]{', '.join(writers)}[/bold] continue [italic]{prompt!r}[/italic] with")
        _out.print(text, markup=False, highlight=False)
    document = {**facts, "rows": [row.as_dict() for row in rows]}
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(report.render(rows, facts))
    _write_json(out / "report.json", document)
    _write_json(json_file, document)
    _out.print(f"\nReport with plots: {out / 'report.html'}", highlight=False)
    if not all(row.ranks_identical for row in rows):
        _fail("ranks ended with different bits: please report this as a bug")


def _print_overlap(rows: list):
    table = _table("overlapped: the parts of the prompt take turns; predicted: by the planner, for the decoder alone")
    for name in ("codec", "parts"):
        table.add_column(name, no_wrap=True)
    for name in ("TTFT\nms", "overlapped\nms", "predicted\nms", "vs\nplain"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        figures = _figure(row.ttft_ms), _figure(row.overlapped_ms), _figure(row.predicted_ms)
        table.add_row(row.codec, row.parts, *figures, f"{row.overlapped_vs_plain:.2f}x")
    _out.print(table)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model directory, or 'demo' for the bundled model.")],
    tp: Ranks = 2,
    codec: Annotated[str, typer.Option(help="Wire format of the all-reduces; none for plain.")] = "int8g128",
    algorithm: Algorithm = "auto",
    prompt: Annotated[str, typer.Option(help="What the model continues.")] = DEMO_PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 64,
    calibration: Calibration = None,
    dtype: Dtype = "bfloat16",
    json_file: Json = None,
):
    """Generate text with a model over several ranks, its all-reduces compressed."""
    from flashcomm.bench import launch
    from flashcomm.demo import MODEL
    from flashcomm.demo import generate as generating

    directory = _model_directory(MODEL if str(model) == "demo" else model, tp)
    if "," in codec:
        _fail(f"--codec {codec!r}: give one codec")
    spec = _codec_list(codec)[0]
    _check_dtype(dtype)
    _check_calibration(spec, calibration, tp)
    _warm_up([spec])
    _check_algorithm(algorithm, [spec], tp)
    _err.print(f"loading the model on {tp} rank(s) ...", style="dim")
    arguments = (directory, spec, algorithm, prompt, max_new_tokens, dtype, True, calibration)
    result = launch.run(generating.rank_main, arguments, ranks=tp)[0]
    stats = result["stats"]
    saved = f", {stats['wire_bytes']:,} bytes sent instead of {stats['plain_bytes']:,}" if tp > 1 else ""
    rate = f", {result['tokens_per_second']:.1f} tokens/s" if result["tokens_per_second"] else ""
    _err.print(f"[dim]{spec}, {tp} ranks: first token after {result['ttft_ms']:.0f} ms{rate}{saved} by rank 0[/dim]")
    for reason, count in stats["plain"].items():
        _err.print(f"[dim]{count} of the all-reduces ran uncompressed: {reason}[/dim]")
    _write_json(json_file, result)


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model directory, or 'demo' for the bundled model.")],
    tp: Ranks = 2,
    out: Annotated[Path, typer.Option(help="The file to write.", dir_okay=False)] = Path("model.calibration"),
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text like what the model will see; Python source if not given.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to run, in windows of 1,024.", min=1)] = 32768,
    dtype: Dtype = "bfloat16",
):
    """Record how far each feature of a model's sums reaches, for codecs such as int4g128+keep64 and int4static."""
    from flashcomm.bench import launch
    from flashcomm.demo import MODEL, calibrating

    directory = _model_directory(MODEL if str(model) == "demo" else model, tp, least_ranks=2)
    _check_dtype(dtype)
    source = _read_text(text) if text else None
    out.parent.mkdir(parents=True, exist_ok=True)
    _err.print(f"loading the model on {tp} ranks ...", style="dim")
    facts = launch.run(calibrating.rank_main, (directory, out, source, text and text.name, tokens, dtype), ranks=tp)[0]
    _out.print(
        f"{out}: {facts['modules']} sums, {tp} ranks, {facts['tokens']:,} tokens, {out.stat().st_size:,} bytes",
        highlight=False,
    )


Model = Annotated[
    Path, typer.Argument(help="A Hugging Face model directory; the bundled model if not given, or by the name 'demo'.")
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(help="UTF-8 text like what the model will see, again for each file.", dir_okay=False),
]
SimulatedRanks = Annotated[int, typer.Option("--tp", help="Ranks to simulate, in one process.", min=2)]
Hosts = Annotated[int, typer.Option(help="Hosts with as many ranks each, for --algorithm hierarchical.", min=0)]
Window = Annotated[int, typer.Option(help="Tokens of a window; each token is judged by its predecessors.", min=16)]
Seed = Annotated[int, typer.Option(help="Of what is random: the bootstrap, and which text is explored.")]


@app.command("accuracy")
def measure_accuracy(
    model: Model = Path("demo"),
    tp: SimulatedRanks = 8,
    codecs: Annotated[str, typer.Option(help="Comma-separated codecs; plain and the floor are always measured.")] = (
        "int8g128,fp8g128,int6g128,int5g128,int4g32,nvfp4,int4g128,mxfp4,int3g32,int2g32+spike"
    ),
    policy: Annotated[list[Path] | None, typer.Option(help="A policy to measure too; again for each.")] = None,
    algorithm: Algorithm = "auto",
    hosts: Hosts = 0,
    text: Texts = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to measure on.", min=32)] = 20480,
    window: Window = 1024,
    dtype: Dtype = "bfloat16",
    calibration: Calibration = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.html, .md and .json.", file_okay=False)] = Path(
        "flashcomm-accuracy"
    ),
    json_file: Json = None,
):
    """What each codec costs this model over N ranks, simulated bit for bit in one process."""
    from flashcomm.accuracy import command, report

    specs = _codec_list(codecs)
    setup = _setup(model, specs, tp, hosts, algorithm, text, tokens, window, dtype, calibration, seed, out)
    try:
        rows, document = command.accuracy(setup, specs, policy or [])
    except (ValueError, NotImplementedError) as error:
        _fail(str(error))
    table = _table(f"{setup.model} as {tp} ranks, {dtype}, {document['tokens']:,} tokens")
    for place, name in enumerate(report.HEAD):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*report.cells(row, intervals=False))
    _out.print(table)
    _write_json(json_file, document)
    _out.print(
        f"\nReport with confidence intervals, plots, by sum and by position: {out / 'report.html'}", highlight=False
    )


@app.command("tune-policy")
def tune_policy(
    model: Model = Path("demo"),
    budget: Annotated[str, typer.Option(help="What the policy may cost: kl=NATS.")] = "kl=0.01",
    tp: SimulatedRanks = 8,
    codecs: Annotated[str, typer.Option(help="Comma-separated codecs to choose from.")] = (
        "int3g32,int4g128,int4g32,int5g128,int6g128,int8g128"
    ),
    algorithm: Algorithm = "auto",
    hosts: Hosts = 0,
    text: Texts = None,
    explore: Annotated[int, typer.Option(help="Tokens to measure each codec at each sum on.", min=16)] = 4096,
    tokens: Annotated[int, typer.Option(help="Further tokens, to measure whole policies on.", min=32)] = 16384,
    window: Window = 1024,
    dtype: Dtype = "bfloat16",
    calibration: Calibration = None,
    seed: Seed = 0,
    policy: Annotated[Path, typer.Option(help="The file to write.", dir_okay=False)] = Path("policy.toml"),
    out: Annotated[Path, typer.Option(help="Folder for tuning.json, and to go on from.", file_okay=False)] = Path(
        "flashcomm-tuning"
    ),
    json_file: Json = None,
):
    """The codec of each sum that sends the fewest bits within a budget of accuracy, as a policy file."""
    from flashcomm.accuracy import command

    specs = _codec_list(codecs)
    name, _, limit = budget.partition("=")
    try:
        nats = float(limit)
    except ValueError:
        nats = 0.0
    if name.strip() != "kl" or not nats > 0:
        _fail(f"--budget {budget!r}: give kl= and a number of nats above 0, such as kl=0.01")
    setup = _setup(model, specs, tp, hosts, algorithm, text, tokens + explore, window, dtype, calibration, seed, out)
    try:
        tuned, document = command.tune_policy(setup, nats, specs, explore, policy)
    except (ValueError, NotImplementedError) as error:
        _fail(str(error))
    for line in policy.read_text().split("\n\n")[0].splitlines():
        _out.print(line, markup=False, highlight=False, soft_wrap=True)
    _write_json(json_file, document)
    _out.print(f"{policy}: {tuned.policy}", markup=False, highlight=False, soft_wrap=True)


def _setup(model, specs, tp, hosts, algorithm, texts, tokens, window, dtype, calibration, seed, out):
    """What both commands measure, checked."""
    from flashcomm.accuracy import command
    from flashcomm.demo import MODEL
    from flashcomm.demo.text import held_out_text

    is_bundled = str(model) == "demo"
    directory = _model_directory(MODEL if is_bundled else model, tp)
    _check_dtype(dtype)
    _need("matplotlib", "plot")
    if hosts and tp % hosts:
        _fail(f"--hosts {hosts} with --tp {tp}: give hosts with as many ranks each")
    for spec in specs:
        _check_calibration(spec, calibration, tp)
    _check_algorithm(algorithm, specs, Group(ranks=tp, hosts=hosts or tp))
    _warm_up([*specs, "fp32"])
    return command.Setup(
        directory=directory,
        model="the bundled model" if is_bundled else str(model),
        texts=[_read_text(path) for path in texts] if texts else [held_out_text()],
        text=", ".join(path.name for path in texts) if texts else "the standard library's held-out modules",
        ranks=tp,
        hosts=hosts,
        algorithm=algorithm,
        tokens=tokens,
        window=window,
        dtype=dtype,
        seed=seed,
        calibration=calibration,
        out=out,
    )


@bench_app.command("codec")
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

    specs = list(codec.ALL) if everything else _codec_list(codecs)
    for spec in specs:
        if ":" in spec:
            _fail(f"{spec} is a pair of formats: measure its steps, {spec.replace(':', ' and ')}")
    _check_dtype(dtype)
    if device == "cuda" and not torch.cuda.is_available():
        _fail("no CUDA device on this machine: use --device cpu")
    torch.set_num_threads(threads)
    sums = None
    if everything:
        from flashcomm.demo.partial_sums import partial_sums

        _need("transformers", "transformers")
        with _err.status("computing the partial sums of the bundled model"):
            sums = partial_sums()
    with _err.status("measuring") as status:
        rows = codec.run(
            specs,
            mib=mib,
            dtype=getattr(torch, dtype),
            repeats=repeats,
            device=device,
            partial_sums=sums,
            progress=lambda name: status.update(f"measuring {name}"),
        )
    table = _table(f"{mib} MiB of {dtype}, {threads} thread(s), medians of {repeats}")
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
    _out.print(table)
    _out.print(
        "SQNR in dB: signal to quantisation noise, higher is better. Bytes checked against the specification: 256 rows."
    )
    _write_rows(json_file, "codec", rows)


@bench_app.command("gpu")
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
    from flashcomm.bench import gpu, launch

    specs = _codec_list(codecs)
    if tp and (targets or not torch.cuda.is_available()):
        _fail("--tp measures all-reduces and needs a CUDA device" + (": leave out --targets" if targets else ""))
    worlds = [_number(text, "--tp") for text in tp.split(",")] if tp else []
    if targets is None and not torch.cuda.is_available():
        targets = ",".join(gpu.TARGETS)
        _err.print("no CUDA device on this machine: compiling for " + targets)
    _need("triton", "gpu")
    for spec in specs:
        if missing := kernels.any_missing(flashcomm.codec(spec), "cuda") or (":" in spec and "a pair of formats"):
            _fail(f"{spec} has no kernel of its own: {missing}")
    for name in targets.split(",") if targets else ():
        if not re.fullmatch(r"sm_[0-9]+|gfx[0-9a-f]+", name.strip()):
            _fail(f"unknown target {name!r}: give names such as {', '.join(gpu.TARGETS)}")
    with _err.status("warming up") as status:
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
    table = _table(title)
    names = [name for name in rows[0].as_dict() if name != "mib"]
    for i, name in enumerate(names):
        table.add_column(name.replace("_", "\n"), justify="left" if i < 3 else "right", no_wrap=True)
    for row in rows:
        figures = row.as_dict()
        table.add_row(
            *(f"{figures[name]:.4g}" if isinstance(figures[name], float) else str(figures[name]) for name in names)
        )
    _out.print(table)
    _write_rows(json_file, "gpu", rows)


def _bench_collective(op: str):
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

        from flashcomm.bench import collectives, launch
        from flashcomm.bench import mpi as open_mpi

        # Every rank checks its input, and one says what is wrong with it.
        _err.quiet = launch.joined() and os.environ["RANK"] != "0"
        specs = _codec_list(codecs)
        byte_sizes = [_size(text) for text in sizes.split(",")]
        chosen = algorithms.split(",")
        for name in chosen:
            if name not in _algorithms(op):
                _fail(f"unknown algorithm {name!r}. Allowed: {', '.join(_algorithms(op))} (plain is always measured)")
        _check_dtype(dtype)
        if plot:
            _check_plot(plot)
        if mpi and (rate or launch.joined()):
            _fail("--mpi compares ranks of this machine without a slow link: leave out --rate, and torchrun")
        if mpi and (reason := open_mpi.unavailable()):
            _fail(reason)
        worlds = [_number(text, "--tp") for text in (tp or "2,4").split(",")]
        for ranks in worlds:
            _checked_lab(ranks, rate, ranks_per_host)
        _warm_up(specs)
        if launch.joined():
            rows = _join(tp, rate, (op, specs, byte_sizes, chosen, repeats, getattr(torch, dtype)))
            if rows is None:
                return
        else:
            rows = []
            for ranks in worlds:
                with _lab(ranks, rate, ranks_per_host) as lab, _err.status(f"measuring on {ranks} ranks"):
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


for _op in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all"):
    bench_app.command(_op)(_bench_collective(_op))


@bench_app.command("ttft")
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

    from flashcomm.bench import launch, ttft
    from flashcomm.demo import MODEL

    _need("transformers", "transformers")
    specs = _codec_list(codecs, plain_first=True)
    lengths = [_tokens(text) for text in tokens.split(",")]
    _check_dtype(dtype)
    if (model is None) == (config is None):
        _fail(f"give a model directory, or --config with one of {', '.join(ttft.CONFIGS)}")
    if config is not None and config not in ttft.CONFIGS:
        _fail(f"unknown --config {config!r}. Allowed: {', '.join(ttft.CONFIGS)}")
    if plot:
        _check_plot(plot)
    _checked_lab(tp, rate, ranks_per_host)
    with ExitStack() as stack:
        if config is not None:
            with _err.status(f"making a {config} with random weights"):
                directory = stack.enter_context(ttft.random_model(config, getattr(torch, dtype)))
        else:
            directory = MODEL if str(model) == "demo" else model
        assert directory is not None
        _model_directory(directory, tp, least_ranks=2)
        _warm_up(specs)
        arguments = (directory, config or str(model), specs, lengths, repeats, getattr(torch, dtype))
        lab = stack.enter_context(_lab(tp, rate, ranks_per_host))
        with _err.status(f"measuring on {tp} ranks"):
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
    table = _table(
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
        table.add_row(row.codec, what, *map(_figure, figures), "yes" if row.same_token else "no")
    _out.print(table)
    _out.print(
        "bound: max(compute, sums), and what cannot overlap. predicted: by the planner, for the decoder alone.",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A model's folder, its config.json, or a name such as llama-3-70b.")],
    machine: Annotated[
        str, typer.Option(help="A name such as l40, h100 or cpu-10gbe, or a file of 'flashcomm tune --save'.")
    ],
    tp: Annotated[int | None, typer.Option("--tp", help="Tensor-parallel ranks, 4 if not given.", min=2)] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 2048,
    batch: Annotated[int, typer.Option(help="Prompts at once.", min=1)] = 1,
    codecs: Annotated[str, typer.Option(help="Comma-separated codecs to compare with plain.")] = ",".join(PLAN_CODECS),
    ranks_per_host: Annotated[
        int | None, typer.Option(help="Ranks of a host; the machine's if not given.", min=1)
    ] = None,
    rate: Annotated[str | None, typer.Option(help="Of each host's link to the others, such as 100gbit.")] = None,
    link: Annotated[str | None, typer.Option(help="Inside of a host: pcie4, pcie4-sys, nvlink4 ...")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Write the policy to this file, for FLASHCOMM_POLICY.", dir_okay=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw time over ranks and over the link's rate to this file.", dir_okay=False)
    ] = None,
    json_file: Json = None,
):
    """Predict the time to first token in each codec, and say what to choose; nothing is started or loaded."""
    from flashcomm.bench import planning

    if plot:
        _check_plot(plot)
    options = {"ranks_per_host": ranks_per_host, "rate": rate, "link": link}
    try:
        made = planning.plan(model, machine, ranks=tp, tokens=prompt, rows=batch, codecs=_codec_list(codecs), **options)
        if plot:
            planning.draw(made, machine, plot, link)
    except ValueError as error:
        _fail(str(error))
    _out.print(planning.table_of(made, _table))
    for line in [*made.advice.reasons, *made.notes]:
        _out.print(f"- {line}", highlight=False, soft_wrap=True)
    if policy:
        chosen, comments = planning.policy_of(made)
        policy.parent.mkdir(parents=True, exist_ok=True)
        chosen.save(policy, comments)
        _out.print(f"{policy}: {chosen}", highlight=False, soft_wrap=True)
    _write_json(json_file, made.as_dict())


@app.command()
def tune(
    tp: Annotated[
        int | None, typer.Option(help="Ranks to start on this machine, 2 if not given.", min=2, show_default=False)
    ] = None,
    rate: Rate = None,
    ranks_per_host: RanksPerHost = 1,
    repeats: Annotated[int, typer.Option(help="Timed rounds for each size.", min=1)] = 5,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Measure how ranks compute too, and write both for 'flashcomm plan --machine'.", dir_okay=False
        ),
    ] = None,
    json_file: Json = None,
):
    """Measure what collectives cost on a group of ranks, and keep it: `algorithm="auto"` plans with it from then on.

    Where ranks have been started by torchrun or `flashcomm lab`, they are measured; else ranks are started here.
    """
    from flashcomm.bench import compute, launch
    from flashcomm.bench import tune as tuning_bench
    from flashcomm.collectives import tuning

    if save:
        _need("transformers", "transformers")
        if save.suffix != ".json":
            _fail(f"--save {str(save)!r}: give a file that ends in .json")
    measure = compute.measure if save else tuning_bench.measure
    _warm_up([*tuning_bench.CODECS, "bf16"])
    if launch.joined():
        world = os.environ["WORLD_SIZE"]
        if int(world) < 2 or rate or str(tp or world) != world:
            _fail(f"this is one rank of {world} already: start 2 or more, and leave --tp and --rate out")
        group = launch.join(measure, (repeats,))
        if os.environ["RANK"] != "0":
            return
    else:
        ranks = tp or 2
        with _lab(ranks, rate, ranks_per_host) as lab, _err.status(f"measuring {ranks} ranks"):
            group = launch.run(measure, (repeats,), ranks=ranks, lab=lab)[0]
    assert group is not None
    if save:
        _write_json(save, group.as_dict())
        group = group.group
    assert group.machine is not None
    target = tuning.save(group.machine)
    _print_tuning(group)
    _out.print(f"Kept in {target}; rank 0 reads it when ranks meet.", highlight=False, soft_wrap=True)
    _write_json(json_file, {"machine": group.machine.as_dict(), "ranks": group.ranks, "hosts": group.hosts})


def _print_tuning(group: Group):
    from flashcomm import planner
    from flashcomm.bench.collectives import readable

    costs = group.machine
    assert costs is not None
    sizes = [point.message_bytes for point in costs.plain.points]
    table = _table(f"{costs.name}: milliseconds by message, at 4 and at 8 bits")
    table.add_column("way", no_wrap=True)
    for size in sizes:
        table.add_column(readable(size), justify="right", no_wrap=True)
    ways = [("plain", costs.plain, 16.0, 16.0)]
    ways += [(f"{way}", cost, 4.25, 8.25) for way, cost in costs.compressed.items()]
    ways += [(f"{way}, bf16", cost, 16.0, 16.0) for way, cost in costs.uncompressed.items()]
    for way, cost, few, many in ways:
        measured = {point.message_bytes for point in cost.points}
        times = [sorted({f"{1e3 * cost.seconds(size, bits):.3g}" for bits in (few, many)}, key=float) for size in sizes]
        table.add_row(way, *("\n".join(t) if size in measured else "" for size, t in zip(sizes, times, strict=True)))
    _out.print(table)
    table = _table("what algorithm='auto' takes")
    table.add_column("message", justify="right", no_wrap=True)
    specs = ("int8g128", "int4g128")
    for spec in specs:
        table.add_column(spec, no_wrap=True)
    for size in planner.SIZES[2:17:2]:
        plans = [planner.choose(size, group, flashcomm.codec(spec)) for spec in specs]
        names = [f"{p.algorithm} in {p.pieces} pieces" if p.pieces > 1 else p.algorithm for p in plans]
        sent = [f" of {p.codec}" if p.declined and p.algorithm != "plain" else "" for p in plans]
        table.add_row(readable(size), *(name + what for name, what in zip(names, sent, strict=True)))
    _out.print(table)


def _join(tp: str | None, rate: str | None, arguments: tuple) -> list | None:
    """Measure as one rank of those that torchrun or `flashcomm lab` started; rows on rank 0, None on the others."""
    from flashcomm.bench import collectives, launch

    world = os.environ["WORLD_SIZE"]
    if tp not in (None, world) or int(world) < 2:
        _fail(f"--tp {tp or world} on a rank of {world}: start 2 ranks or more, and leave --tp out")
    if rate:
        _fail(f"--rate {rate} starts ranks of its own, and this is a rank already: leave it out")
    rows = launch.join(collectives.measure, arguments)
    return rows if os.environ["RANK"] == "0" else None


_NOTES = {
    "link": "% of link: the time in which the link carries what the host's interface sent, over the measured time",
    "copy": "% of copy: the time of a copy of the message in memory, over the measured time",
    "mpi": "Open MPI: fp32 over shared memory, messages of as many bytes; measured before and after, the better counts",
}


def _print_collectives(rows: list):
    from flashcomm.bench.collectives import readable

    first = rows[0]
    where = {"local": "on this machine", "network": "over a network"}.get(first.link, f"on links of {first.link}")
    hosts = f", {first.ranks_per_host} to a host" if 1 < first.ranks_per_host < first.ranks else ""
    table = _table(f"{first.op}, {first.dtype}, {first.ranks} ranks{hosts}, {first.backend} {where}")
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
        table.add_row(readable(row.message_bytes), *names, *map(_figure, figures))
    # A narrow terminal may break the lines; shortened figures would be none.
    Console(width=max(_out.width, 130)).print(table)
    others = ["mpi"] if any(row.backend != first.backend for row in rows) else []
    for note in (first.ceiling, *others):
        _out.print(_NOTES[note], style="dim", highlight=False, soft_wrap=True)


def _figure(value: float | None) -> str:
    """Three digits, but no more than three decimals."""
    if value is None:
        return ""
    return f"{value:.{max(0, min(3, 2 - math.floor(math.log10(value))))}f}" if value > 0 else f"{value:g}"


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


@app.command("lab", context_settings={"allow_interspersed_args": False})
def run_in_lab(
    command: Annotated[list[str], typer.Argument(metavar="CMD", help="What each rank runs, with its arguments.")],
    ranks: Annotated[int, typer.Option(help="Processes to start.", min=1)] = 4,
    rate: Annotated[str, typer.Option(help="Of each host's link, such as 1gbit, or none for unlimited.")] = "1gbit",
    ranks_per_host: Annotated[int, typer.Option(help="Ranks that share a host.", min=1)] = 1,
):
    """Run a command's ranks behind slow links on this machine, with the environment that torchrun would give them."""
    from flashcomm.bench.launch import INTERRUPTED, Interrupted

    with _lab(ranks, rate, ranks_per_host) as lab:
        assert lab is not None
        try:
            codes = lab.run(command)
        except ValueError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            raise Interrupted(INTERRUPTED) from None
    if lab.failed_rank is not None:
        code = codes[lab.failed_rank]
        _err.print(f"rank {lab.failed_rank} ended with {code}; all ranks have been stopped", highlight=False)
        # As a shell says that a signal ended a program.
        raise typer.Exit(code if code > 0 else 128 - code)


@app.command()
def env(json_file: Json = None):
    """What is installed, what has been measured, which fast paths are on, and why one is off."""
    import torch
    import torch.distributed as dist

    from flashcomm import kernels
    from flashcomm.bench import lab, machine
    from flashcomm.collectives import state, tuning

    facts, groups = machine.describe(), tuning.names()
    codec = flashcomm.codec("int8g128")
    cpu, cpu_why = kernels.route(codec, "cpu")
    gpu, gpu_why = kernels.route(codec, "cuda") if torch.cuda.is_available() else ("off", "no CUDA device")
    paths = {
        "CPU codecs": (cpu, cpu_why),
        "GPU codecs": (gpu, gpu_why),
        "shared memory": _unless(state.why_not_shared()),
        "gloo": ("on", "") if dist.is_gloo_available() else ("off", "this torch is built without it"),
        "NCCL": ("on", "") if dist.is_nccl_available() else ("off", "this torch is built without it"),
        "transformers": _presence("transformers", "pip install 'flashcomm[transformers]'"),
        "plots": _presence("matplotlib", "pip install 'flashcomm[plot]'"),
        "lab": _unless(lab.unavailable()),
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("flashcomm", flashcomm.__version__ + (f" (commit {facts['commit']})" if facts["commit"] else ""))
    table.add_row("CPU", f"{facts['cpu']}, {facts['cores']} cores, torch uses {torch.get_num_threads()} threads")
    table.add_row("GPU", facts["gpu"] or "none")
    for name, version in facts["versions"].items():
        table.add_row(name, version)
    for name, (found, why) in paths.items():
        table.add_row(name, f"{found}{': ' + why if why else ''}")
    measured = groups or ["nothing measured yet: see 'flashcomm tune'"]
    table.add_row("tuning", "\n".join([str(tuning.path()), *measured]))
    _out.print(table, highlight=False)
    document = {
        "flashcomm": flashcomm.__version__,
        **facts,
        "paths": {n: {"state": s, "why": w} for n, (s, w) in paths.items()},
        "tuning": {"file": str(tuning.path()), "groups": groups},
    }
    _write_json(json_file, document)


@contextmanager
def _lab(ranks: int, rate: str | None, ranks_per_host: int) -> Iterator[Lab | None]:
    """The lab that the options ask for, if any; what is wrong with them is an error before anything starts."""
    lab = _checked_lab(ranks, rate, ranks_per_host)
    if lab is None:
        yield None
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(lab)
        except RuntimeError as error:
            _fail(str(error))
        yield lab


def _checked_lab(ranks: int, rate: str | None, ranks_per_host: int) -> Lab | None:
    if rate is None and ranks_per_host > 1:
        _fail(f"--ranks-per-host {ranks_per_host} is for ranks behind slow links: give --rate too")
    try:
        if rate is not None:
            return Lab(ranks=ranks, rate=None if rate == "none" else rate, ranks_per_host=ranks_per_host)
    except ValueError as error:
        _fail(str(error))


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        show_edge=False,
    )


def _presence(module: str, remedy: str) -> tuple[str, str]:
    return ("on", "") if find_spec(module) else ("off", remedy)


def _unless(why: str | None) -> tuple[str, str]:
    return ("off", why) if why else ("on", "")


def _fail(message: str):
    _err.print(f"[red]error:[/red] {message}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def _codec_list(text: str, plain_first: bool = False) -> list[str]:
    try:
        specs = [str(flashcomm.codec(part.strip())) for part in text.split(",")]
    except ValueError as error:
        _fail(str(error))
    return ["none", *(s for s in specs if s != "none")] if plain_first else specs


def _model_directory(directory: Path, ranks: int, least_ranks: int = 1) -> Path:
    from flashcomm.bench import model

    _need("transformers", "transformers")
    if ranks < least_ranks:
        _fail(f"--tp {ranks}: one rank sends nothing. Use --tp {least_ranks} or more")
    try:
        model.check_directory(directory, ranks)
    except ValueError as error:
        _fail(str(error))
    return directory


def _check_algorithm(algorithm: str, specs: list[str], ranks: int | Group):
    from flashcomm import planner

    try:
        for spec in specs:
            if spec != "none":
                planner.choose(0, ranks, flashcomm.codec(spec), algorithm=algorithm)
    except ValueError as error:
        _fail(str(error))


def _check_dtype(dtype: str):
    if dtype not in ("bfloat16", "float16", "float32"):
        _fail(f"unknown dtype {dtype!r}. Allowed: bfloat16, float16, float32")


def _need(module: str, extra: str):
    if find_spec(module) is None:
        _fail(f"this command needs {module}: pip install 'flashcomm[{extra}]'")


def _number(text: str, option: str) -> int:
    if not text.strip().isdigit() or int(text) < 2:
        _fail(f"{option} {text!r}: give numbers of ranks of 2 or more, such as 2,4")
    return int(text)


def _tokens(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 256:
        _fail(f"--tokens {text!r}: give lengths of 256 or more, such as 1024,2048")
    return int(text)


def _check_plot(path: Path):
    if path.suffix not in (".png", ".svg", ".pdf"):
        _fail(f"--plot {str(path)!r}: give a file that ends in .png, .svg or .pdf")
    _need("matplotlib", "plot")


def _size(text: str) -> int:
    number, unit = text.strip().lower().rstrip("ib"), 1
    if number and number[-1] in "km":
        number, unit = number[:-1], {"k": 1 << 10, "m": 1 << 20}[number[-1]]
    if not number.isdigit() or int(number) == 0:
        _fail(f"size {text!r}: give bytes, or a number with k or m, such as 64k,16m")
    return int(number) * unit


def _check_calibration(spec: str, path: Path | None, ranks: int):
    from flashcomm.calibration import Calibration

    codec = flashcomm.codec(spec)
    if path is None and codec.unbound:
        _fail(f"--codec {spec} needs --calibration FILE, which 'flashcomm calibrate MODEL' writes")
    if path is not None:
        try:
            calibration = Calibration.load(path)
            for module in calibration.features:
                calibration.bind(codec, module, rank=0, ranks=ranks)
        except ValueError as error:
            _fail(str(error))


def _read_text(path: Path) -> str:
    if not path.is_file():
        _fail(f"--text {str(path)!r}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        _fail(f"--text {str(path)!r} is not UTF-8: {error}")
    if not text.strip():
        _fail(f"--text {str(path)!r} is empty: give text like what the model will see")
    return text


def _warm_up(specs: list[str]):
    """Compile the CPU kernels before the ranks start, so that they find them on disk."""
    from flashcomm import kernels

    with _err.status("loading the CPU kernels (the first time they are compiled, which takes some seconds)"):
        for spec in specs:
            kernels.warm_up(spec)


def _write_rows(path: Path | None, op: str, rows: list):
    from flashcomm.bench import machine

    _write_json(path, {"op": op, "machine": machine.describe(), "rows": [row.as_dict() for row in rows]})


def _write_json(path: Path | None, document: object):
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def main():
    """Entry point: turns a failed rank or Ctrl-C into a sentence and an exit status."""
    from flashcomm.bench.launch import Interrupted, RankError

    try:
        app()
    except RankError as error:
        interrupted = isinstance(error, Interrupted)
        _err.print(str(error) if interrupted else f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(130 if interrupted else 1)


if __name__ == "__main__":
    main()
