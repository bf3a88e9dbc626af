"""`flashcomm calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from flashcomm.cli.base import ModelDtype, Ranks, bundled_or, model_directory, model_dtype, read_text, stderr, stdout


def calibrate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model directory, or 'demo' for the bundled model.")],
    tp: Ranks = 2,
    out: Annotated[Path, typer.Option(help="The file to write.", dir_okay=False)] = Path("model.calibration"),
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text like what the model will see; Python source if not given.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to run, in windows of 1,024.", min=1)] = 32768,
    dtype: ModelDtype = "auto",
):
    """Record how far each feature of a model's sums reaches, for codecs such as int4g128+keep64 and int4static."""
    from flashcomm.lab import launch
    from flashcomm.models import calibrate as calibrating

    directory = model_directory(bundled_or(model), tp, least_ranks=2)
    dtype = model_dtype(dtype)
    source = read_text(text) if text else None
    out.parent.mkdir(parents=True, exist_ok=True)
    stderr.print(f"loading the model on {tp} ranks ...", style="dim")
    facts = launch.run(calibrating.rank_main, (directory, out, source, text and text.name, tokens, dtype), ranks=tp)[0]
    stdout.print(
        f"{out}: {facts['modules']} sums, {tp} ranks, {facts['tokens']:,} tokens, {out.stat().st_size:,} bytes",
        highlight=False,
    )
