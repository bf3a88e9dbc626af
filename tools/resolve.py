"""Resolve every extra against the newest releases of the package index, without installing anything.

    python tools/resolve.py                # all extras, for Python 3.12; about 20 seconds each
    python tools/resolve.py vllm sglang    # some

Prints the releases that each extra gets; fails if one has no solution. Needs the index and `uv`.
"""

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYTHON = "3.12"
SHOWN = ("vllm", "sglang", "transformers", "torch", "triton", "numba", "numpy")
"""Packages whose releases are printed."""


def resolve(extra: str) -> dict[str, str]:
    """Find a release of every package that an extra needs.

    Args:
        extra: of pyproject.toml.

    Returns:
        Release by package.

    Raises:
        subprocess.CalledProcessError: no solution; its ``stderr`` says why.
    """
    # The demo model of this checkout, because extra `demo` may name a release that is not published yet.
    asked = f"flashcomm[{extra}] @ {ROOT.as_uri()}\nflashcomm-demo-model @ {(ROOT / 'packages/demo-model').as_uri()}\n"
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", PYTHON]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    return dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)


def main(extras: list[str]) -> int:
    """Resolve `extras`, or all; returns the number of those that have no solution."""
    failed = 0
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in extras or known:
        try:
            found = resolve(extra)
        except subprocess.CalledProcessError as error:
            print(f"{extra}: no solution\n{error.stderr}")
            failed += 1
        else:
            print(f"{extra}:", *(f"{name} {found[name]}" for name in SHOWN if name in found), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
