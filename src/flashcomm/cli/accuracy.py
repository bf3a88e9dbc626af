"""`flashcomm accuracy`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashcomm.cli.base import Algorithm, Calibration, Json, ModelDtype, codec_list, fail, new_table, stdout
from flashcomm.cli.simulation import Hosts, Model, Seed, Texts, Window, setup
from flashcomm.report.rows import write_json

if TYPE_CHECKING:
    from flashcomm.accuracy.metrics import AccuracyRow
    from flashcomm.accuracy.setup import Setup
    from flashcomm.policy import Policy
    from flashcomm.report.progress import Step


_OF_SUMS = ("tp", "pp", "ep", "policy", "algorithm", "hosts", "calibration")
"""Options of what ranks and stages send, which caches are not."""
_NOT_OF_EXPERTS = ("tp", "pp", "algorithm", "hosts", "calibration")
"""Options that ranks which share out the experts have no use for."""
EXPERT_CODECS = "ec8,int8g128,fp8g128,ec6,int6g128+hadamard,ec4.25,nvfp4,int4g128+hadamard"
CACHE_CODECS = "lossless,ec8,ec6,ec5,ec4,ec3.5,int8g64,int4g64+hadamard,int4g64"


def measure_accuracy(
    context: typer.Context,
    model: Model = Path("demo"),
    tp: Annotated[
        int | None,
        typer.Option("--tp", help="Ranks to simulate, in one process; 8, or 1 with --pp, if not given.", min=1),
    ] = None,
    pp: Annotated[
        int,
        typer.Option(
            help="Pipeline stages to simulate, each of --tp ranks: the codecs are then those of the hops between them, "
            "and sums are plain. A policy's are its own.",
            min=1,
        ),
    ] = 1,
    ep: Annotated[
        int,
        typer.Option(
            help="Ranks to simulate that share out the experts: the codecs are then those of dispatch, of combine, and "
            "of both. A policy's are its own.",
            min=1,
        ),
    ] = 1,
    caches: Annotated[
        bool, typer.Option("--kv", help="Measure codecs of key/value caches, from prefill to decode, not of sums.")
    ] = False,
    codecs: Annotated[str, typer.Option(help="Comma-separated codecs, besides plain and the floor of sums.")] = (
        "ec8,int8g128+hadamard,int8g128,fp8g128,ec6,int6g128+hadamard,int6g128,ec5,int5g128+hadamard,"
        "ec4.25,int4g128+hadamard,nvfp4,int4g128,mxfp4,ec3.5"
    ),
    policy: Annotated[list[Path] | None, typer.Option(help="A policy to measure too; again for each.")] = None,
    algorithm: Algorithm = "auto",
    hosts: Hosts = 0,
    text: Texts = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to measure on.", min=32)] = 20480,
    window: Window = 1024,
    dtype: ModelDtype = "auto",
    calibration: Calibration = None,
    new_tokens: Annotated[
        int, typer.Option(help="With --kv: tokens of a window behind the prompt, and of a greedy text.", min=2)
    ] = 32,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.html, .md and .json.", file_okay=False)] = Path(
        "flashcomm-accuracy"
    ),
    json_file: Json = None,
):
    """Measure what each codec costs this model over N ranks, pipeline stages or shares of experts, in one process."""
    given_options = {name for name in context.params if _is_given(context, name)}
    if caches:
        if wrong := [f"--{name}" for name in _OF_SUMS if name in given_options]:
            fail(f"--kv measures caches, which no rank sums: leave out {', '.join(wrong)}")
        specs = codec_list(codecs if "codecs" in given_options else CACHE_CODECS)
        # Engines keep caches in bf16 whatever the CPU is.
        given = setup(
            model, specs, text, tp=1, hosts=0, algorithm="auto", tokens=tokens, window=window,
            dtype="bfloat16" if dtype == "auto" else dtype, calibration=None, seed=seed, out=out,
        )  # fmt: skip
        _measure_caches(given, specs, new_tokens, json_file)
        return
    if "new_tokens" in given_options:
        fail("--new-tokens is for --kv")
    if ep > 1 and (wrong := [f"--{name}" for name in _NOT_OF_EXPERTS if name in given_options]):
        fail(f"--ep measures ranks that hold all but the experts whole: leave out {', '.join(wrong)}")
    specs = codec_list(codecs if ep == 1 or "codecs" in given_options else EXPERT_CODECS)
    ranks = tp or (8 if pp == ep == 1 else 1)
    if "ep" in given_options and ep == 1:
        fail("--ep 1: one rank exchanges nothing. Give --ep 2 or more")
    if ranks == pp == ep == 1:
        fail("--tp 1: one rank sends nothing. Give --tp 2 or more, or --pp 2 or more")
    from flashcomm.policy import Hops, Policy

    try:
        policies = {path.stem: Policy.load(path) for path in policy or []}
    except ValueError as error:
        fail(str(error))
    given = setup(
        model, specs, text, tp=ranks, pp=pp, ep=ep, hosts=hosts, algorithm=algorithm, tokens=tokens, window=window,
        dtype=dtype, calibration=calibration, seed=seed, out=out,
    )  # fmt: skip
    from flashcomm.accuracy import report
    from flashcomm.accuracy.metrics import FLOOR
    from flashcomm.integrations import experts

    try:
        sums = [FLOOR, *specs] if pp == ep == 1 else [FLOOR] if ranks > 1 else []
        variants = {name: Policy(codec=name, algorithm=algorithm) for name in sums}
        if ep > 1:
            variants = {FLOOR: Policy(codec="none", hops=Hops(combine=FLOOR))}
            for name in specs:
                for label, kinds in (("dispatch ", ["dispatch"]), ("combine ", ["combine"]), ("", experts.KINDS)):
                    hops = Hops(**dict.fromkeys(kinds, name))
                    variants.setdefault(label + name, Policy(codec="none", hops=hops))
        elif pp > 1:
            variants |= {name: Policy(codec="none", hops=Hops(pp=name)) for name in specs}
        variants |= policies
        variants.pop("none", None)
        rows, document = given.keep(lambda step: _measure(given, variants, step))
    except (ValueError, NotImplementedError) as error:
        fail(str(error))
    table = new_table(f"{given.model} as {report.whom(document)}, {given.dtype}, {document['tokens']:,} tokens")
    for place, name in enumerate(report.HEAD):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*report.cells(row, intervals=False))
    stdout.print(table)
    write_json(json_file, document)
    stdout.print(
        f"\nReport with confidence intervals, plots, by sum and by position: {out / 'report.html'}", highlight=False
    )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _measure_caches(given: "Setup", specs: list[str], new_tokens: int, json_file: Path | None):
    """Measure codecs of caches, print their table and write it to ``report.json``."""
    from flashcomm.accuracy import caches

    start = time.perf_counter()

    def measure(step: "Step"):
        model, texts, origin = given.load()
        passes = -(-len(texts) // caches.BATCH) * len({"none", *specs})
        found = caches.measure_caches(
            model, specs, texts, new_tokens=new_tokens, folder=given.out / "caches", origin=origin,
            progress=step("accuracy", passes), seed=given.seed,
        )  # fmt: skip
        return found, len(texts)

    try:
        rows, count = given.keep(measure)
    except (ValueError, NotImplementedError) as error:
        fail(str(error))
    table = new_table(
        f"Caches of {given.model}, {given.dtype}: {count} prompts of {given.window - new_tokens:,} tokens, and "
        f"{new_tokens} tokens judged on each"
    )
    head = ("codec", "bits", "perplexity", "KL", "top-1", "greedy texts kept", "greedy tokens kept")
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row.codec, f"{row.bits_per_value:.2f}", f"{100 * row.perplexity_change.value:+.2f} %",
            f"{row.kl.value:.2e}", f"{100 * row.top1.value:.2f} %", f"{row.texts_kept} of {row.texts}",
            f"{100 * row.tokens_kept:.1f} %",
        )  # fmt: skip
    stdout.print(table)
    facts = given.facts(count * given.window, time.perf_counter() - start)
    of_sums = ("ranks", "hosts", "algorithm")
    document = {
        "op": "accuracy_kv",
        **{name: fact for name, fact in facts.items() if name not in of_sums},
        "new_tokens": new_tokens,
        "rows": [row.as_dict() for row in rows],
    }
    write_json(given.out / "report.json", document)
    write_json(json_file, document)


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
        stages=given.stages,
        expert_ranks=given.expert_ranks,
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
