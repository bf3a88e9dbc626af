"""`flashcomm bench gpu`."""

import os
import re
from dataclasses import asdict
from typing import Annotated

import typer

import flashcomm
from flashcomm.cli.base import Json, codec_list, fail, need, new_table, number_of_ranks, stderr, stdout, write_rows


def bench_gpu(
    codecs: Annotated[str, typer.Option(help="Comma-separated codecs.")] = ",".join(
        ("int8g128", "int4g128", "int4g32", "mxfp4", "nvfp4", "fp8g128", "int2g32+spike")
    ),
    targets: Annotated[
        str | None, typer.Option(help="Compile for these instead of measuring: sm_80, sm_90, gfx942; no GPU is needed.")
    ] = None,
    tp: Annotated[
        str | None,
        typer.Option(help="Measure all-reduces over these world sizes, such as 2,4,8, which share the GPUs."),
    ] = None,
    mib: Annotated[
        int | None, typer.Option(help="Size of the tensor in MiB; 256 if not given, with --tp 16.", min=1)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 15,
    json_file: Json = None,
):
    """Measure the Triton kernels against a copy; without a GPU, compile them: registers, spills, bytes, the floor."""
    import torch

    from flashcomm import kernels
    from flashcomm.bench import gpu
    from flashcomm.lab import launch

    specs = codec_list(codecs)
    if tp and (targets or not torch.cuda.is_available()):
        fail("--tp measures all-reduces and needs a CUDA device" + (": leave out --targets" if targets else ""))
    worlds = [number_of_ranks(text) for text in tp.split(",")] if tp else []
    if targets is None and not torch.cuda.is_available():
        targets = ",".join(gpu.TARGETS)
        stderr.print("no CUDA device on this machine: compiling for " + targets)
    need("triton", "gpu")
    for spec in specs:
        if missing := kernels.any_missing(flashcomm.codec(spec), "cuda") or (":" in spec and "a pair of formats"):
            fail(f"{spec} has no kernel of its own: {missing}")
    for name in targets.split(",") if targets else ():
        if not re.fullmatch(r"sm_[0-9]+|gfx[0-9a-f]+", name.strip()):
            fail(f"unknown target {name!r}: give names such as {', '.join(gpu.TARGETS)}")
    with stderr.status("warming up") as status:
        update = lambda name: status.update(f"at {name}")  # noqa: E731
        if targets:
            title = "compiled ahead of time; floor: 256 MiB of bf16 on an H200"
            rows = gpu.compiled(specs, [name.strip() for name in targets.split(",")], update)
        elif worlds:
            title, rows = f"{mib or 16} MiB of bfloat16 on each rank", []
            # In one launch where the GPUs can; ranks may share one.
            os.environ.update(FLASHCOMM_FUSED="1", TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1")
            for ranks in worlds:
                update(f"{ranks} ranks")
                rows += launch.run(gpu.all_reduces, (specs, mib or 16, repeats), ranks=ranks)[0]
        else:
            title = f"{mib or 256} MiB of bfloat16"
            rows = gpu.measure(specs, mib=mib or 256, repeats=repeats, progress=update)
    table = new_table(title)
    names = [name for name in asdict(rows[0]) if name != "mib"]
    for i, name in enumerate(names):
        table.add_column(name.replace("_", "\n"), justify="left" if i < 3 else "right", no_wrap=True)
    for row in rows:
        figures = asdict(row)
        table.add_row(
            *(f"{figures[name]:.4g}" if isinstance(figures[name], float) else str(figures[name]) for name in names)
        )
    stdout.print(table)
    write_rows(json_file, "gpu", rows)
