"""Write results/NAME.md from results/NAME.json, the table of docs/codecs.md from results/codec_cpu.json, and
those of docs/plan.md, docs/choosing.md, docs/accuracy.md, docs/experts.md, docs/training.md, docs/versions.md and
README.md.

`--check` only says whether they agree, with exit status 1 if not.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import published

from flashcomm.codecs import Affine, Block, Codec, Entropy, Hadamard, Keep, Lossless, Peaks, Spike, Static, parse
from flashcomm.codecs.peers import USERS

RESULTS = Path(__file__).parents[1] / "results"
HIDDEN = {"text", "bytes_equal_specification", "skips", "curve"}
SAME = ("op", "backend", "dtype", "link", "repeats")
"""Columns that are said once where all rows agree, in tables of collectives with a link."""


def cell(value: object) -> str:
    """A figure with the digits that it deserves."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        if value == 0 or 0.01 <= abs(value) < 1e5:
            return f"{value:.4g}"
        return f"{value:.2e}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def table(path: Path) -> str:
    """The Markdown of one file of rows."""
    document = json.loads(path.read_text())
    machine, rows = document["machine"], document["rows"]
    same = [name for name in SAME if {"link", name} <= set(rows[0]) and len({row[name] for row in rows}) == 1]
    # Ends of intervals stay in the JSON; a table of a line each is for the eye.
    names = [name for name in rows[0] if name not in (*HIDDEN, *same) and not name.endswith(("_low", "_high"))]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    apart = ("machine", "rows", "prompt", "model", "op")
    facts = {k: v for k, v in document.items() if k not in apart and not isinstance(v, list)}
    facts |= {name: rows[0][name] for name in same}
    lines = [
        f"# {path.stem}",
        "",
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['date']}, commit {machine['commit']};",
        f"{versions}.",
        *([", ".join(f"{k} {v}" for k, v in facts.items()) + "."] if facts else []),
        "",
        "| " + " | ".join(names) + " |",
        "|" + " --- |" * len(names),
        *("| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


CODECS = RESULTS.parent / "docs" / "codecs.md"
BEGIN, END = "<!-- table: make docs -->", "<!-- end of table -->"


def bound(codec: Codec) -> str:
    """The published bound of one encode and decode, in the group's own terms; `codec.step` has it for each value."""
    if isinstance(codec, Affine):
        return f"max abs / {codec.last:.0f}" if codec.symmetric else f"(max - min) / {2 * codec.last:.0f}"
    if isinstance(codec, Block):
        element, scale = codec.parts
        # A power of two may be up to twice of what is needed, an E4M3 an eighth more.
        excess = 2 if scale.power_of_two else {"fp32": 1, "e4m3": 9 / 8}[codec.scale]
        least = codec.limit / excess / 2.0 ** (element.lowest - element.mantissa - 1)
        row = {"e5m0": least * 2.0**30, "e4m3": least * excess * 448 * 2.0**9}.get(codec.scale)
        rest = f", or the row's / {row:.1e}" if row else ""
        return f"abs / {2 ** (element.mantissa + 1)}, or max abs / {least:.4g}{rest}"
    if isinstance(codec, Spike):
        parts = 2**codec.base.bits
        return f"(max - min of the others) / {1.75 * parts:g}, or their middle / {3.5 * parts:g}"
    if isinstance(codec, Hadamard):
        return "the sum of a group's bounds"
    if isinstance(codec, Peaks):
        return "peaks 0; others the sum of 64 half spacings"
    if isinstance(codec, Static):
        return f"reach / {codec.last:.0f}; all that is beyond reach"
    if isinstance(codec, Lossless):
        return "none: every bit is kept"
    if isinstance(codec, Entropy):
        return "half the row's step, the smallest that fits"
    assert isinstance(codec, Keep)
    return bound(codec.base)


USE = {
    "lossless": "the values of bf16 over slow links, where nothing may change",
    "ec8": "real models with outliers, on links that are slow enough for its time",
    "ec6": "the same, 2.7 times fewer bytes",
    "ec5": "the same, after measuring your model",
    "ec4.25": "the bits of int4g128, and a third of the KL that it has with +hadamard",
    "ec3.5": "very slow links, after measuring",
    "nf6+peaks": "models with outliers on links too fast for entropy-coded rows",
    "nf5+peaks": "the same",
    "nf4+peaks": "the same, after measuring your model",
    "nf3+peaks": "very slow links, after measuring",
    "int8g128": "the default",
    "int6g128": "8 bits are too many; with +hadamard on real models",
    "int5g128": "the link is the bottleneck; with +hadamard on real models",
    "int4g128": "3.8 times fewer bytes, with +hadamard and after measuring your model",
    "int4g32": "4 bits on a model that int4g128 hurts",
    "int3g32": "very slow links, one_step, after measuring",
    "int2g32": "not: int2g64+spike has fewer bits and less error",
    "int1g32": "not: its error exceeds the signal; here for completeness",
    "int8sg128": "zero must stay exactly zero",
    "int4sg32": "zero must stay exactly zero",
    "mxfp8_e4m3": "bytes that MX hardware reads; int8g128 is more exact",
    "mxfp8_e5m2": "values of very different magnitude in one group",
    "mxfp6_e2m3": "bytes that MX hardware reads",
    "mxfp6_e3m2": "values of very different magnitude in one group",
    "mxfp4": "bytes that MX hardware reads; the paper's 4.25 bits",
    "nvfp4": "bytes that NVFP4 hardware reads; better than mxfp4 for a quarter of a bit",
    "fp8g128": "8 bits whose error follows each value; int8g128 has less in total on all three",
    "fp5_e2m2g32": "the paper's choice at 5.25 bits; int5g128 is more exact on data without tails",
    "fp3_e1m1g8_e5m0": "under 4 bits on groups without huge values, after measuring",
    "int4g32+spike": "a few huge values per group; without them a fifth or sixth bit is worth more",
    "int3g32+spike": "a few huge values per group; without them int4g32 is worth more",
    "int2g32+spike": "huge values under 4 bits, one_step, after measuring; else fp3_e1m1g8_e5m0",
    "int2g64+spike": "under 3 bits",
    "int4g128+keep64": "models with outlier channels; needs a calibration",
    "int4static+keep64": "the paper's 4.19 bits; needs a calibration that fits the traffic",
    "int8g128+hadamard": "real models with outliers: first choice",
    "int6g128+hadamard": "the same with a quarter less bytes",
    "int4g128+hadamard": "outliers, so real models",
    "fp8g128+taco": "TACO's format",
}


def decibels(sqnr: float | None) -> str:
    """One decimal; "exact" where no bit is lost, which is null in JSON."""
    return "exact" if sqnr is None else f"{sqnr:.1f}"


def codec_table() -> str:
    """The table of docs/codecs.md."""
    document = json.loads((RESULTS / "codec_cpu.json").read_text())
    machine = document["machine"]
    lines = [
        BEGIN,
        "",
        f"{machine['cpu']}, {machine['date']}, commit {machine['commit']}, bf16, 32 MiB, one thread:",
        "`OMP_NUM_THREADS=1 flashcomm bench codec --all --repeats 25` ([rows](../results/codec_cpu.md)).",
        "",
        "| codec | bits | bound | Gaussian | heavy | model | encode | decode | use it for |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in document["rows"]:
        codec = parse(row["codec"])
        lines.append(
            f"| `{codec}` | {row['bits_per_value']:.2f} | {bound(codec)} | {decibels(row['sqnr_db'])} | "
            f"{decibels(row['sqnr_heavy_db'])} | {decibels(row['sqnr_model_db'])} | {row['encode_vs_copy']:.2f}x | "
            f"{row['decode_vs_copy']:.2f}x | {USE.get(row['codec'], '')} |"
        )
    return "\n".join([*lines, "", END])


def codecs_page() -> str:
    """docs/codecs.md with today's table."""
    before, rest = CODECS.read_text().split(BEGIN)
    return before + codec_table() + rest.split(END)[1]


PLAN, CHOOSING, ACCURACY = (RESULTS.parent / "docs" / name for name in ("plan.md", "choosing.md", "accuracy.md"))
README = RESULTS.parent / "README.md"
VERSIONS, TRAINING, EXPERTS = (RESULTS.parent / "docs" / name for name in ("versions.md", "training.md", "experts.md"))


def lab_table() -> str:
    """The rows of results/plan_lab_cpu.json, if they have been measured."""
    path = RESULTS / "plan_lab_cpu.json"
    if not path.exists():
        return "Not measured yet on a quiet machine."
    document = json.loads(path.read_text())
    machine, rows = document["machine"], document["rows"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}, commit {machine['commit']}"
    errors = [abs(row["error"]) for row in rows]
    lines = [
        f"{where}: {len(rows)} prompts, median error {statistics.median(errors):.1%}, worst {max(errors):.1%} "
        "([rows](../results/plan_lab_cpu.md)).",
        "",
        "| ranks | link | tokens | codec | parts | as predicted | predicted | measured | error |",
        "| ---: | --- | ---: | --- | --- | --- | ---: | ---: | ---: |",
        *(
            f"| {row['ranks']} | {row['link']} | {row['tokens']:,} | `{row['codec']}` | {row['parts']} | "
            f"{row['predicted_parts']} | {row['predicted_ms']:.0f} ms | {row['measured_ms']:.0f} ms | "
            f"{row['error']:+.1%} |"
            for row in rows
        ),
    ]
    return "\n".join(lines)


def layouts_table() -> str:
    """The rows of results/plan_layouts_lab_cpu.json, if they have been measured."""
    path = RESULTS / "plan_layouts_lab_cpu.json"
    if not path.exists():
        return "Not measured yet on a quiet machine."
    document = json.loads(path.read_text())
    machine, rows = document["machine"], document["rows"]
    errors = [abs(row["error"]) for row in rows]
    return "\n".join(
        [
            f"The bundled model in vLLM on two hosts of the lab, first token of {rows[0]['tokens']:,} tokens, medians "
            f"of {rows[0]['repeats']}: {len(rows)} settings, median error {statistics.median(errors):.1%}, worst "
            f"{max(errors):.1%}. {machine['cpu']}, {machine['cores']} cores, {machine['date']}, commit "
            f"{machine['commit']} ([rows](../results/plan_layouts_lab_cpu.md)), by `tools/validate_layouts.py`. The "
            "speed of vLLM's compute was measured once, on one rank alone; links and codecs are those of `cpu-1gbe`.",
            "",
            "| link | layout | codec | predicted | measured | error | over plain, predicted | measured |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
            *(
                f"| {row['link']} | {row['layout']} | `{row['codec']}` | {row['predicted_ms']:.0f} ms | "
                f"{row['measured_ms']:.0f} ms | {row['error']:+.1%} | {row['predicted_speedup']:.2f}x | "
                f"{row['speedup']:.2f}x |"
                for row in rows
            ),
        ]
    )


REAL = "accuracy_smollm2_tp3_cpu"
CONTRAST = ("int8g128", "int6g128", "int4g128")
"""Formats that README.md shows beside those on the front of bits and KL: the same without a transform."""


WORTH = 0.5
"""Nats of KL above which no format is recommended."""


def better_than(row: dict) -> Callable[[dict], bool]:
    """Whether another row has less KL and no more bits than this one; a twentieth of a bit does not count."""
    return lambda other: other["kl"] < row["kl"] and other["bits_per_value"] < row["bits_per_value"] + 0.05


def real_rows() -> tuple[dict, list[dict]]:
    """The document of the real model, and its rows without plain, by bits."""
    document = json.loads((RESULTS / f"{REAL}.json").read_text())
    rows = [row for row in document["rows"] if row["codec"] != "none"]
    return document, sorted(rows, key=lambda row: (-row["bits_per_value"], row["kl"]))


def used(codec: str) -> str:
    """The project that sends a format, where it is not ours."""
    return f", as {USERS[codec]} does" if codec in USERS else ""


def real_table() -> str:
    """Every codec on the real model, with intervals."""
    document, rows = real_rows()
    machine, plain = document["machine"], next(row for row in document["rows"] if row["codec"] == "none")

    def with_range(row: dict, name: str, form: str, scale: float = 1) -> str:
        value, low, high = (format(scale * row[name + end], form) for end in ("", "_low", "_high"))
        return f"{value} ({low} to {high})"

    lines = [
        f"{document['ranks']} ranks, {document['dtype']}, `{document['algorithm']}`, {document['tokens']:,} tokens; "
        f"plain has a perplexity of {plain['perplexity']:.1f}. `make real`, {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['date']}, commit {machine['commit']} ([rows](../results/{REAL}.md)).",
        "",
        "| codec | bits | KL | x the floor | perplexity, % | top-1, % | delta log p, 95 % below |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    floor = next(row["kl"] for row in rows if row["codec"] == "fp32")
    for row in rows:
        lines.append(
            f"| `{row['codec']}`{used(row['codec'])} | {row['bits_per_value']:.2f} | {with_range(row, 'kl', '.1e')} | "
            f"{row['kl'] / floor:,.1f} | {with_range(row, 'perplexity_change', '+.1f', 100)} | "
            f"{100 * row['top1']:.1f} | {row['delta_p95']:.2f} |"
        )
    return "\n".join(lines)


def real_short_table() -> str:
    """The codecs that are worth a choice on the real model, and others for contrast."""
    document, rows = real_rows()
    machine = document["machine"]
    best = {row["codec"] for row in rows if row["kl"] < WORTH and not any(map(better_than(row), rows))}
    lines = [
        "| codec | bits per value | KL | perplexity | same first token |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if row["codec"] in (*best, *CONTRAST):
            name = f"**`{row['codec']}`**" if row["codec"] in best and row["codec"] != "fp32" else f"`{row['codec']}`"
            lines.append(
                f"| {name} | {row['bits_per_value']:.2f} | {row['kl']:.1e} | {100 * row['perplexity_change']:+.1f} % | "
                f"{100 * row['top1']:.1f} % |"
            )
    return "\n".join(
        [
            *lines,
            "",
            f"From [{REAL}](results/{REAL}.md): {document['tokens']:,} tokens, `{document['algorithm']}`, "
            f"{document['dtype']}, {machine['cpu']}, {machine['date']}.",
        ]
    )


STAGES = {"SmolLM2-135M-Instruct": "accuracy_smollm2_pp2_cpu", "the bundled model": "accuracy_pp2_cpu"}


def stages_table() -> str:
    """Every codec between two pipeline stages, on both models."""
    documents = {name: json.loads((RESULTS / f"{file}.json").read_text()) for name, file in STAGES.items()}
    found = {name: {row["codec"]: row for row in document["rows"]} for name, document in documents.items()}
    real, bundled = found.values()
    lines = [
        *(
            f"- {name}: {document['stages']} stages, {document['dtype']}, {document['tokens']:,} tokens, "
            f"{document['machine']['cpu']}, {document['machine']['date']}, commit {document['machine']['commit']} "
            f"([rows](../results/{STAGES[name]}.md))."
            for name, document in documents.items()
        ),
        "",
        "| codec | bits | KL | perplexity, % | top-1, % | KL, bundled model | perplexity, % | top-1, % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for codec, row in sorted(real.items(), key=lambda one: (-one[1]["bits_per_value"], one[1]["kl"])):
        if codec != "none":
            figures = [
                f"{one['kl']:.1e} | {100 * one['perplexity_change']:+.2f} | {100 * one['top1']:.1f}"
                for one in (row, bundled[codec])
            ]
            lines.append(f"| `{codec}`{used(codec)} | {row['bits_per_value']:.2f} | {' | '.join(figures)} |")
    return "\n".join(lines)


EXCHANGE = {"SmolLM2-135M-Instruct": "accuracy_smollm2_ep4_cpu", "The bundled model": "accuracy_ep4_cpu"}


def exchange_table() -> str:
    """Every codec of dispatch, of combine and of both, on two models."""
    return "\n\n".join(exchange_of(name, file) for name, file in EXCHANGE.items())


def exchange_of(model: str, file: str) -> str:
    """The same on one model."""
    document = json.loads((RESULTS / f"{file}.json").read_text())
    machine, rows = document["machine"], {row["codec"]: row for row in document["rows"]}
    lines = [
        f"{model}, its MLPs cut into 8 experts, {document['expert_ranks']} ranks, {document['dtype']}, "
        f"{document['tokens']:,} tokens, {machine['cpu']}, {machine['date']}, commit {machine['commit']} "
        f"([rows](../results/{file}.md)):",
        "",
        "| codec | bits | KL of dispatch | of combine | of both | top-1, %, of dispatch | of combine | of both |",
        "| --- |" + " ---: |" * 7,
    ]
    codecs = [codec for codec in rows if codec not in ("none", "fp32") and " " not in codec]
    for codec in sorted(codecs, key=lambda one: (-rows[one]["bits_per_value"], rows[one]["kl"])):
        three = [rows[name] for name in (f"dispatch {codec}", f"combine {codec}", codec)]
        cells = [*(f"{row['kl']:.1e}" for row in three), *(f"{100 * row['top1']:.1f}" for row in three)]
        lines.append(f"| `{codec}` | {rows[codec]['bits_per_value']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def version_rows() -> list[dict]:
    """The rows of results/versions.json, if any environment has been tested."""
    path = RESULTS / "versions.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def versions_table() -> str:
    """Environments and the number of tests that passed in each."""
    names = [name for name in next(iter(version_rows()), {}) if name not in (*HIDDEN, "commit")]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in version_rows()]
    return "\n".join(lines) if names else "No environment has been tested yet."


def skips_table() -> str:
    """Reasons for skipped tests, with the environments and the number of tests in each."""
    found: dict[str, list[str]] = {}
    for row in version_rows():
        for count, reason in row["skips"]:
            found.setdefault(reason, []).append(f"{row['environment']} {count}")
    lines = ["| reason | environments, tests |", "| --- | --- |"]
    lines += [f"| {reason} | {', '.join(where)} |" for reason, where in sorted(found.items())]
    return "\n".join(lines) if found else "None was."


def versions_claim() -> str:
    """The sentence of README.md about versions."""
    tested = [
        f"Python {'.'.join(row['python'].split('.')[:2])} with torch {row['torch'].split('+')[0]} "
        f"({'smoke tests, ' if row['tests'] == 'smoke' else ''}{row['date']})"
        for row in version_rows()
        if not row["failed"]
    ]
    said = f"Tested with {', '.join(tested)}" if tested else "Python 3.10, torch 2.8 and later"
    return f"Linux. {said}: [docs/versions.md](docs/versions.md)."


def training_table() -> str:
    """Losses of each codec beside those of plain with the same seeds, and the spread of plain over its seeds."""
    paths = sorted(RESULTS.glob("training_tp*_cpu.json"))
    if not paths:
        return "Not measured yet on a quiet machine."
    lines = [
        "| ranks | codec | seeds | held-out loss | minus plain's | training loss | minus plain's | same bits |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for path in paths:
        rows = json.loads(path.read_text())["rows"]
        plain = {row["seed"]: row for row in rows if row["codec"] == "none"}
        for codec in dict.fromkeys(row["codec"] for row in rows):
            ours = [row for row in rows if row["codec"] == codec and row["seed"] in plain]
            cells = []
            for name in ("held_out_loss", "training_loss"):
                found = [row[name] for row in ours]
                apart = [row[name] - plain[row["seed"]][name] for row in ours]
                spread = f"spread {statistics.stdev(found):.4f}" if len(found) > 1 else ""
                cells += [f"{statistics.fmean(found):.4f}", spread if codec == "none" else between(apart)]
            name = "plain" if codec == "none" else f"`{codec}`"
            same = "yes" if all(row["same_bits"] for row in ours) else "NO"
            lines.append(f"| {rows[0]['ranks']} | {name} | {len(ours)} | {' | '.join(cells)} | {same} |")
    return "\n".join(lines)


def between(values: list[float]) -> str:
    """The mean, and the least and the largest of several."""
    ends = f" ({min(values):+.4f} to {max(values):+.4f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.4f}{ends}"


def training_steps_table() -> str:
    """The time of a step behind slow links."""
    lines = [
        "| ranks | link | codec | bytes that a rank sends | step | over plain |",
        "| ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for path in sorted(RESULTS.glob("training_steps_*.json")):
        for row in json.loads(path.read_text())["rows"]:
            name = "plain" if row["codec"] == "none" else f"`{row['codec']}`"
            lines.append(
                f"| {row['ranks']} | {row['link']} | {name} | {row['wire_bytes']:,} | {row['p50_ms']:.1f} ms "
                f"({row['p20_ms']:.1f} to {row['p80_ms']:.1f}) | {row['speedup']:.2f}x |"
            )
    return "\n".join(lines)


def with_tables(page: Path, **tables: Callable[[], str]) -> str:
    """A page with today's tables, each between marks of its name."""
    text = page.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name}: make docs -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = "\n\n".join([before + begin, table(), end + rest.split(end)[1]])
    return text


def pages() -> dict[Path, str]:
    """All pages of which parts are made here."""
    tables = {"lab": lab_table, "published": published.published_table, "machines": published.machines_table}
    tables |= {"layouts": layouts_table}
    return {
        CODECS: codecs_page(),
        PLAN: with_tables(PLAN, **tables),
        ACCURACY: with_tables(ACCURACY, real=real_table, stages=stages_table),
        README: with_tables(README, real=real_short_table, versions=versions_claim),
        VERSIONS: with_tables(VERSIONS, versions=versions_table, skips=skips_table),
        TRAINING: with_tables(TRAINING, losses=training_table, steps=training_steps_table),
        EXPERTS: with_tables(EXPERTS, exchange=exchange_table),
        CHOOSING: with_tables(CHOOSING, choices=published.choices_table),
    }


def main() -> int:
    """Write or check every table; returns the exit status."""
    stale = []
    texts = {path.with_suffix(".md"): table(path) for path in sorted(RESULTS.glob("*.json"))}
    for target, text in {**texts, **pages()}.items():
        if "--check" in sys.argv:
            if not target.exists() or target.read_text() != text:
                stale.append(target.name)
        else:
            target.write_text(text)
    if stale:
        print(f"stale: {', '.join(stale)}; run `make docs`")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
