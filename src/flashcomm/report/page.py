"""Reports in one HTML file: the look, and plots inside the page. Nothing is loaded from elsewhere."""

import base64
import html
import io
from collections.abc import Iterable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#111827;max-width:74rem;margin:2.5rem auto;padding:0 1.25rem}
h1{font-size:1.7rem;margin:0 0 .25rem}h2{font-size:1.15rem;margin:2.2rem 0 .5rem}p{max-width:46rem}
.note{color:#4b5563}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:.4rem .6rem;border-bottom:1px solid #e5e7eb;text-align:right;white-space:nowrap}
th:first-child,td:first-child,td.l,th.l{text-align:left}th{font-weight:600;color:#4b5563}
code,pre{font:.88em ui-monospace,monospace}pre{background:#f9fafb;border:1px solid #e5e7eb;border-radius:6px;padding:.75rem;
overflow-x:auto;margin:.25rem 0 1rem}.bad{color:#b91c1c;font-weight:600}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(22rem,1fr));gap:1.25rem}
.plots img{width:100%;border:1px solid #e5e7eb;border-radius:6px}.plots img:first-child{grid-column:1/-1;max-width:56rem}
"""


def html_page(title: str, body: str) -> str:
    """A page with the HTML `body`."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
{body}
</body></html>
"""


def empty_plot(title: str, width: float = 5.6) -> tuple[Figure, Axes]:
    """An empty plot, `width` inches wide."""
    found = Figure(figsize=(width, width * 0.7), layout="constrained")
    axes = found.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return found, axes


def images(figures: Iterable[tuple[str, Figure]]) -> str:
    """Image tags of plots, each given as (its text for readers without pictures, the plot)."""
    return "".join(f'<img alt="{html.escape(alt)}" src="{_png(one)}">' for alt, one in figures)


def _png(one: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        one.savefig(buffer, format="png", dpi=150)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
