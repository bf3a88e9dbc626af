"""`flashcomm tune`."""

import os
from pathlib import Path
from typing import Annotated

import typer

import flashcomm
from flashcomm import planner
from flashcomm.cli.base import (
    Json,
    RanksPerHost,
    Rate,
    fail,
    in_lab,
    joined,
    need,
    new_table,
    stderr,
    stdout,
    warm_up,
)
from flashcomm.planner import Facts
from flashcomm.report.rows import write_json
from flashcomm.units import bytes_text


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

    Ranks that torchrun or `flashcomm lab` has started are measured; otherwise ranks are started here.
    """
    from flashcomm import measured
    from flashcomm.bench import compute
    from flashcomm.bench import tune as tuning_bench
    from flashcomm.lab import launch

    is_rank = joined()
    if save:
        need("transformers", "transformers")
        if save.suffix != ".json":
            fail(f"--save {str(save)!r}: give a file that ends in .json")
    measure = compute.measure if save else tuning_bench.measure
    warm_up([*tuning_bench.CODECS, "bf16", "lossless"])
    if is_rank:
        world = os.environ["WORLD_SIZE"]
        if rate or str(tp or world) != world:
            fail(f"this is one rank of {world} already: leave --tp and --rate out. {launch.LEFT_OVER}")
        group = launch.join(measure, (repeats,))
        if os.environ["RANK"] != "0":
            return
    else:
        ranks = tp or 2
        with in_lab(ranks, rate, ranks_per_host) as lab, stderr.status(f"measuring {ranks} ranks"):
            group = launch.run(measure, (repeats,), ranks=ranks, lab=lab)[0]
    assert group is not None
    if save:
        write_json(save, group.as_dict())
        group = group.group
    assert group.costs is not None
    target = measured.save(group.costs)
    _print_tuning(group)
    stdout.print(f"Kept in {target}; rank 0 reads it when ranks meet.", highlight=False, soft_wrap=True)
    write_json(json_file, {"machine": group.costs.as_dict(), "ranks": group.ranks, "hosts": group.hosts})


def _print_tuning(group: Facts):
    costs = group.costs
    assert costs is not None
    sizes = [point.message_bytes for point in costs.plain.points]
    table = new_table(f"{costs.name}: milliseconds by message, at 4 and at 8 bits")
    table.add_column("way", no_wrap=True)
    for size in sizes:
        table.add_column(bytes_text(size), justify="right", no_wrap=True)
    ways = [("plain", costs.plain, 16.0, 16.0)]
    ways += [(f"{way}", cost, 4.25, 8.25) for way, cost in costs.compressed.items()]
    ways += [(f"{way}, bf16", cost, 16.0, 16.0) for way, cost in costs.uncompressed.items()]
    ways += [(f"{way}, lossless", cost, 16.0, 16.0) for way, cost in costs.lossless.items()]
    for way, cost, few, many in ways:
        measured = {point.message_bytes for point in cost.points}
        times = [sorted({f"{1e3 * cost.seconds(size, bits):.3g}" for bits in (few, many)}, key=float) for size in sizes]
        table.add_row(way, *("\n".join(t) if size in measured else "" for size, t in zip(sizes, times, strict=True)))
    stdout.print(table)
    table = new_table("what algorithm='auto' takes")
    table.add_column("message", justify="right", no_wrap=True)
    specs = ("bf16", "int8g128", "int4g128")
    for spec in specs:
        table.add_column(spec, no_wrap=True)
    for size in planner.SIZES[2:17:2]:
        plans = [planner.choose(size, group, flashcomm.codec(spec)) for spec in specs]
        names = [f"{p.algorithm} in {p.pieces} pieces" if p.pieces > 1 else p.algorithm for p in plans]
        changed = [p.algorithm != "plain" and (p.declined or "lossless" in str(p.codec)) for p in plans]
        sent = [f" of {p.codec}" if other else "" for p, other in zip(plans, changed, strict=True)]
        table.add_row(bytes_text(size), *(name + what for name, what in zip(names, sent, strict=True)))
    stdout.print(table)
