"""Habits that decay unless a test holds them: imports, names, versions, documents, examples."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
import runpy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from torch.distributed.launcher.api import elastic_launch

import flashcomm
import ranks

ROOT = Path(__file__).parents[1]
HEAVY = {"numba", "triton", "transformers", "vllm", "matplotlib", "rich", "typer"}


def imported_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_import_brings_nothing_heavy():
    assert not imported_by("import flashcomm") & HEAVY


def test_the_import_check_can_fail():
    assert imported_by("import rich") & HEAVY


def test_public_names_exist():
    for name in flashcomm.__all__:
        assert getattr(flashcomm, name).__doc__, f"{name} has no docstring"


def test_parts_are_loaded_when_named():
    code = "import flashcomm; flashcomm.integrations.transformers.compress; flashcomm.bench; flashcomm.policy.Policy"
    assert "transformers" not in imported_by(code)
    assert flashcomm.Policy is flashcomm.policy.Policy
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        flashcomm.nonsense  # noqa: B018


def modules():
    for info in pkgutil.walk_packages(flashcomm.__path__, "flashcomm."):
        if ".simd" not in info.name:
            yield info.name


@pytest.mark.parametrize("name", list(modules()))
def test_every_module_imports_says_what_it_is_and_its_examples_run(name):
    engine = name.removeprefix("flashcomm.integrations.")
    engine = engine.removesuffix("_kv")
    if engine in ("vllm", "sglang") and not importlib.util.find_spec(engine):
        with pytest.raises(ImportError, match=f"needs .*: pip install {engine}"):
            importlib.import_module(name)
        return
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        pytest.skip("pip install 'flashcomm[plot]'")
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


def test_changelog_has_this_version():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == flashcomm.__version__


def documents():
    return sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "results").glob("*.md"))


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.name)
def test_examples_in_documents_run_and_links_lead_somewhere(path):
    text = path.read_text()
    assert len(text) > 200
    assert doctest.testfile(str(path), module_relative=False).failed == 0
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("folder", ["src", "tools", "examples"])
def test_docstrings_name_the_thing(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert not re.findall(r'"""(?:What|Of|As|How|So many) .*', path.read_text()), path


def run_file(path: str):
    """Run a script as its own command line would."""
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(path, tmp_path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    if "from transformers" in text and version("transformers").startswith("5.0."):
        pytest.skip("the examples are for newer releases of transformers than 5.0")
    config = ranks.forking(tmp_path)(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    elastic_launch(config, run_file)(str(path))
    printed, errors = ("".join(p.read_text() for p in tmp_path.rglob(name)) for name in ("stdout.log", "stderr.log"))
    assert printed.strip()
    # A codec's own error, and not that of values which travel uncompressed between ranks of one host.
    if path.name == "custom_codec.py":
        assert "1.01 bits per value, relative error 0.60" in printed
        assert "was asked for, but auto sends values uncompressed" not in errors
    if path.name == "demo_optimizer.py":
        first, *_, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed))
        assert last < first / 10
        assert "times fewer than plain" in printed


@pytest.mark.thorough
def test_an_example_runs_as_it_says():
    path = ROOT / "examples" / "all_reduce.py"
    command = re.search(r"^torchrun (.*)", path.read_text(), re.MULTILINE)
    assert command
    launcher = [sys.executable, "-m", "torch.distributed.run", *command[1].split()]
    done = subprocess.run(launcher, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_result_tables_are_those_of_their_rows():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_docs.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
