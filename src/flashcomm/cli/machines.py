"""The commands about machines: plan, tune, lab, env."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import flashcomm
from flashcomm.cli.base import (
    Json,
    RanksPerHost,
    Rate,
    check_plot,
    codec_list,
    fail,
    in_lab,
    need,
    new_table,
    stderr,
    stdout,
    warm_up,
    write_json,
)
from flashcomm.planner import Facts
from flashcomm.planner.prefill import CODECS as PLAN_CODECS


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
        check_plot(plot)
    options = {"ranks_per_host": ranks_per_host, "rate": rate, "link": link}
    try:
        made = planning.plan(model, machine, ranks=tp, tokens=prompt, rows=batch, codecs=codec_list(codecs), **options)
        if plot:
            planning.draw(made, machine, plot, link)
    except ValueError as error:
        fail(str(error))
    stdout.print(planning.table_of(made, new_table))
    for line in [*made.advice.reasons, *made.notes]:
        stdout.print(f"- {line}", highlight=False, soft_wrap=True)
    if policy:
        chosen, comments = planning.policy_of(made)
        policy.parent.mkdir(parents=True, exist_ok=True)
        chosen.save(policy, comments)
        stdout.print(f"{policy}: {chosen}", highlight=False, soft_wrap=True)
    write_json(json_file, made.as_dict())


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
        need("transformers", "transformers")
        if save.suffix != ".json":
            fail(f"--save {str(save)!r}: give a file that ends in .json")
    measure = compute.measure if save else tuning_bench.measure
    warm_up([*tuning_bench.CODECS, "bf16"])
    if launch.joined():
        world = os.environ["WORLD_SIZE"]
        if int(world) < 2 or rate or str(tp or world) != world:
            fail(f"this is one rank of {world} already: start 2 or more, and leave --tp and --rate out")
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
    target = tuning.save(group.costs)
    _print_tuning(group)
    stdout.print(f"Kept in {target}; rank 0 reads it when ranks meet.", highlight=False, soft_wrap=True)
    write_json(json_file, {"machine": group.costs.as_dict(), "ranks": group.ranks, "hosts": group.hosts})


def _print_tuning(group: Facts):
    from flashcomm import planner
    from flashcomm.bench.collectives import readable

    costs = group.costs
    assert costs is not None
    sizes = [point.message_bytes for point in costs.plain.points]
    table = new_table(f"{costs.name}: milliseconds by message, at 4 and at 8 bits")
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
    stdout.print(table)
    table = new_table("what algorithm='auto' takes")
    table.add_column("message", justify="right", no_wrap=True)
    specs = ("int8g128", "int4g128")
    for spec in specs:
        table.add_column(spec, no_wrap=True)
    for size in planner.SIZES[2:17:2]:
        plans = [planner.choose(size, group, flashcomm.codec(spec)) for spec in specs]
        names = [f"{p.algorithm} in {p.pieces} pieces" if p.pieces > 1 else p.algorithm for p in plans]
        sent = [f" of {p.codec}" if p.declined and p.algorithm != "plain" else "" for p in plans]
        table.add_row(readable(size), *(name + what for name, what in zip(names, sent, strict=True)))
    stdout.print(table)


def run_in_lab(
    command: Annotated[list[str], typer.Argument(metavar="CMD", help="What each rank runs, with its arguments.")],
    ranks: Annotated[int, typer.Option(help="Processes to start.", min=1)] = 4,
    rate: Annotated[str, typer.Option(help="Of each host's link, such as 1gbit, or none for unlimited.")] = "1gbit",
    ranks_per_host: Annotated[int, typer.Option(help="Ranks that share a host.", min=1)] = 1,
):
    """Run a command's ranks behind slow links on this machine, with the environment that torchrun would give them."""
    from flashcomm.bench.launch import INTERRUPTED, Interrupted

    with in_lab(ranks, rate, ranks_per_host) as lab:
        assert lab is not None
        try:
            codes = lab.run(command)
        except ValueError as error:
            fail(str(error))
        except KeyboardInterrupt:
            raise Interrupted(INTERRUPTED) from None
    if lab.failed_rank is not None:
        code = codes[lab.failed_rank]
        stderr.print(f"rank {lab.failed_rank} ended with {code}; all ranks have been stopped", highlight=False)
        # As a shell says that a signal ended a program.
        raise typer.Exit(code if code > 0 else 128 - code)


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
    stdout.print(table, highlight=False)
    document = {
        "flashcomm": flashcomm.__version__,
        **facts,
        "paths": {n: {"state": s, "why": w} for n, (s, w) in paths.items()},
        "tuning": {"file": str(tuning.path()), "groups": groups},
    }
    write_json(json_file, document)


def _presence(module: str, remedy: str) -> tuple[str, str]:
    return ("on", "") if find_spec(module) else ("off", remedy)


def _unless(why: str | None) -> tuple[str, str]:
    return ("off", why) if why else ("on", "")
