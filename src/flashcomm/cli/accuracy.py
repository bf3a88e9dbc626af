"""`flashcomm accuracy`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashcomm.cli.base import Algorithm, Calibration, Dtype, Json, codec_list, fail, new_table, stdout
from flashcomm.cli.simulation import Hosts, Model, Seed, SimulatedRanks, Texts, Window, setup
from flashcomm.report.rows import write_json

if TYPE_CHECKING:
    from flashcomm.accuracy.metrics import AccuracyRow
    from flashcomm.accuracy.setup import Setup
    from flashcomm.policy import Policy
    from flashcomm.report.progress import Step


def measure_accuracy(
    model: Model = Path("demo"),
    tp: SimulatedRanks = 8,
    codecs: Annotated[str, typer.Option(help="Comma-separated codecs; plain and the floor are always measured.")] = (
        "ec8,int8g128+hadamard,int8g128,fp8g128,ec6,int6g128+hadamard,int6g128,ec5,int5g128+hadamard,"
        "ec4.25,int4g128+hadamard,nvfp4,int4g128,mxfp4,ec3.5"
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
    """Measure what each codec costs this model over N ranks, simulated bit for bit in one process."""
    from flashcomm.policy import Policy

    specs = codec_list(codecs)
    try:
        policies = {path.stem: Policy.load(path) for path in policy or []}
    except ValueError as error:
        fail(str(error))
    given = setup(
        model, specs, text, tp=tp, hosts=hosts, algorithm=algorithm, tokens=tokens, window=window, dtype=dtype,
        calibration=calibration, seed=seed, out=out,
    )  # fmt: skip
    from flashcomm.accuracy import report
    from flashcomm.accuracy.metrics import FLOOR

    try:
        variants = {name: Policy(codec=name, algorithm=algorithm) for name in (FLOOR, *specs)} | policies
        variants.pop("none", None)
        rows, document = given.keep(lambda step: _measure(given, variants, step))
    except (ValueError, NotImplementedError) as error:
        fail(str(error))
    table = new_table(f"{given.model} as {tp} ranks, {dtype}, {document['tokens']:,} tokens")
    for place, name in enumerate(report.HEAD):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*report.cells(row, intervals=False))
    stdout.print(table)
    write_json(json_file, document)
    stdout.print(
        f"\nReport with confidence intervals, plots, by sum and by position: {out / 'report.html'}", highlight=False
    )


def _measure(given: "Setup", variants: "dict[str, Policy]", step: "Step") -> "tuple[list[AccuracyRow], dict]":
    """Measure the policies and write the reports; returns the rows and the document of ``report.json``."""
    from flashcomm.accuracy import measuring, metrics, report

    start = time.perf_counter()
    model, texts, origin = given.load()
    found = measuring.measure(
        model,
        given.ranks,
        variants,
        texts,
        hosts=given.hosts,
        calibration=given.calibrated(),
        folder=given.out / "windows",
        origin=origin,
        progress=step("accuracy", len(texts) * (len(variants) + 1)),
    )
    rows = metrics.summarise(found.names, found.bits, found.figures, seed=given.seed)
    facts = given.facts(len(texts) * given.window, time.perf_counter() - start)
    document = report.document(rows, found, facts)
    (given.out / "report.md").write_text(report.markdown(rows, found, facts))
    (given.out / "report.html").write_text(report.page(rows, found, facts))
    write_json(given.out / "report.json", document)
    return rows, document
