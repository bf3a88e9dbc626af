"""`flashcomm generate`."""

from pathlib import Path
from typing import Annotated

import typer

from flashcomm.cli.base import (
    DEMO_PROMPT,
    Algorithm,
    Calibration,
    Json,
    ModelDtype,
    Ranks,
    bundled_or,
    check_algorithm,
    check_calibration,
    codec_list,
    fail,
    model_directory,
    model_dtype,
    stderr,
    warm_up,
)
from flashcomm.report.rows import write_json


def generate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model directory, or 'demo' for the bundled model.")],
    tp: Ranks = 2,
    codec: Annotated[str, typer.Option(help="Wire format of the all-reduces; none for plain.")] = "int8g128",
    algorithm: Algorithm = "auto",
    prompt: Annotated[str, typer.Option(help="What the model continues.")] = DEMO_PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 64,
    calibration: Calibration = None,
    dtype: ModelDtype = "auto",
    json_file: Json = None,
):
    """Generate text with a model over several ranks, its all-reduces compressed."""
    from flashcomm.lab import launch
    from flashcomm.models import generate as generating

    directory = model_directory(bundled_or(model), tp)
    if "," in codec:
        fail(f"--codec {codec!r}: give one codec")
    spec = codec_list(codec)[0]
    dtype = model_dtype(dtype)
    check_calibration(spec, calibration, tp)
    warm_up([spec])
    check_algorithm(algorithm, [spec], tp)
    stderr.print(f"loading the model on {tp} rank(s) ...", style="dim")
    arguments = (directory, spec, algorithm, prompt, max_new_tokens, dtype, True, calibration)
    result = launch.run(generating.rank_main, arguments, ranks=tp)[0]
    stats = result["stats"]
    saved = f", {stats['wire_bytes']:,} bytes sent instead of {stats['plain_bytes']:,}" if tp > 1 else ""
    rate = f", {result['tokens_per_second']:.1f} tokens/s" if result["tokens_per_second"] else ""
    said = f"{spec}, {tp} ranks: first token after {result['ttft_ms']:.0f} ms{rate}{saved} by rank 0"
    stderr.print(said, style="dim")
    for reason, count in stats["plain"].items():
        stderr.print(f"{count} of the all-reduces ran uncompressed: {reason}", style="dim")
    write_json(json_file, result)
