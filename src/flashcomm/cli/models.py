"""The commands that run a model: demo, generate, calibrate, accuracy, tune-policy."""

from pathlib import Path
from typing import Annotated

import typer

import flashcomm
from flashcomm.cli.base import (
    Algorithm,
    Calibration,
    Dtype,
    Json,
    Ranks,
    RanksPerHost,
    Rate,
    check_dtype,
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
from flashcomm.planner import Facts

DEMO_CODECS = (
    "none,int8g128,fp8g128,int6g128,int5g128,fp5_e2m2g32,int4g32,int4g128:int8g128,int4g128+keep64,int4g128,nvfp4,mxfp4,"
    "int3g32,int2g32+spike,int2g32"
)
DEMO_PROMPT = "def read_config(path):\n    "


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

    specs = codec_list(codecs, plain_first=True)
    directory = model_directory(model or MODEL, tp, least_ranks=2)
    check_dtype(dtype)
    need("matplotlib", "plot")
    warm_up(specs)
    _check_algorithm(algorithm, specs, tp)
    arguments = (directory, specs, algorithm, prompt, tokens, new_tokens, repeats, dtype, overlap)
    from flashcomm.demo import measure, report

    stderr.print(f"loading the model on {tp} ranks ...", style="dim")
    with in_lab(tp, rate, ranks_per_host) as lab:
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
    table = new_table(f"{facts['model']} on {tp} ranks, {dtype}; plain perplexity {rows[0].perplexity:.3f}")
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
    stdout.print(table)
    if overlap:
        _print_overlap(rows)
    stdout.print(report.link(facts), style="dim", highlight=False, soft_wrap=True)
    for text, writers in report.by_text(rows).items():
        stdout.print(f"\n[bold]{', '.join(writers)}[/bold] continue [italic]{prompt!r}[/italic] with")
        stdout.print(text, markup=False, highlight=False)
    document = {**facts, "rows": [row.as_dict() for row in rows]}
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

    directory = model_directory(MODEL if str(model) == "demo" else model, tp)
    if "," in codec:
        fail(f"--codec {codec!r}: give one codec")
    spec = codec_list(codec)[0]
    check_dtype(dtype)
    _check_calibration(spec, calibration, tp)
    warm_up([spec])
    _check_algorithm(algorithm, [spec], tp)
    stderr.print(f"loading the model on {tp} rank(s) ...", style="dim")
    arguments = (directory, spec, algorithm, prompt, max_new_tokens, dtype, True, calibration)
    result = launch.run(generating.rank_main, arguments, ranks=tp)[0]
    stats = result["stats"]
    saved = f", {stats['wire_bytes']:,} bytes sent instead of {stats['plain_bytes']:,}" if tp > 1 else ""
    rate = f", {result['tokens_per_second']:.1f} tokens/s" if result["tokens_per_second"] else ""
    stderr.print(f"[dim]{spec}, {tp} ranks: first token after {result['ttft_ms']:.0f} ms{rate}{saved} by rank 0[/dim]")
    for reason, count in stats["plain"].items():
        stderr.print(f"[dim]{count} of the all-reduces ran uncompressed: {reason}[/dim]")
    write_json(json_file, result)


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

    directory = model_directory(MODEL if str(model) == "demo" else model, tp, least_ranks=2)
    check_dtype(dtype)
    source = _read_text(text) if text else None
    out.parent.mkdir(parents=True, exist_ok=True)
    stderr.print(f"loading the model on {tp} ranks ...", style="dim")
    facts = launch.run(calibrating.rank_main, (directory, out, source, text and text.name, tokens, dtype), ranks=tp)[0]
    stdout.print(
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

    specs = codec_list(codecs)
    setup = _setup(model, specs, tp, hosts, algorithm, text, tokens, window, dtype, calibration, seed, out)
    try:
        rows, document = command.accuracy(setup, specs, policy or [])
    except (ValueError, NotImplementedError) as error:
        fail(str(error))
    table = new_table(f"{setup.model} as {tp} ranks, {dtype}, {document['tokens']:,} tokens")
    for place, name in enumerate(report.HEAD):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*report.cells(row, intervals=False))
    stdout.print(table)
    write_json(json_file, document)
    stdout.print(
        f"\nReport with confidence intervals, plots, by sum and by position: {out / 'report.html'}", highlight=False
    )


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

    specs = codec_list(codecs)
    name, _, limit = budget.partition("=")
    try:
        nats = float(limit)
    except ValueError:
        nats = 0.0
    if name.strip() != "kl" or not nats > 0:
        fail(f"--budget {budget!r}: give kl= and a number of nats above 0, such as kl=0.01")
    setup = _setup(model, specs, tp, hosts, algorithm, text, tokens + explore, window, dtype, calibration, seed, out)
    try:
        tuned, document = command.tune_policy(setup, nats, specs, explore, policy)
    except (ValueError, NotImplementedError) as error:
        fail(str(error))
    for line in policy.read_text().split("\n\n")[0].splitlines():
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)
    write_json(json_file, document)
    stdout.print(f"{policy}: {tuned.policy}", markup=False, highlight=False, soft_wrap=True)


def _setup(model, specs, tp, hosts, algorithm, texts, tokens, window, dtype, calibration, seed, out):
    """What both commands measure, checked."""
    from flashcomm.accuracy import command
    from flashcomm.demo import MODEL
    from flashcomm.demo.text import held_out_text

    is_bundled = str(model) == "demo"
    directory = model_directory(MODEL if is_bundled else model, tp)
    check_dtype(dtype)
    need("matplotlib", "plot")
    if hosts and tp % hosts:
        fail(f"--hosts {hosts} with --tp {tp}: give hosts with as many ranks each")
    for spec in specs:
        _check_calibration(spec, calibration, tp)
    _check_algorithm(algorithm, specs, Facts(ranks=tp, hosts=hosts or tp))
    warm_up([*specs, "fp32"])
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


def _check_algorithm(algorithm: str, specs: list[str], ranks: int | Facts):
    from flashcomm import planner

    try:
        for spec in specs:
            if spec != "none":
                planner.choose(0, ranks, flashcomm.codec(spec), algorithm=algorithm)
    except ValueError as error:
        fail(str(error))


def _check_calibration(spec: str, path: Path | None, ranks: int):
    from flashcomm.calibration import Calibration

    codec = flashcomm.codec(spec)
    if path is None and codec.unbound:
        fail(f"--codec {spec} needs --calibration FILE, which 'flashcomm calibrate MODEL' writes")
    if path is not None:
        try:
            calibration = Calibration.load(path)
            for module in calibration.features:
                calibration.bind(codec, module, rank=0, ranks=ranks)
        except ValueError as error:
            fail(str(error))


def _read_text(path: Path) -> str:
    if not path.is_file():
        fail(f"--text {str(path)!r}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(f"--text {str(path)!r} is not UTF-8: {error}")
    if not text.strip():
        fail(f"--text {str(path)!r} is empty: give text like what the model will see")
    return text
