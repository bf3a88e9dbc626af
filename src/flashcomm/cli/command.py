"""The command and its subcommands, in the order of ``--help``."""

import sys
from typing import Annotated

import typer

import flashcomm
from flashcomm.cli import (
    accuracy,
    bench_attention,
    bench_codec,
    bench_collective,
    bench_gpu,
    bench_kv,
    bench_ttft,
    calibrate,
    demo,
    env,
    generate,
    lab,
    plan,
    tune,
    tune_policy,
)
from flashcomm.cli.base import print_error, stderr
from flashcomm.errors import SettingError
from flashcomm.lab.launch import Interrupted, RankError

app = typer.Typer(
    help="Tensor-parallel LLM inference with activations in 2 to 8 bits on the wire.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure on this machine, always against plain.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

app.command()(demo.demo)
app.command()(generate.generate)
app.command()(calibrate.calibrate)
app.command("accuracy")(accuracy.measure_accuracy)
app.command()(tune_policy.tune_policy)
app.command()(plan.plan)
app.command()(tune.tune)
# Options that follow CMD are CMD's own.
app.command("lab", context_settings={"allow_interspersed_args": False})(lab.run_in_lab)
app.command()(env.env)
bench_app.command("codec")(bench_codec.bench_codec)
bench_app.command("gpu")(bench_gpu.bench_gpu)
for op in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send"):
    bench_app.command(op)(bench_collective.bench_collective(op))
bench_app.command("attention")(bench_attention.bench_attention)
bench_app.command("ttft")(bench_ttft.bench_ttft)
bench_app.command("kv")(bench_kv.bench_kv)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
):
    if version:
        typer.echo(flashcomm.__version__)
        raise typer.Exit


def main():
    """Run the command; a failed rank, a wrong setting or Ctrl-C becomes a sentence and an exit status."""
    try:
        app()
    except RankError as error:
        # The other ranks of a launcher may never have come.
        stderr.quiet = False
        if isinstance(error, Interrupted):
            stderr.print(str(error), highlight=False, soft_wrap=True)
            sys.exit(130)
        print_error(str(error))
        sys.exit(1)
    except SettingError as error:
        print_error(str(error))
        sys.exit(2)
