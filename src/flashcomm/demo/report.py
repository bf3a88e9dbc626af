"""The demo's `report.html`: one file, nothing loaded from elsewhere."""

import html
from collections.abc import Sequence

from matplotlib.figure import Figure

from flashcomm.demo.measure import DemoRow
from flashcomm.report.page import empty_plot, html_page, images
from flashcomm.report.palette import BLUE, GREY, GRID, LEADER, RED, SERIES


def render(rows: Sequence[DemoRow], facts: dict) -> str:
    """Render the page.

    Args:
        rows: plain first.
        facts: the origin of the figures: ``model``, ``ranks``, ``text``, ``eval_tokens``, ``prompt_tokens``, ``prompt``, ``machine``,
            and in a lab ``rate`` and ``ranks_per_host``.
    """
    machine = facts["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    plots = images(_plots(rows, facts.get("rate")))
    texts = "".join(
        f"<h3>{', '.join(f'<code>{html.escape(codec)}</code>' for codec in codecs)}</h3><pre>{html.escape(text)}</pre>"
        for text, codecs in by_text(rows).items()
    )
    body = f"""<h1>flashcomm demo</h1>
<p class="note">{html.escape(str(facts["model"]))}, tensor parallel over {facts["ranks"]} ranks on
{html.escape(machine["gpu"] or machine["cpu"])} ({machine["cores"]} cores), {machine["date"]}.</p>
<p>Every row runs the same model on the same tokens; only the bytes between the ranks differ. Every sum is compressed
here, also the small ones that <code>auto</code> would leave plain. <b>Bits</b> count scales
and zero points. <b>Wire</b> is what one rank sends per prompt token. <b>TTFT</b> is the median time from a prompt of
{facts["prompt_tokens"]:,} tokens to its first new token, all codecs taking turns{", overlapped while parts of the prompt take turns" if rows[0].parts else ""}. {html.escape(link(facts))} <b>Perplexity</b>, <b>KL</b> (plain against codec, nats) and
<b>top-1</b> are teacher-forced over {facts["eval_tokens"]:,} tokens of {html.escape(facts["text"])}.</p>
<div class="scroll">{_table(rows)}</div>
<h2>At a glance</h2><div class="plots">{plots}</div>
<h2>What it writes</h2><p class="note">Greedy continuation of <code>{html.escape(repr(facts["prompt"]))}</code></p>
{texts}
<p class="note">{html.escape(versions)}{", commit " + machine["commit"] if machine["commit"] else ""}</p>
"""
    return html_page("flashcomm demo", body)


def link(facts: dict) -> str:
    """A sentence about the link between the ranks, without which times say little."""
    if "rate" not in facts:
        return "Ranks share this machine, so there is no slow link here for compression to speed up."
    hosts = facts["ranks"] // facts["ranks_per_host"]
    each = f" of {facts['ranks_per_host']} ranks" if facts["ranks_per_host"] > 1 else ""
    limit = "an unlimited link" if facts["rate"] == "none" else f"a link of {facts['rate']}"
    return f"Ranks run on {hosts} hosts{each}, each behind {limit}: network namespaces of this machine, whose cores they share."


def by_text(rows: Sequence[DemoRow]) -> dict[str, list[str]]:
    """Codecs by the text that the model wrote with them, in the order of the rows."""
    texts: dict[str, list[str]] = {}
    for row in rows:
        texts.setdefault(row.text, []).append(row.codec)
    return texts


def _table(rows: Sequence[DemoRow]) -> str:
    head = (
        '<tr><th class="l">codec</th><th class="l">algorithm</th><th>bits</th><th>wire B/token</th><th>TTFT ms</th>'
        "<th>speed</th>"
        + ("<th>parts</th><th>overlapped ms</th><th>predicted ms</th><th>speed</th>" if rows[0].parts else "")
        + "<th>perplexity</th><th>change</th><th>KL</th><th>top-1</th><th>same bits</th></tr>"
    )
    body = "".join(
        f'<tr><td><code>{html.escape(r.codec)}</code></td><td class="l">{r.algorithm}</td><td>{r.bits_per_value:.2f}</td>'
        f"<td>{r.wire_bytes_per_token:,.0f}</td><td>{r.ttft_ms:.0f}</td><td>{r.ttft_vs_plain:.2f}x</td>{_overlap_cells(r)}"
        f"<td>{r.perplexity:.4f}</td><td>{100 * r.perplexity_change:+.3f} %</td><td>{r.kl:.2e}</td>"
        f"<td>{100 * r.top1:.2f} %</td><td>{'yes' if r.ranks_identical else '<span class=bad>NO</span>'}</td></tr>"
        for r in rows
    )
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _overlap_cells(row: DemoRow) -> str:
    if row.parts is None:
        return ""
    cells = row.parts, f"{row.overlapped_ms:.0f}", f"{row.predicted_ms:.0f}", f"{row.overlapped_vs_plain:.2f}x"
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _family(codec: str) -> str:
    """The kind of a format, which sets its dot's colour."""
    wrappers = {
        "+spike": "spikes reserved",
        "+peaks": "peaks kept",
        "+keep": "features kept",
        "+hadamard": "transformed",
        "+taco": "transformed",
    }
    if ":" in codec:
        return "one format per step"
    found = [name for suffix, name in wrappers.items() if suffix in codec]
    if found:
        return found[-1]
    kinds = {"int": "integers", "ec": "entropy-coded", "lossless": "without loss"}
    return next((kind for start, kind in kinds.items() if codec.startswith(start)), "block floats")


def best(rows: Sequence[DemoRow]) -> list[DemoRow]:
    """The rows on the Pareto front of bits and KL, by bits: the formats worth a choice."""
    front: list[DemoRow] = []
    for row in sorted(rows, key=lambda r: (r.bits_per_value, r.kl)):
        if not front or row.kl < front[-1].kl:
            front.append(row)
    return front


def _accuracy_plot(rows: Sequence[DemoRow]) -> Figure:
    """Draw KL against bits, a dot per format, with names in a column beside it so that none covers another."""
    plot, axes = empty_plot(
        "Accuracy: KL against plain by bits on the wire; the line joins the formats worth a choice", 7.2
    )
    dots = sorted((r for r in rows if r.kl > 0 and r.bits_per_value < 16), key=lambda r: r.kl)
    front = best(dots)
    axes.plot([r.bits_per_value for r in front], [r.kl for r in front], color=GREY, linewidth=1, zorder=2)
    families = dict.fromkeys(_family(r.codec) for r in dots)
    for family, colour in zip(families, SERIES, strict=False):
        members = [r for r in dots if _family(r.codec) == family]
        points = [r.bits_per_value for r in members], [r.kl for r in members]
        axes.scatter(*points, color=colour, s=26, zorder=3, label=family)
    for place, row in enumerate(dots):
        axes.annotate(
            row.codec, (row.bits_per_value, row.kl), xytext=(1.04, (place + 0.5) / len(dots)), textcoords="axes fraction",
            fontsize=8, va="center", weight="bold" if row in front else "normal",
            arrowprops={"arrowstyle": "-", "color": LEADER, "linewidth": 0.6, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip
    for row in rows:
        if row.codec == "fp32":
            axes.axhline(row.kl, color=RED, linewidth=0.8, linestyle="--", label="sums in another order")
    axes.set_xlabel("bits per value")
    axes.set_ylabel("KL (nats)")
    if dots:
        axes.set_yscale("log")
        axes.legend(fontsize=8, loc="lower left", edgecolor="none", framealpha=1)
    axes.grid(True, color=GRID)
    return plot


def _plots(rows: Sequence[DemoRow], rate: str | None):
    yield "KL against bits per value", _accuracy_plot(rows)

    for title, value, unit in (
        ("Bytes that a rank sends per prompt token", lambda r: r.wire_bytes_per_token, "{:,.0f}"),
        (
            f"Time to first token, median ms ({f'links of {rate}' if rate else 'no slow link'})",
            lambda r: r.ttft_ms,
            "{:.0f}",
        ),
    ):
        plot, axes = empty_plot(title)
        names = [r.codec for r in rows][::-1]
        values = [value(r) for r in rows][::-1]
        bars = axes.barh(names, values, color=[GREY if n == "none" else BLUE for n in names], zorder=3)
        axes.bar_label(bars, [unit.format(v) for v in values], padding=4, fontsize=8)
        axes.margins(x=0.15)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        yield title, plot
