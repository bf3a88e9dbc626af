"""Hold the layouts of `flashcomm plan` against vLLM in the lab: predict first tokens, serve, compare.

    .venv-engines/bin/python tools/validate_layouts.py --json results/plan_layouts_lab_cpu.json

One rank alone tells how fast vLLM computes here, once for all settings. Links, algorithms and codecs are those of the
machine ``cpu-1gbe``, with the rate of the lab; nothing else is measured before. Then a server of tensor-parallel ranks
and one of pipeline stages run behind each rate, and codecs take turns in them. It needs root, as the lab does.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import bench_vllm

from flashcomm import machine
from flashcomm.planner.hardware import Cluster
from flashcomm.planner.layouts import Layout, predict_layout
from flashcomm.planner.placement import named
from flashcomm.planner.shapes import Shape
from flashcomm.report.rows import write_json

MODEL = "demo"
LAYOUTS = (Layout(tp=2), Layout(tp=1, pp=2))
RATES = ("10mbit",)
CODECS = ("none", "lossless", "int8g128")
TABLE = "cpu-1gbe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A prompt's first token in one layout and codec, predicted and measured."""

    op: str = "plan_layouts"
    model: str
    engine: str
    dtype: str = "bfloat16"
    link: str
    repeats: int
    tokens: int
    layout: str
    codec: str
    sent_ms: float
    """Predicted milliseconds of sums or hops."""
    predicted_ms: float
    measured_ms: float
    p20_ms: float
    p80_ms: float
    error: float
    """Error of the prediction, relative to the measured time."""
    speedup: float
    """Plain's measured median in the same layout over this one."""
    predicted_speedup: float
    texts: int
    """Greedy texts that were compared with plain's in the same layout."""
    same: int
    """Texts among them that were plain's."""


def measured(layout: Layout, hosts: int, rate: str, codecs: tuple[str, ...], given: argparse.Namespace) -> list[dict]:
    """Serve one layout behind one rate, and time first tokens in each codec."""
    options = argparse.Namespace(
        model=MODEL, rate=rate, tp=layout.tp, pp=layout.pp, hosts=hosts, tokens=given.tokens, repeats=given.repeats,
        codecs=",".join(codecs), texts=given.texts if layout.pp > 1 else 0, overlap=False, eager=False,
        dtype="bfloat16",
    )  # fmt: skip
    return bench_vllm.ttft(options)


def rows_of(shape: Shape, given: argparse.Namespace) -> Iterator[Row]:
    """Measure the rank alone, then predict and measure each setting."""
    prompt = {"tokens": given.tokens, "rows": 1}
    [alone] = measured(Layout(tp=1), 1, given.rates.split(",")[-1], ("none",), given)
    table = named(TABLE, 2)
    one = table.cluster(1)
    assert one is not None
    slower = alone["p50_ms"] / (1e3 * predict_layout(shape, table, one, Layout(tp=1), "none", **prompt).ttft_s)
    print(f"vLLM alone: {alone['p50_ms']:.0f} ms, {slower:.2f} times as long as {TABLE} says", flush=True)
    for rate in given.rates.split(","):
        placement = named(TABLE, 2, rate=rate)
        for layout in LAYOUTS:
            cluster = placement.cluster(layout.tp)
            assert cluster is not None
            expected = {
                codec: predict_layout(shape, placement, _scaled(cluster, slower), layout, codec, **prompt)
                for codec in CODECS
            }
            for row in measured(layout, 2, rate, CODECS, given):
                found = expected[row["codec"]]
                yield Row(
                    model=MODEL,
                    engine=machine.describe()["versions"].get("vllm", "vLLM"),
                    link=rate,
                    repeats=given.repeats,
                    tokens=given.tokens,
                    layout=str(layout),
                    codec=row["codec"],
                    sent_ms=1e3 * (found.sums_s + found.sent_s),
                    predicted_ms=1e3 * found.ttft_s,
                    measured_ms=row["p50_ms"],
                    p20_ms=row["p20_ms"],
                    p80_ms=row["p80_ms"],
                    error=1e3 * found.ttft_s / row["p50_ms"] - 1,
                    speedup=row["speedup"],
                    predicted_speedup=expected["none"].ttft_s / found.ttft_s,
                    texts=row.get("texts", 0),
                    same=row.get("same", 0),
                )


def _scaled(cluster: Cluster, slower: float) -> Cluster:
    """The same ranks, which compute `slower` times as long."""
    rates = {name: getattr(cluster, name) / slower for name in ("flops", "attention_flops", "bytes_s")}
    return replace(cluster, segment_s=cluster.segment_s * slower, **rates)


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--repeats", type=int, default=3, help="timed requests of each codec")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--texts", type=int, default=20, help="greedy texts to compare with plain's in pipeline stages")
    parser.add_argument("--rates", default=",".join(RATES), help="of each host's link")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        bench_vllm.write_model(folder, MODEL)
        shape = Shape.from_config(json.loads((folder / "config.json").read_text()), MODEL)
    rows = []
    for row in rows_of(shape, given):
        rows.append(row)
        print(
            f"{row.link:>8} {row.layout:5} {row.codec:9} {row.predicted_ms:7.0f} ms predicted {row.measured_ms:7.0f} "
            f"measured ({row.p20_ms:.0f} to {row.p80_ms:.0f}) {row.error:+.1%}; {row.predicted_speedup:.2f}x, "
            f"{row.speedup:.2f}x; {row.same} of {row.texts} texts",
            flush=True,
        )
        if given.json:
            document = {"op": "plan_layouts", "machine": machine.describe(), "rows": [asdict(row) for row in rows]}
            write_json(given.json, document)
    errors = [abs(row.error) for row in rows]
    print(f"{len(rows)} settings: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    sys.exit(main())
