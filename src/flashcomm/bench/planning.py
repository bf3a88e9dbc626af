"""`flashcomm plan`: what prompts of a model will take on a machine, as tables, a picture and a policy file.

The arithmetic is `flashcomm.planner.prefill`; nothing is started and no model is loaded.

Source: our own.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from flashcomm.codecs import parse
from flashcomm.planner import hardware, prefill, shapes
from flashcomm.planner.hardware import Cluster
from flashcomm.planner.prefill import Advice, Prediction, human
from flashcomm.planner.shapes import Shape
from flashcomm.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A question and its answer."""

    shape: Shape
    cluster: Cluster
    tokens: int
    """Of each prompt."""
    rows: int
    """Prompts in the batch."""
    predictions: tuple[Prediction, ...]
    """Plain's first."""
    advice: Advice

    def as_dict(self) -> dict:
        """As JSON stores it."""
        ranks = {"ranks": self.cluster.group.ranks, "hosts": self.cluster.group.hosts}
        return {
            "model": self.shape.name,
            "machine": self.cluster.name,
            **ranks,
            "prompt": self.tokens,
            "batch": self.rows,
            "facts": [*self.cluster.facts, *self.notes],
            "rows": [one.as_dict() for one in self.predictions],
            "advice": self.advice.as_dict(),
        }

    @property
    def notes(self) -> list[str]:
        """What the figures leave out."""
        ranks, heads = self.cluster.group.ranks, self.shape.heads
        return [] if heads % ranks == 0 else [f"{heads} heads do not divide by {ranks}: as if they did"]


def plan(
    model: str,
    machine: str,
    *,
    ranks: int | None = None,
    tokens: int = 2048,
    rows: int = 1,
    codecs: Sequence[str] = prefill.CODECS,
    ranks_per_host: int | None = None,
    rate: str | None = None,
    link: str | None = None,
) -> Planned:
    """Predict, and advise.

    Args:
        model: as `flashcomm.planner.shapes.load` takes it.
        machine: a name of `flashcomm.planner.hardware.ACCELERATORS`, or a file of ``flashcomm tune --save``.
        ranks: 2 or more; 4 if not given, or those of the file.
        tokens: of each prompt.
        rows: prompts in the batch.
        codecs: to compare with plain.
        ranks_per_host, rate, link: as `flashcomm.planner.hardware.cluster` takes them; not with a file.

    Raises:
        ValueError: an argument is not allowed; says what is.
    """
    shape = shapes.load(model)
    for name, given in (("prompt", tokens), ("batch", rows)):
        if given < 1:
            raise ValueError(f"{name} {given}: give 1 or more")
    for spec in codecs:
        if parse(spec).unbound:
            raise ValueError(f"{spec} needs a calibration of a model: plan with its base, {parse(spec).base}")  # pyright: ignore[reportAttributeAccessIssue]
    options = {"--ranks-per-host": ranks_per_host, "--rate": rate, "--link": link}
    cluster = _cluster(machine, ranks, options)
    predictions = tuple(prefill.compare(shape, cluster, codecs, tokens=tokens, rows=rows))
    return Planned(
        shape=shape, cluster=cluster, tokens=tokens, rows=rows, predictions=predictions,
        advice=prefill.advise(predictions),
    )  # fmt: skip


def _cluster(machine: str, ranks: int | None, options: dict[str, Any]) -> Cluster:
    if Path(machine).suffix != ".json":
        per_host, rate, link = options.values()
        return hardware.cluster(machine, ranks or 4, ranks_per_host=per_host, rate=rate, link=link)
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"{given[0]} with {machine}, which was measured on links of its own: leave it out")
    try:
        cluster = Cluster.from_dict(json.loads(Path(machine).read_text()), machine)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {machine!r}: {error}. `flashcomm tune --save {machine}` makes it") from None
    if ranks not in (None, cluster.group.ranks):
        raise ValueError(
            f"--tp {ranks} with {machine}, which was measured on {cluster.group.ranks} ranks: leave it out"
        )
    return cluster


def policy_of(planned: Planned) -> tuple[Policy, list[str]]:
    """The policy that the advice amounts to, and the evidence as its comments."""
    advice, plain = planned.advice, planned.predictions[0]
    policy = Policy(codec=advice.codec, min_bytes=advice.min_bytes)
    prompts = f"{planned.rows} x {planned.tokens} tokens"
    comments = [
        f"flashcomm plan: {planned.shape.name}, {planned.cluster.name}, {prompts}; predicted, not measured",
        f"first token: plain {1e3 * plain.ttft_s:.4g} ms, as below {1e3 * plain.ttft_s / advice.speedup:.4g} ms",
        *advice.reasons,
        *planned.cluster.facts,
        *planned.notes,
    ]
    return policy, comments


def table_of(planned: Planned, new: Callable[[str], Table]) -> Table:
    """What to show of a plan: a row for each codec, in the table that `new` makes of a title."""
    cluster = planned.cluster
    hosts = f" on {cluster.group.hosts} hosts" if cluster.group.hosts > 1 else ""
    table = new(
        f"{planned.shape.name}, {planned.rows} x {planned.tokens:,} tokens, {cluster.name}{hosts}; predicted, "
        f"compute {_ms(planned.predictions[0].compute_s)} ms"
    )
    for name in ("codec", "algorithm"):
        table.add_column(name, no_wrap=True)
    for name in ("sums\nms", "share", "prefill\nms", "TTFT\nms", "x plain"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("in parts", no_wrap=True)
    for name in ("TTFT\nms", "x plain", "pays\nfrom"):
        table.add_column(name, justify="right", no_wrap=True)
    plain = planned.predictions[0]
    for one in planned.predictions:
        parts = "+".join(map(str, one.split.sizes)) if len(one.split.sizes) > 1 else "-"
        pays = human(one.min_bytes) if one.min_bytes else ("" if one is plain else "never")
        table.add_row(
            one.codec, one.algorithm, _ms(one.sums_s), f"{one.share:.0%}", _ms(one.prefill_s), _ms(one.ttft_s),
            f"{plain.ttft_s / one.ttft_s:.2f}", parts, _ms(one.overlapped_s), f"{plain.ttft_s / one.overlapped_s:.2f}",
            pays,
        )  # fmt: skip
    return table


def draw(planned: Planned, machine: str, path: Path, link: str | None = None):
    """Write a picture of the first token's time, over ranks and over the rate between hosts.

    Args:
        planned: whose model, prompts and codecs are drawn.
        machine: a name of `flashcomm.planner.hardware.ACCELERATORS`.
        path: a file that ends in .png, .svg or .pdf.
        link: as for `plan`.

    Raises:
        ValueError: a machine that was measured, on its own number of ranks and no other.
    """
    if Path(machine).suffix == ".json":
        raise ValueError(f"--plot with {machine}: other ranks and rates were not measured. Plot a machine by its name")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    shape, prompts = planned.shape, {"tokens": planned.tokens, "rows": planned.rows}
    specs = [one.codec for one in planned.predictions]
    ranks = [2**n for n in range(1, 11)]
    one_host = hardware.accelerator(machine).ranks_per_host
    # At least two hosts, or there is no link between them.
    most = one_host * max(2, -(-planned.cluster.group.ranks // one_host))
    rates = [2**n for n in range(11)]
    lines = [
        (f"{machine}, hosts of {one_host}", "ranks", ranks, [hardware.cluster(machine, n, link=link) for n in ranks]),
        (
            f"{most} x {machine}, {most // one_host} hosts",
            "Gbit/s of each host",
            rates,
            [hardware.cluster(machine, most, rate=f"{n}gbit", link=link) for n in rates],
        ),
    ]
    figure = Figure(figsize=(10.6, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (title, label, values, clusters) in zip(panels, lines, strict=True):
        for number, spec in enumerate(specs):
            times = [prefill.predict(shape, one, spec, **prompts) for one in clusters]
            colour = _GREY if spec == "none" else _COLOURS[(number - 1) % len(_COLOURS)]
            look = {"color": colour, "linewidth": 2 if spec == "none" else 1.3}
            axes.plot(values, [1e3 * one.ttft_s for one in times], label="plain" if spec == "none" else spec, **look)
            axes.plot(values, [1e3 * one.overlapped_s for one in times], linestyle=":", **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted(FuncFormatter(lambda ms, _: f"{ms:,.4g}" if ms < 1000 else f"{ms:,.0f}"))
        axes.tick_params(which="both", labelsize=8)
        axes.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(label)
        axes.grid(True, color="#f0f0f0")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms to the first token, predicted")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, edgecolor="none")
    figure.suptitle(
        f"{shape.name}, {planned.rows} x {planned.tokens:,} tokens; dotted: in parts that take turns",
        fontsize=11, x=0.01, ha="left",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


_GREY = "#9ca3af"
_COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2", "#65a30d", "#b91c1c")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"
