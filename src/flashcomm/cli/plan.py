"""`flashcomm plan`: options, the table, and the picture of ``--plot``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flashcomm.cli.base import Json, check_plot, codec_list, fail, new_table, stdout
from flashcomm.planner import advice, hardware, prefill
from flashcomm.planner.layouts import advise_layout
from flashcomm.report.palette import GREY, GRID, series
from flashcomm.report.rows import write_json
from flashcomm.units import bytes_text


def plan(
    model: Annotated[str, typer.Argument(help="A model's folder, its config.json, or a name such as llama-3-70b.")],
    machine: Annotated[
        str, typer.Option(help="A name such as l40, h100 or cpu-10gbe, or a file of 'flashcomm tune --save'.")
    ],
    tp: Annotated[
        int | None, typer.Option("--tp", help="Ranks, 4 if not given; all tensor parallel in the first table.", min=2)
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 2048,
    batch: Annotated[int, typer.Option(help="Prompts per batch.", min=1)] = 1,
    codecs: Annotated[
        str | None,
        typer.Option(help="Comma-separated codecs to compare with plain; those with kernels there if not given."),
    ] = None,
    ranks_per_host: Annotated[
        int | None, typer.Option(help="Ranks on each host; the machine's if not given.", min=1)
    ] = None,
    rate: Annotated[str | None, typer.Option(help="Rate of each host's link to the others, such as 100gbit.")] = None,
    link: Annotated[str | None, typer.Option(help="Link inside a host: pcie4, pcie4-sys, nvlink4 ...")] = None,
    engine: Annotated[
        str,
        typer.Option(help="Engine that would run prompts in parts: transformers or vllm."),
    ] = "transformers",
    policy: Annotated[
        Path | None, typer.Option(help="Write the policy to this file, for FLASHCOMM_POLICY.", dir_okay=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw time over ranks and over the link's rate to this file.", dir_okay=False)
    ] = None,
    json_file: Json = None,
):
    """Predict the time to first token in each codec, and say what to choose; nothing is started or loaded.

    The second table compares tensor-parallel ranks with pipeline stages, with both, and with one half of the ranks for
    prompts alone.
    """
    if plot:
        check_plot(plot)
    options = {"ranks_per_host": ranks_per_host, "rate": rate, "link": link}
    specs = codec_list(codecs) if codecs else None
    try:
        made = advice.plan(model, machine, ranks=tp, tokens=prompt, rows=batch, codecs=specs, **options)
        overlap, why = advice.overlap_in(engine, made)
        if plot:
            draw(made, machine, plot, link)
    except ValueError as error:
        fail(str(error))
    stdout.print(_table(made))
    for line in [*made.advice.reasons, *why, *made.notes]:
        stdout.print(f"- {line}", highlight=False, soft_wrap=True)
    stdout.print()
    stdout.print(_layout_table(made))
    for line in advise_layout(made.layouts):
        stdout.print(f"- {line}", highlight=False, soft_wrap=True)
    if policy:
        chosen, comments = advice.policy_of(made, overlap)
        policy.parent.mkdir(parents=True, exist_ok=True)
        chosen.save(policy, comments)
        stdout.print(f"{policy}: {chosen}", highlight=False, soft_wrap=True)
    write_json(json_file, {**made.as_dict(), "engine": engine, "overlap": overlap})


def _table(planned: advice.Planned) -> Table:
    cluster = planned.cluster
    hosts = f" on {cluster.group.hosts} hosts" if cluster.group.hosts > 1 else ""
    table = new_table(
        f"{planned.shape.name}, {planned.rows} x {planned.tokens:,} tokens, {cluster.name}{hosts}; predicted, "
        f"compute {_ms(planned.predictions[0].compute_s)} ms"
    )
    for name in ("codec", "algorithm"):
        table.add_column(name, no_wrap=True)
    for name in ("sums\nms", "share", "prefill\nms", "TTFT\nms", "x\nplain"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("in parts", no_wrap=True)
    for name in ("TTFT\nms", "x\nplain", "pays\nfrom"):
        table.add_column(name, justify="right", no_wrap=True)
    plain = planned.predictions[0]
    for one in planned.predictions:
        parts = "+".join(map(str, one.split.sizes)) if len(one.split.sizes) > 1 else "-"
        pays = bytes_text(one.min_bytes) if one.min_bytes else ("" if one is plain else "never")
        table.add_row(
            one.codec, one.algorithm, _ms(one.sums_s), f"{one.share:.0%}", _ms(one.prefill_s), _ms(one.ttft_s),
            f"{plain.ttft_s / one.ttft_s:.2f}", parts, _ms(one.overlapped_s), f"{plain.ttft_s / one.overlapped_s:.2f}",
            pays,
        )  # fmt: skip
    return table


def _layout_table(planned: advice.Planned) -> Table:
    """Layouts over codecs; sums, hops and cache in the same one."""
    table = new_table(f"the same {planned.cluster.group.ranks} ranks in other layouts")
    for name in ("layout", "codec"):
        table.add_column(name, no_wrap=True)
    for name in ("weights\nof a rank", "compute\nms", "sums\nms", "hops or\ncache ms", "TTFT\nms", "batches\na second"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in planned.layouts:
        times = (_ms(seconds) for seconds in (one.compute_s, one.sums_s, one.sent_s, one.ttft_s))
        table.add_row(one.layout, one.codec, f"{one.weights:.0%}", *times, f"{one.batches_s:.3g}")
    return table


def draw(planned: advice.Planned, machine: str, path: Path, link: str | None = None):
    """Draw the time to first token over ranks, and over the rate between hosts.

    Args:
        planned: the plan whose model, prompts and codecs are drawn.
        machine: a name of `flashcomm.planner.hardware.ACCELERATORS`.
        path: a file that ends in .png, .svg or .pdf.
        link: as for `plan`, inside a host.

    Raises:
        ValueError: a machine that was measured, which says nothing about other ranks and rates.
    """
    if Path(machine).suffix == ".json":
        raise ValueError(f"--plot with {machine}: other ranks and rates were not measured. Plot a machine by its name")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    shape, prompts = planned.shape, {"tokens": planned.tokens, "rows": planned.rows}
    specs = [one.codec for one in planned.predictions]
    ranks = [2**n for n in range(1, 11)]
    one_host = hardware.accelerator(machine).ranks_per_host
    # Two hosts at least, so that there is a link between them.
    most = one_host * max(2, -(-planned.cluster.group.ranks // one_host))
    rates = [2**n for n in range(11)]
    lines = [
        (f"{machine}, hosts of {one_host}", "ranks", ranks, [hardware.cluster(machine, n, link=link) for n in ranks]),
        (
            f"{most} x {machine}, {most // one_host} hosts",
            "Gbit/s of each host",
            rates,
            [hardware.cluster(machine, most, rate=f"{n}gbit", link=link) for n in rates],
        ),
    ]
    figure = Figure(figsize=(10.6, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (title, label, values, clusters) in zip(panels, lines, strict=True):
        for number, spec in enumerate(specs):
            times = [prefill.predict(shape, one, spec, **prompts) for one in clusters]
            colour = GREY if spec == "none" else series(number - 1)
            look = {"color": colour, "linewidth": 2 if spec == "none" else 1.3}
            axes.plot(values, [1e3 * one.ttft_s for one in times], label="plain" if spec == "none" else spec, **look)
            axes.plot(values, [1e3 * one.overlapped_s for one in times], linestyle=":", **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted(FuncFormatter(lambda ms, _: f"{ms:,.4g}" if ms < 1000 else f"{ms:,.0f}"))
        axes.tick_params(which="both", labelsize=8)
        axes.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(label)
        axes.grid(True, color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms to the first token, predicted")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, edgecolor="none")
    figure.suptitle(
        f"{shape.name}, {planned.rows} x {planned.tokens:,} tokens; dotted: in parts that take turns",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"
