"""`flashcomm bench all_reduce` and the other verbs."""

import os
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flashcomm.cli.base import (
    Json,
    RanksPerHost,
    Rate,
    check_dtype,
    check_plot,
    checked_lab,
    codec_list,
    fail,
    in_lab,
    joined,
    new_table,
    number_of_ranks,
    stderr,
    stdout,
    warm_up,
    write_rows,
)
from flashcomm.planner import ALGORITHMS
from flashcomm.report.rows import figure
from flashcomm.units import bytes_text, parse_bytes


def bench_collective(op: str):
    """Make the command that measures `op`."""

    def command(
        tp: Annotated[
            str | None,
            typer.Option(help=f"Comma-separated world sizes, {_worlds(op)} if not given; under torchrun its own."),
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

        # Every rank checks its input.
        is_rank = joined()
        specs = codec_list(codecs)
        byte_sizes = [_message_bytes(text) for text in sizes.split(",")]
        chosen = algorithms.split(",")
        for name in chosen:
            if name not in _algorithms(op):
                fail(f"unknown algorithm {name!r}. Allowed: {', '.join(_algorithms(op))} (plain is always measured)")
        check_dtype(dtype)
        if plot:
            check_plot(plot)
        if mpi and (rate or is_rank):
            fail("--mpi compares ranks of this machine without a slow link: leave out --rate, and torchrun")
        if mpi and (reason := open_mpi.unavailable()):
            fail(reason)
        worlds = [number_of_ranks(text) for text in (tp or _worlds(op)).split(",")]
        if op == "send" and (worlds != [2] or os.environ.get("WORLD_SIZE", "2") != "2"):
            fail("bench send measures a message between two ranks: leave --tp out, and start two")
        if op == "send" and mpi:
            fail("--mpi has no send to compare with: leave it out")
        for ranks in worlds:
            checked_lab(ranks, rate, ranks_per_host)
        warm_up(specs)
        if is_rank:
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
        write_rows(json_file, op, rows)

    own = "torch's own, from one host to another" if op == "send" else "the backend's own"
    command.__doc__ = f"Measure compressed {op} against {own}, taking turns; every answer is checked first."
    return command


def _worlds(op: str) -> str:
    return "2" if op == "send" else "2,4"


def _algorithms(op: str) -> tuple[str, ...]:
    if op == "all_reduce":
        return tuple(name for name in ALGORITHMS if name != "plain")
    return ("auto",) if op == "send" else ("auto", "one_step")


def _join(tp: str | None, rate: str | None, arguments: tuple) -> list | None:
    """Measure as one of the ranks that torchrun or `flashcomm lab` started; rows on rank 0, None on the others."""
    from flashcomm.bench import collectives
    from flashcomm.lab import launch

    world = os.environ["WORLD_SIZE"]
    if tp not in (None, world):
        fail(f"--tp {tp} on a rank of {world}: leave --tp out. {launch.LEFT_OVER}")
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
    # A narrow terminal may break lines, but must not cut figures.
    Console(width=max(stdout.width, 130), markup=False).print(table)
    others = ["mpi"] if any(row.backend != first.backend for row in rows) else []
    for note in (first.ceiling, *others):
        stdout.print(_NOTES[note], style="dim", highlight=False, soft_wrap=True)


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def _message_bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        fail(str(error))
