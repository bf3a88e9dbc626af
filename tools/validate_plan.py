"""Hold `flashcomm plan` against `flashcomm bench ttft` in the lab: measure groups, predict prompts, run them, compare.

Each group of ranks is measured like `flashcomm tune --save`, which knows nothing of the model. The prediction that
follows for a prompt of llama-160m is compared with the prompt's own time, in each codec, in one piece and in parts.

    OMP_NUM_THREADS=1 python tools/validate_plan.py --json results/plan_lab_cpu.json
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flashcomm import kernels, machine
from flashcomm.bench import compute, ttft, tune
from flashcomm.collectives import tuning
from flashcomm.lab import Lab, launch
from flashcomm.models.random import random_model
from flashcomm.planner.prefill import predict
from flashcomm.planner.shapes import Shape
from flashcomm.report.rows import write_json

MODEL = "llama-160m"
SETTINGS = ((2, "200mbit"), (2, "1gbit"), (4, "500mbit"))
"""Ranks, each behind a link of its own, and its rate."""
CODECS = ("none", "int8g128", "int4g128")
TOKENS = (1024,)
REPEATS = 3
MEDIAN, WORST = 0.10, 0.25
"""Limits of the median error and of the worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt, predicted and measured."""

    op: str = "plan"
    model: str
    backend: str
    dtype: str
    link: str
    repeats: int
    ranks: int
    tokens: int
    codec: str
    parts: str
    """Parts of the measured prompt, which `flashcomm.overlap` chose from its own measurements."""
    predicted_parts: str
    predicted_ms: float
    measured_ms: float
    p20_ms: float
    p80_ms: float
    error: float
    """Error of the prediction, relative to the measured time."""


def rows_of(ranks: int, rate: str, directory: Path, tokens: tuple[int, ...], repeats: int) -> list[Row]:
    """Measure a group, then its prompts, whose sums use the algorithms that the first has found."""
    shape = Shape.from_config(json.loads((directory / "config.json").read_text()), MODEL)
    with Lab(ranks=ranks, rate=rate) as lab:
        cluster = launch.run(compute.measure, (repeats,), ranks=ranks, lab=lab)[0]
        assert cluster.group.costs is not None
        tuning.save(cluster.group.costs)
        arguments = (directory, MODEL, CODECS, tokens, repeats, torch.bfloat16)
        measured, _ = launch.run(ttft.rank_main, arguments, ranks=ranks, lab=lab)[0]
    rows = []
    for one in measured:
        expected = predict(shape, cluster, one.codec, tokens=one.tokens)
        predicted_ms = 1e3 * (expected.overlapped_s if one.overlap else expected.ttft_s)
        rows.append(
            Row(
                model=MODEL,
                backend=one.backend,
                dtype=one.dtype,
                link=rate,
                repeats=one.repeats,
                ranks=ranks,
                tokens=one.tokens,
                codec=one.codec,
                parts=one.parts,
                predicted_parts="+".join(map(str, expected.split.sizes)) if one.overlap else str(one.tokens),
                predicted_ms=predicted_ms,
                measured_ms=one.p50_ms,
                p20_ms=one.p20_ms,
                p80_ms=one.p80_ms,
                error=predicted_ms / one.p50_ms - 1,
            )
        )
    return rows


def main() -> int:
    """Measure, print and write; the exit status says whether the errors stay within their limits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed rounds")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="lengths of the prompt")
    parser.add_argument("--settings", default=",".join(f"{n}x{rate}" for n, rate in SETTINGS), help="ranks x rate")
    given = parser.parse_args()
    for spec in (*CODECS, *tune.CODECS, "bf16"):
        kernels.warm_up(spec)
    rows: list[Row] = []
    lengths = tuple(int(text) for text in given.tokens.split(","))
    with random_model(MODEL, torch.bfloat16) as directory, tempfile.TemporaryDirectory() as scratch:
        # These costs are for this comparison only.
        os.environ["FLASHCOMM_TUNING"] = str(Path(scratch) / "tuning.json")
        for setting in given.settings.split(","):
            ranks, _, rate = setting.partition("x")
            rows += rows_of(int(ranks), rate, directory, lengths, given.repeats)
            for row in rows[-2 * len(CODECS) * len(lengths) :]:
                print(
                    f"{row.ranks} ranks {row.link:>8} {row.tokens:5} {row.codec:9} {row.parts:16} "
                    f"{row.predicted_parts:16} {row.predicted_ms:7.0f} ms predicted {row.measured_ms:7.0f} measured "
                    f"({row.p20_ms:.0f} to {row.p80_ms:.0f}) {row.error:+.1%}",
                    flush=True,
                )
    errors = [abs(row.error) for row in rows]
    print(f"{len(rows)} prompts: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    if given.json:
        document = {"op": "plan", "machine": machine.describe(), "rows": [asdict(row) for row in rows]}
        write_json(given.json, document)
    return int(statistics.median(errors) > MEDIAN or max(errors) > WORST)


if __name__ == "__main__":
    sys.exit(main())
