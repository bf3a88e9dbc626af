"""The report of `flashcomm accuracy`: a page with plots, the same as Markdown, and the rows."""

import html
from collections.abc import Iterator, Sequence

import torch
from matplotlib.figure import Figure

from flashcomm.accuracy.measuring import Measurement
from flashcomm.accuracy.metrics import FLOOR, AccuracyRow, Estimate, by_position
from flashcomm.bench.page import COLOURS, GREY, RED, document, figure, images

STRETCHES = 8
"""In so many stretches of positions a window is told apart."""

HEAD = (
    "codec",
    "bits",
    "perplexity",
    "KL",
    "KL, top 20",
    "top-1",
    "mean \N{GREEK CAPITAL LETTER DELTA} log p",
    "95 % below",
)

_EXPLANATION = (
    "Teacher-forced: each token is judged by its predecessors in a window, and every row by the same tokens. KL is "
    "that of plain's predictions against the codec's, in nats; over the 20 tokens that plain finds most likely, and "
    "one for all others, it is what 20 log-probabilities can tell. Top-1 is the share of tokens for which both rank "
    "the same token first, and delta log p the distance between both log-probabilities of the token that follows. In "
    "brackets the 95 % confidence interval of a bootstrap over windows. The floor, fp32, sends values as they are and "
    "adds them in fp32 in the order of the ranks, where plain adds them in a ring, in the dtype of the model."
)


def cells(row: AccuracyRow, intervals: bool = True) -> list[str]:
    """A row as text, in the order of `HEAD`."""

    def between(estimate: Estimate, form: str, scale: float = 1.0) -> str:
        value, low, high = (form.format(scale * figure) for figure in estimate)
        return f"{value} ({low} to {high})" if intervals else value

    if row.codec == "none":
        perplexity = between(row.perplexity, "{:.3f}")
        return [row.codec, f"{row.bits_per_value:.2f}", perplexity, "0", "0", "100 %", "0", "0"]
    return [
        row.codec,
        f"{row.bits_per_value:.2f}",
        between(row.perplexity_change, "{:+.3f}", 100) + " %",
        between(row.kl, "{:.2e}"),
        between(row.kl_top20, "{:.2e}"),
        between(row.top1, "{:.2f}", 100) + " %",
        between(row.delta_mean, "{:.4f}"),
        between(row.delta_p95, "{:.4f}"),
    ]


def sums(found: Measurement) -> list[dict]:
    """What each sum adds to the error and has gathered, by codec, as JSON stores it."""
    added, gathered = found.added.tolist(), found.gathered.tolist()
    return [
        {"module": module, "codec": name, "added": added[c][m], "gathered": gathered[c][m]}
        for m, module in enumerate(found.modules)
        for c, name in enumerate(found.names)
        if c
    ]


def positions(found: Measurement) -> list[dict]:
    """KL by codec in each stretch of positions, as JSON stores it."""
    kl = by_position(found.figures, STRETCHES).tolist()
    return [{"codec": name, "kl": kl[c]} for c, name in enumerate(found.names) if c]


def markdown(rows: Sequence[AccuracyRow], found: Measurement, facts: dict) -> str:
    """The report without plots.

    Args:
        rows: plain first.
        found: what they were made of.
        facts: what was run and where: ``model``, ``ranks``, ``hosts``, ``algorithm``, ``dtype``, ``tokens``,
            ``window``, ``text`` and ``machine``.
    """
    lines = ["# Accuracy", "", _origin(facts), "", _EXPLANATION, ""]
    lines += _table(HEAD, [[f"`{row[0]}`", *row[1:]] for row in map(cells, rows)])
    lines += [
        "",
        "## By sum",
        "",
        "The error that a sum adds, and its distance from plain's, to which all errors before it have led; relative to",
        "the sum.",
        "",
    ]
    lines += _table(
        ("after", *(f"`{name}`" for name in found.names[1:])),
        [
            [f"`{module}`", *(f"{100 * a:.2f} %, {100 * g:.2f} %" for a, g in zip(added, gathered, strict=True))]
            for module, added, gathered in zip(
                found.modules, found.added[1:].T.tolist(), found.gathered[1:].T.tolist(), strict=True
            )
        ],
    )
    lines += [
        "",
        "## By position",
        "",
        "KL in each stretch of a window; errors that pile up with the context would make it grow.",
        "",
    ]
    lines += _table(
        ("codec", *_stretches(found)),
        [[f"`{row['codec']}`", *(f"{kl:.2e}" for kl in row["kl"])] for row in positions(found)],
    )
    return "\n".join(lines) + "\n"


def page(rows: Sequence[AccuracyRow], found: Measurement, facts: dict) -> str:
    """The report as one HTML file with plots; arguments as for `markdown`."""
    head = "".join(f"<th{' class=l' * (not place)}>{html.escape(name)}</th>" for place, name in enumerate(HEAD))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>" for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in facts["machine"]["versions"].items())
    return document(
        "flashcomm accuracy",
        f"""<h1>flashcomm accuracy</h1>
<p class="note">{html.escape(_origin(facts))}</p>
<p>{html.escape(_EXPLANATION)}</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<h2>At a glance</h2><div class="plots">{images(_plots(rows, found))}</div>
<p class="note">{html.escape(versions)}</p>""",
    )


def _origin(facts: dict) -> str:
    machine = facts["machine"]
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    hosts = f" on {facts['hosts']} hosts" if facts["hosts"] else ""
    return (
        f"{facts['model']} in {facts['dtype']}, as {facts['ranks']} ranks{hosts} compute it ({facts['algorithm']}), "
        f"simulated in one process: {facts['tokens']:,} tokens of {facts['text']} in windows of {facts['window']:,}. "
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['date']}{commit}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _stretches(found: Measurement) -> list[str]:
    parts = torch.arange(1, found.figures.shape[-1] + 1).tensor_split(STRETCHES)
    return [f"{part[0]} to {part[-1]}" for part in parts]


def _plots(rows: Sequence[AccuracyRow], found: Measurement) -> Iterator[tuple[str, Figure]]:
    others = list(rows[1:])
    plot, axes = figure("KL against plain by bits on the wire, with 95 % confidence intervals", 7.2)
    for row, colour in zip(others, _colours(len(others)), strict=True):
        if row.codec != FLOOR:
            spread = [[max(row.kl.value - row.kl.low, 0)], [max(row.kl.high - row.kl.value, 0)]]
            axes.errorbar(
                [row.bits_per_value], [row.kl.value], spread, fmt="o", color=colour, capsize=3, label=row.codec
            )
    _finish(plot, axes, "bits per value", "KL (nats)", others)
    yield "KL against bits per value", plot
    places = range(len(found.modules))
    for title, values in (
        ("Distance of each sum from plain's: what all errors so far have led to", found.gathered),
        ("Error that each sum adds", found.added),
    ):
        plot, axes = figure(title, 7.2)
        for row, line, colour in zip(others, values[1:].tolist(), _colours(len(others)), strict=True):
            axes.plot(places, line, color=colour, marker=".", linewidth=1, label=row.codec)
        _finish(plot, axes, "sums, in the order of the model", "relative to the sum")
        yield title, plot
    title = "KL by position in the window"
    plot, axes = figure(title, 7.2)
    kl, labels = by_position(found.figures, STRETCHES)[1:].tolist(), _stretches(found)
    for row, line, colour in zip(others, kl, _colours(len(others)), strict=True):
        axes.plot(range(STRETCHES), line, color=colour, marker=".", linewidth=1, label=row.codec)
    axes.set_xticks(range(STRETCHES), labels, fontsize=7, rotation=20)
    _finish(plot, axes, "", "KL (nats)")
    yield title, plot


def _finish(plot: Figure, axes, x: str, y: str, floor: Sequence[AccuracyRow] = ()):
    for row in floor:
        if row.codec == FLOOR:
            axes.axhline(row.kl.value, color=RED, linewidth=0.8, linestyle="--", label="sums in another order")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_yscale("log")
    axes.grid(True, color="#f0f0f0")
    plot.legend(loc="outside right center", fontsize=8, edgecolor="none")


def _colours(count: int) -> list[str]:
    return [(*COLOURS, GREY, "#0891b2", "#65a30d", "#be123c", "#a16207", "#1e3a8a")[i % 12] for i in range(count)]
