"""Draw when each rank computed and when it sent."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flashcomm.bench.ttft import Span
from flashcomm.report.palette import series

_LANES = ("core", "link")


def draw(timelines: Mapping[str, Sequence[Span]], title: str, path: Path):
    """Write the picture to `path`, in the format of its suffix.

    Args:
        timelines: spans of all ranks, a panel for each.
        title: of the whole picture.
        path: a file, such as ``timeline.png``.
    """
    ranks = sorted({span.rank for spans in timelines.values() for span in spans})
    lanes = [(rank, lane) for rank in ranks for lane in _LANES]
    figure = Figure(figsize=(12, (0.5 + 0.32 * len(lanes)) * len(timelines) + 0.9), layout="constrained")
    panels = figure.subplots(len(timelines), sharex=True, squeeze=False)[:, 0]
    for axes, (name, spans) in zip(panels, timelines.items(), strict=True):
        for place, (rank, lane) in enumerate(lanes):
            for part in sorted({span.part for span in spans}):
                mine = [s for s in spans if (s.rank, s.lane, s.part) == (rank, lane, part)]
                bars = [(1e3 * s.start_s, 1e3 * (s.end_s - s.start_s)) for s in mine]
                colour = series(part)
                axes.broken_barh(bars, (place - 0.4, 0.8), color=colour, alpha=1.0 if lane == "core" else 0.55)
        axes.set_yticks(range(len(lanes)), [f"rank {rank} {lane}" for rank, lane in lanes], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("milliseconds")
    parts = sorted({span.part for spans in timelines.values() for span in spans})
    patches = [Patch(color=series(part), label=f"part {part + 1}") for part in parts]
    figure.legend(handles=patches, loc="outside right upper", fontsize=8, edgecolor="none")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
