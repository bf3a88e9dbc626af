"""What the commands share: where they print, the options of several, and checks that end a command with a sentence."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import flashcomm
from flashcomm.lab import Lab

# Tables keep their shape where there is no terminal to fit.
stdout = Console(width=None if sys.stdout.isatty() else 110)
stderr = Console(stderr=True)

Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.", dir_okay=False)]
Ranks = Annotated[int, typer.Option("--tp", help="Tensor-parallel ranks, all on this machine.", min=1)]
Algorithm = Annotated[str, typer.Option(help="auto, one_step, two_step or hierarchical; see docs/algorithms.md.")]
Calibration = Annotated[
    Path | None, typer.Option(help="File from 'flashcomm calibrate', for codecs that need one.", dir_okay=False)
]
Rate = Annotated[
    str | None, typer.Option(help="Put each host behind a link of this rate, such as 1gbit; see docs/guide-lab.md.")
]
RanksPerHost = Annotated[int, typer.Option(help="Ranks that share a host, with --rate.", min=1)]
Dtype = Annotated[str, typer.Option(help="Type of the weights and activations: bfloat16, float16 or float32.")]


_LAST_WORDS_S = 3.0


def fail(message: str):
    stderr.print(f"[red]error:[/red] {message}", highlight=False, soft_wrap=True)
    if stderr.quiet:
        # Whoever started the ranks ends them all with the first that fails, and only one says why.
        time.sleep(_LAST_WORDS_S)
    raise typer.Exit(2)


def new_table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        show_edge=False,
    )


def figure(value: float | None) -> str:
    """Three digits, but no more than three decimals."""
    if value is None:
        return ""
    return f"{value:.{max(0, min(3, 2 - math.floor(math.log10(value))))}f}" if value > 0 else f"{value:g}"


def codec_list(text: str, plain_first: bool = False) -> list[str]:
    try:
        specs = [str(flashcomm.codec(part.strip())) for part in text.split(",")]
    except ValueError as error:
        fail(str(error))
    return ["none", *(s for s in specs if s != "none")] if plain_first else specs


def model_directory(directory: Path, ranks: int, least_ranks: int = 1) -> Path:
    from flashcomm.bench import model

    need("transformers", "transformers")
    if ranks < least_ranks:
        fail(f"--tp {ranks}: one rank sends nothing. Use --tp {least_ranks} or more")
    try:
        model.check_directory(directory, ranks)
    except ValueError as error:
        fail(str(error))
    return directory


def check_dtype(dtype: str):
    if dtype not in ("bfloat16", "float16", "float32"):
        fail(f"unknown dtype {dtype!r}. Allowed: bfloat16, float16, float32")


def check_plot(path: Path):
    if path.suffix not in (".png", ".svg", ".pdf"):
        fail(f"--plot {str(path)!r}: give a file that ends in .png, .svg or .pdf")
    need("matplotlib", "plot")


def need(module: str, extra: str):
    if find_spec(module) is None:
        fail(f"this command needs {module}: pip install 'flashcomm[{extra}]'")


def warm_up(specs: list[str]):
    """Compile the CPU kernels before the ranks start, so that they find them on disk."""
    from flashcomm import kernels

    with stderr.status("loading the CPU kernels (the first time they are compiled, which takes some seconds)"):
        for spec in specs:
            kernels.warm_up(spec)


@contextmanager
def in_lab(ranks: int, rate: str | None, ranks_per_host: int) -> Iterator[Lab | None]:
    """The lab that the options ask for, if any; what is wrong with them is an error before anything starts."""
    lab = checked_lab(ranks, rate, ranks_per_host)
    if lab is None:
        yield None
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(lab)
        except RuntimeError as error:
            fail(str(error))
        yield lab


def checked_lab(ranks: int, rate: str | None, ranks_per_host: int) -> Lab | None:
    if rate is None and ranks_per_host > 1:
        fail(f"--ranks-per-host {ranks_per_host} is for ranks behind slow links: give --rate too")
    try:
        if rate is not None:
            return Lab(ranks=ranks, rate=None if rate == "none" else rate, ranks_per_host=ranks_per_host)
    except ValueError as error:
        fail(str(error))


def write_json(path: Path | None, document: object):
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
