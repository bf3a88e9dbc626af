"""`flashcomm lab`."""

from typing import Annotated

import typer

from flashcomm.cli.base import fail, in_lab, stderr
from flashcomm.lab.launch import INTERRUPTED, Interrupted


def run_in_lab(
    command: Annotated[list[str], typer.Argument(metavar="CMD", help="Program of each rank, with its arguments.")],
    ranks: Annotated[int, typer.Option(help="Processes to start.", min=1)] = 4,
    rate: Annotated[str, typer.Option(help="Rate of each host's link, such as 1gbit; none for unlimited.")] = "1gbit",
    ranks_per_host: Annotated[int, typer.Option(help="Ranks that share a host.", min=1)] = 1,
):
    """Run a command's ranks behind slow links on this machine, with the environment that torchrun would give them."""
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
        # A shell reports signal N as exit status 128 + N.
        raise typer.Exit(code if code > 0 else 128 - code)
