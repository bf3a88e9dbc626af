"""Write results/NAME.md from results/NAME.json. `--check` only says whether they agree, with exit status 1 if not."""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
HIDDEN = {"text", "bytes_equal_specification"}


def cell(value: object) -> str:
    """A figure with the digits that it deserves."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        if value == 0 or 0.01 <= abs(value) < 1e5:
            return f"{value:.4g}"
        return f"{value:.2e}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def table(path: Path) -> str:
    """The Markdown of one file of rows."""
    document = json.loads(path.read_text())
    machine, rows = document["machine"], document["rows"]
    names = [name for name in rows[0] if name not in HIDDEN]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    facts = {k: v for k, v in document.items() if k not in ("machine", "rows", "prompt", "model", "op")}
    lines = [
        f"# {path.stem}",
        "",
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['date']}, commit {machine['commit']};",
        f"{versions}.",
        *([", ".join(f"{k} {v}" for k, v in facts.items()) + "."] if facts else []),
        "",
        "| " + " | ".join(names) + " |",
        "|" + " --- |" * len(names),
        *("| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check every table; returns the exit status."""
    stale = []
    for path in sorted(RESULTS.glob("*.json")):
        target = path.with_suffix(".md")
        text = table(path)
        if "--check" in sys.argv:
            if not target.exists() or target.read_text() != text:
                stale.append(target.name)
        else:
            target.write_text(text)
    if stale:
        print(f"stale: {', '.join(stale)}; run `make docs`")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
