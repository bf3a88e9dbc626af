"""The report of `flashcomm accuracy`: a page with plots, the same as Markdown, and the rows."""

import html
from collections.abc import Iterator, Sequence

import torch
from matplotlib.figure import Figure

from flashcomm.accuracy.measuring import Measurement
from flashcomm.accuracy.metrics import FLOOR, AccuracyRow, Estimate, by_position
from flashcomm.codecs.peers import USERS
from flashcomm.report.page import empty_plot, html_page, images
from flashcomm.report.palette import GRID, RED, series
from flashcomm.report.rows import markdown_table

STRETCHES = 8
"""Number of stretches of positions in a window."""

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
    "adds them in fp32 in the order of the ranks, where plain adds them in a ring, in the dtype of the model. A hop "
    "between pipeline stages adds nothing up, so it has no floor: its plain is exact. Of ranks that share out the "
    "experts, dispatch sends hidden states to them and combine sends back the sum of a rank's experts; the floor is "
    "that of combine, and bits per value are the mean of both."
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
        f"{row.codec}, as {USERS[row.codec]}" if row.codec in USERS else row.codec,
        f"{row.bits_per_value:.2f}",
        between(row.perplexity_change, "{:+.3f}", 100) + " %",
        between(row.kl, "{:.2e}"),
        between(row.kl_top20, "{:.2e}"),
        between(row.top1, "{:.2f}", 100) + " %",
        between(row.delta_mean, "{:.4f}"),
        between(row.delta_p95, "{:.4f}"),
    ]


def sums(found: Measurement) -> list[dict]:
    """Rows of each sum and codec for JSON: the error that the sum adds, and that it has gathered."""
    added, gathered = found.added.tolist(), found.gathered.tolist()
    return [
        {"module": module, "codec": name, "added": added[c][m], "gathered": gathered[c][m]}
        for m, module in enumerate(found.modules)
        for c, name in enumerate(found.names)
        if c
    ]


def positions(found: Measurement) -> list[dict]:
    """Rows of each codec for JSON: KL in each stretch of positions."""
    kl = by_position(found.figures, STRETCHES).tolist()
    return [{"codec": name, "kl": kl[c]} for c, name in enumerate(found.names) if c]


def document(rows: Sequence[AccuracyRow], found: Measurement, facts: dict) -> dict:
    """The report for JSON; arguments as for `markdown`."""
    return {
        "op": "accuracy",
        **facts,
        "rows": [row.as_dict() for row in rows],
        "sums": sums(found),
        "positions": positions(found),
    }


def markdown(rows: Sequence[AccuracyRow], found: Measurement, facts: dict) -> str:
    """The report without plots.

    Args:
        rows: plain first.
        found: the measurement behind the rows.
        facts: the origin of the figures: ``model``, ``ranks``, ``stages`` if there are several, ``hosts``,
            ``expert_ranks``, ``algorithm``, ``dtype``, ``tokens``, ``window``, ``text`` and ``machine``.
    """
    lines = ["# Accuracy", "", _origin(facts), "", _EXPLANATION, ""]
    lines += markdown_table(HEAD, [[f"`{row[0]}`", *row[1:]] for row in map(cells, rows)])
    lines += [
        "",
        "## By sum",
        "",
        "The error that a sum or a hop adds, and its distance from plain's, to which all errors before it have led;",
        "relative to the sum.",
        "",
    ]
    lines += markdown_table(
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
    lines += markdown_table(
        ("codec", *_stretches(found)),
        [[f"`{row['codec']}`", *(f"{kl:.2e}" for kl in row["kl"])] for row in positions(found)],
    )
    return "\n".join(lines) + "\n"


def page(rows: Sequence[AccuracyRow], found: Measurement, facts: dict) -> str:
    """The report as one HTML file with plots; arguments as for `markdown`."""
    head = "".join(f"<th{' class=l' * (not place)}>{html.escape(name)}</th>" for place, name in enumerate(HEAD))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>" for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in facts["machine"]["versions"].items())
    return html_page(
        "flashcomm accuracy",
        f"""<h1>flashcomm accuracy</h1>
<p class="note">{html.escape(_origin(facts))}</p>
<p>{html.escape(_EXPLANATION)}</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<h2>At a glance</h2><div class="plots">{images(_plots(rows, found))}</div>
<p class="note">{html.escape(versions)}</p>""",
    )


def whom(facts: dict) -> str:
    """The ranks and stages that are simulated, in words.

    >>> whom({"ranks": 1, "hosts": 0, "expert_ranks": 4})
    '4 ranks with one share of the experts each'

    >>> whom({"ranks": 4, "hosts": 2}), whom({"ranks": 1, "hosts": 0, "stages": 2})
    ('4 ranks on 2 hosts', '2 pipeline stages of one rank')
    """
    if "expert_ranks" in facts:
        return f"{facts['expert_ranks']} ranks with one share of the experts each"
    hosts = f" on {facts['hosts']} hosts" if facts["hosts"] else ""
    ranks = f"{facts['ranks']} ranks{hosts}" if facts["ranks"] > 1 else "one rank"
    return f"{facts['stages']} pipeline stages of {ranks}" if "stages" in facts else ranks


def _origin(facts: dict) -> str:
    machine = facts["machine"]
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    return (
        f"{facts['model']} in {facts['dtype']}, as {whom(facts)} compute it ({facts['algorithm']}), "
        f"simulated in one process: {facts['tokens']:,} tokens of {facts['text']} in windows of {facts['window']:,}. "
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['date']}{commit}."
    )


def _stretches(found: Measurement) -> list[str]:
    parts = torch.arange(1, found.figures.shape[-1] + 1, dtype=torch.long, device="cpu").tensor_split(STRETCHES)
    return [f"{part[0]} to {part[-1]}" for part in parts]


def _plots(rows: Sequence[AccuracyRow], found: Measurement) -> Iterator[tuple[str, Figure]]:
    others = list(rows[1:])
    plot, axes = empty_plot("KL against plain by bits on the wire, with 95 % confidence intervals", 7.2)
    for number, row in enumerate(others):
        if row.codec != FLOOR:
            spread = [[max(row.kl.value - row.kl.low, 0)], [max(row.kl.high - row.kl.value, 0)]]
            axes.errorbar(
                [row.bits_per_value], [row.kl.value], spread, fmt="o", color=series(number), capsize=3, label=row.codec
            )
    _finish(plot, axes, "bits per value", "KL (nats)", others)
    yield "KL against bits per value", plot
    places = range(len(found.modules))
    for title, values in (
        ("Distance of each sum from plain's: what all errors so far have led to", found.gathered),
        ("Error that each sum adds", found.added),
    ):
        plot, axes = empty_plot(title, 7.2)
        for number, (row, line) in enumerate(zip(others, values[1:].tolist(), strict=True)):
            axes.plot(places, line, color=series(number), marker=".", linewidth=1, label=row.codec)
        _finish(plot, axes, "sums, in the order of the model", "relative to the sum")
        yield title, plot
    title = "KL by position in the window"
    plot, axes = empty_plot(title, 7.2)
    kl, labels = by_position(found.figures, STRETCHES)[1:].tolist(), _stretches(found)
    for number, (row, line) in enumerate(zip(others, kl, strict=True)):
        axes.plot(range(STRETCHES), line, color=series(number), marker=".", linewidth=1, label=row.codec)
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
    axes.grid(True, color=GRID)
    plot.legend(loc="outside right center", fontsize=8, edgecolor="none")
