"""The wheels and the source distribution of this repository: sizes, contents, and the errors of a bare install."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "packages" / "demo-model"
LARGEST_WHEEL = 1_000_000


def build(kind: str, source: Path, out: Path) -> Path:
    """Build the `kind` of distribution of the folder `source`, and return its file."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling builds distributions: pip install 'flashcomm[dev]'")
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """A folder with nothing of this repository but the wheel."""
    folder = tmp_path_factory.mktemp("bare")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(*arguments: str, path: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=path, env=environment, capture_output=True, text=True, timeout=120
    )


def tracked() -> set[str]:
    """Every file of the repository, as git knows it; none where this is no clone, as in a source distribution."""
    if not (ROOT / ".git").exists():
        return set()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def test_the_wheel_is_small_and_whole(wheel):
    assert wheel.stat().st_size < LARGEST_WHEEL
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    files = {path.relative_to(source).as_posix() for path in (source / "flashcomm").rglob("*") if path.is_file()}
    assert names == {name for name in files if "__pycache__" not in name}


def test_without_the_model_the_demo_says_what_to_install(bare):
    done = run("-m", "flashcomm.cli", "demo", path=bare)
    assert done.returncode == 2
    assert "the demo model is not installed: pip install 'flashcomm" in done.stderr
    assert "or give a model directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
def test_the_model_is_found_where_it_is_installed(wheel, tmp_path):
    made = build("wheel", MODEL, tmp_path / "wheel")
    installed = tmp_path / "installed"
    for archive in (made, wheel):
        zipfile.ZipFile(archive).extractall(installed)
    done = run("-c", "from flashcomm.demo import MODEL; print(MODEL)", path=installed)
    assert Path(done.stdout.strip()) == installed / "flashcomm_demo_model", done.stderr
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (installed / "flashcomm_demo_model" / name).read_bytes() == (
            MODEL / "flashcomm_demo_model" / name
        ).read_bytes()


def test_the_source_distribution_builds_itself_and_has_all_that_tests_need(wheel, tmp_path):
    made = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(made) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.glob("flashcomm-*")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {".ci/run", "Makefile", "CONTRIBUTING.md", "constraints.txt", "tests/recorded.json"} <= names
    again = build("wheel", folder, tmp_path / "wheel")
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()
    missing = tracked() - names
    assert not missing
