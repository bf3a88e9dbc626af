"""Draw a table of collectives: time over size, on logarithmic axes, a panel for each number of ranks."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from flashcomm.bench.collectives import CollectiveRow
from flashcomm.report.palette import BLACK, GREY, GRID, series
from flashcomm.units import bytes_text

_STYLES = ("-", "--", ":", "-.")


def draw(rows: Sequence[CollectiveRow], path: Path):
    """Write the picture to `path`, in the format of its suffix.

    Args:
        rows: rows of one operation; a colour for each codec, a line style for each algorithm, grey for plain.
        path: a file, such as ``all_reduce.png``.
    """
    worlds = sorted({row.ranks for row in rows})
    figure = Figure(figsize=(2.6 + 4.0 * len(worlds), 4.2), layout="constrained")
    panels = figure.subplots(1, len(worlds), sharey=True, squeeze=False)[0]
    codecs = list(dict.fromkeys(row.codec for row in rows if row.codec != "none"))
    algorithms = list(dict.fromkeys(row.algorithm for row in rows if row.codec != "none"))
    for axes, ranks in zip(panels, worlds, strict=True):
        lines: dict[tuple[str, str, str], list[CollectiveRow]] = {}
        for row in rows:
            if row.ranks == ranks:
                lines.setdefault((row.backend, row.codec, row.algorithm), []).append(row)
        for (backend, codec, algorithm), points in lines.items():
            if codec == "none":
                ours = backend == rows[0].backend
                look = {"color": GREY if ours else BLACK, "linestyle": "-" if ours else "--", "linewidth": 2}
                label = f"plain {backend}, {points[0].dtype}"
            else:
                style = _STYLES[algorithms.index(algorithm) % len(_STYLES)]
                look = {"color": series(codecs.index(codec)), "linestyle": style}
                label = f"{codec} {algorithm}" if len(algorithms) > 1 else codec
            sizes = [row.message_bytes for row in points]
            axes.plot(sizes, [row.p50_ms for row in points], marker="o", markersize=3, label=label, **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = sorted({row.message_bytes for row in rows})
        ticks = sizes[:: 1 + len(sizes) // 7]
        axes.set_xticks(ticks, [bytes_text(size) for size in ticks], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{ranks} ranks", fontsize=10, loc="left")
        axes.set_xlabel("message")
        axes.grid(True, color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("median ms of the slowest rank")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, edgecolor="none")
    figure.suptitle(
        f"{rows[0].op}, {rows[0].dtype}, {rows[0].backend}, link {rows[0].link}", fontsize=11, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=150)
