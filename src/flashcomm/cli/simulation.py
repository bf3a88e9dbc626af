"""Options that `flashcomm accuracy` and `flashcomm tune-policy` have in common, and their checks."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashcomm.cli.base import (
    bundled_or,
    check_algorithm,
    check_calibration,
    fail,
    model_directory,
    model_dtype,
    need,
    read_text,
    warm_up,
)
from flashcomm.planner import Facts

if TYPE_CHECKING:
    from flashcomm.accuracy.setup import Setup

Model = Annotated[
    Path, typer.Argument(help="A Hugging Face model directory; the bundled model if not given, or by the name 'demo'.")
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(help="UTF-8 text like what the model will see, again for each file.", dir_okay=False),
]
SimulatedRanks = Annotated[int, typer.Option("--tp", help="Ranks to simulate, in one process.", min=2)]
Hosts = Annotated[int, typer.Option(help="Hosts with equally many ranks, for --algorithm hierarchical.", min=0)]
Window = Annotated[int, typer.Option(help="Tokens per window; each token is judged by its predecessors in it.", min=16)]
Seed = Annotated[int, typer.Option(help="Random seed for the bootstrap and the choice of text to explore.")]


def setup(
    model: Path,
    specs: list[str],
    texts: list[Path] | None,
    *,
    tp: int,
    pp: int = 1,
    ep: int = 1,
    hosts: int,
    algorithm: str,
    tokens: int,
    window: int,
    dtype: str,
    calibration: Path | None,
    seed: int,
    out: Path,
) -> "Setup":
    """The model, text and ranks that the options name, checked."""
    need("transformers", "transformers")
    need("matplotlib", "plot")
    from flashcomm.accuracy.setup import Setup

    directory = model_directory(bundled_or(model), tp)
    dtype = model_dtype(dtype)
    if hosts and tp % hosts:
        fail(f"--hosts {hosts} with --tp {tp}: give hosts with as many ranks each")
    for spec in specs:
        check_calibration(spec, calibration, tp)
    check_algorithm(algorithm, specs, Facts(ranks=tp, hosts=hosts or tp))
    warm_up([*specs, "fp32"])
    given = {"texts": [*map(read_text, texts)], "text": ", ".join(path.name for path in texts)} if texts else {}
    return Setup(
        directory=directory,
        model="the bundled model" if str(model) == "demo" else model.resolve().name,
        ranks=tp,
        stages=pp,
        expert_ranks=ep,
        hosts=hosts,
        algorithm=algorithm,
        tokens=tokens,
        window=window,
        dtype=dtype,
        seed=seed,
        calibration=calibration,
        out=out,
        **given,
    )
