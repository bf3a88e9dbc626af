"""Train a small Llama from scratch, tensor parallel, with each codec in both directions, and compare the losses.

    python tools/training.py curves --tp 2 --json results/training_tp2_cpu.json
    python tools/training.py steps --tp 2 --rate 1gbit --json results/training_steps_lab2_1gbit.json
    python tools/training.py draw results/training_tp2_cpu.json results/training_tp4_cpu.json --out docs/training.png

The model and its training are in `small_llama`.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from small_llama import EVERY, rank_curves, rank_steps

from flashcomm import kernels
from flashcomm.lab import Lab, launch
from flashcomm.report.palette import GREY, GRID, series
from flashcomm.report.rows import document, write_json

CODECS = ("none", "int8g128", "fp8g128+taco", "ec6")


app = typer.Typer(help=(__doc__ or "").split("\n", 1)[0], add_completion=False)


@app.command()
def curves(
    tp: Annotated[int, typer.Option(help="Ranks, which share this machine's memory.")] = 2,
    codecs: Annotated[str, typer.Option(help="Wire formats of both directions.")] = ",".join(CODECS),
    seeds: Annotated[str, typer.Option(help="Seeds of weights and batches.")] = "0,1,2",
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 300,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for the rows; runs that are in it are kept.")
    ] = None,
) -> None:
    """Train with each codec and compare the losses."""
    for codec in codecs.split(","):
        kernels.warm_up(codec)
    launch.run(
        rank_curves, (codecs.split(","), list(map(int, seeds.split(","))), steps, json_file), ranks=tp, timeout_s=600
    )


@app.command()
def steps(
    tp: Annotated[int, typer.Option(help="Ranks, each behind a link of its own.")] = 2,
    rate: Annotated[str, typer.Option(help="Rate of each link.")] = "1gbit",
    codecs: Annotated[str, typer.Option(help="Wire formats of both directions.")] = "none,bf16," + ",".join(CODECS[1:]),
    sequences: Annotated[int, typer.Option(help="Sequences of a step, of 64 bytes.")] = 16,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the rows.")] = None,
) -> None:
    """Time one step with each codec in the lab."""
    for codec in codecs.split(","):
        kernels.warm_up(codec)
    with Lab(ranks=tp, rate=rate) as lab:
        rows = launch.run(rank_steps, (codecs.split(","), rate, repeats, sequences), ranks=tp, lab=lab, timeout_s=600)[
            0
        ]
    for row in rows:
        print(
            f"{row.codec:14} {row.p50_ms:7.1f} ms ({row.p20_ms:.1f} to {row.p80_ms:.1f}) {row.speedup:.2f}x", flush=True
        )
    write_json(json_file, document("training_steps", rows))


@app.command()
def draw(
    files: list[Path], out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("training.png")
) -> None:
    """Draw the curves of files that `curves` wrote, a panel for each number of ranks and a line for each run."""
    figure = Figure(figsize=(2.6 + 4.0 * len(files), 3.8), layout="constrained")
    for axes, path in zip(figure.subplots(1, len(files), sharey=True, squeeze=False)[0], files, strict=True):
        rows = json.loads(path.read_text())["rows"]
        names = [name for name in dict.fromkeys(row["codec"] for row in rows) if name != "none"]
        for row in rows:
            plain = row["codec"] == "none"
            colour = GREY if plain else series(names.index(row["codec"]))
            label = ("plain" if plain else row["codec"]) if row["seed"] == 0 else None
            points = range(EVERY, row["steps"] + 1, EVERY)
            axes.plot(points, row["curve"], color=colour, linewidth=2 if plain else 1, label=label)
        axes.set_title(f"{rows[0]['ranks']} ranks", fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(True, color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("training loss, nats per byte")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, edgecolor="none")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    app()
