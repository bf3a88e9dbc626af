"""The `flashcomm` command: every subcommand checks its input before it starts a process."""

import sys
from typing import Annotated

import typer

import flashcomm
from flashcomm.cli import benches, machines, models
from flashcomm.cli.base import stderr

app = typer.Typer(
    help="Tensor-parallel LLM inference with activations in 2 to 8 bits on the wire.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure on this machine, always against plain.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

app.command()(models.demo)
app.command()(models.generate)
app.command()(models.calibrate)
app.command("accuracy")(models.measure_accuracy)
app.command()(models.tune_policy)
app.command()(machines.plan)
app.command()(machines.tune)
# What follows the command to run is its own.
app.command("lab", context_settings={"allow_interspersed_args": False})(machines.run_in_lab)
app.command()(machines.env)
bench_app.command("codec")(benches.bench_codec)
bench_app.command("gpu")(benches.bench_gpu)
for op in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all"):
    bench_app.command(op)(benches.bench_collective(op))
bench_app.command("ttft")(benches.bench_ttft)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
):
    if version:
        typer.echo(flashcomm.__version__)
        raise typer.Exit


def main():
    """Entry point: turns a failed rank or Ctrl-C into a sentence and an exit status."""
    from flashcomm.lab.launch import Interrupted, RankError

    try:
        app()
    except RankError as error:
        interrupted = isinstance(error, Interrupted)
        stderr.print(str(error) if interrupted else f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(130 if interrupted else 1)
