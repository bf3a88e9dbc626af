"""The bundled model's texts: training text and held-out text are apart, and read the same everywhere."""

from pathlib import Path

import pytest

from flashcomm.models import text


@pytest.fixture
def small_library(tmp_path: Path) -> Path:
    """A standard library without its test suite, and with one module turned into a package."""
    for name in ("ast", "argparse", "heapq", "_heapq", "turtle"):
        (tmp_path / f"{name}.py").write_text(f"# {name}\n", encoding="utf-8")
    for name in ("zipfile/__init__.py", "zipfile/_path/glob.py", "site-packages/extra.py", "json/decoder.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_bytes(b"")
    return tmp_path


def names(files: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files]


def test_every_held_out_module_is_here():
    files = text.held_out_files()
    stdlib = text.standard_library()
    assert {path.relative_to(stdlib).parts[0].removesuffix(".py") for path in files} == set(text.HELD_OUT)


def test_held_out_and_training_files_share_nothing():
    held_out, training = text.held_out_files(), text.training_files()
    assert held_out
    assert training
    assert not set(held_out) & set(training)


def test_tests_of_held_out_modules_are_not_learnt_from():
    left_out = [
        "test/test_heapq.py",
        "test/test_json/test_dump.py",
        "test/string_tests.py",
        "asyncio/queues.py",
    ]
    left_out += [
        "json/decoder.py",
        "zipfile/_path/glob.py",
        "test/test_zipfile/test_core.py",
        "string/templatelib.py",
    ]
    assert not any(text.is_training_path(Path(path)) for path in left_out)
    learnt = ["ast.py", "test/test_ast.py", "asyncio/events.py", "test/test_bytes.py"]
    assert all(text.is_training_path(Path(path)) for path in learnt)


def test_generated_and_installed_files_are_not_learnt_from():
    paths = ["site-packages/a.py", "dist-packages/a.py", "config-3.11-x86_64-linux-gnu/python-config.py"]
    paths += ["_sysconfigdata__linux_x86_64-linux-gnu.py"]
    assert not any(text.is_training_path(Path(path)) for path in paths)


def test_works_without_the_test_suite(small_library: Path):
    assert names(text.held_out_files(small_library), small_library) == [
        "argparse.py",
        "heapq.py",
        "json/decoder.py",
        "zipfile/__init__.py",
        "zipfile/_path/glob.py",
    ]
    assert names(text.training_files(small_library), small_library) == [
        "ast.py",
        "empty.py",
        "latin.py",
        "turtle.py",
    ]


def test_unreadable_and_empty_files_are_skipped(small_library: Path):
    assert text.read(text.training_files(small_library)) == ["# ast\n", "# turtle\n"]


def test_line_endings_are_normalised(tmp_path: Path):
    (tmp_path / "a.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    assert text.read([tmp_path / "a.py"]) == ["x = 1\ny = 2\n"]


def test_held_out_text_is_large_and_deterministic():
    whole = text.held_out_text()
    assert len(whole.encode()) > 300_000
    assert whole == text.held_out_text()
    assert whole.startswith(text.END_OF_TEXT)
    assert whole.endswith(text.END_OF_TEXT)
    assert whole.count(text.END_OF_TEXT) == len(text.read(text.held_out_files())) + 1
    assert "def heappush" in whole


def test_a_library_without_sources_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(RuntimeError, match=r"no standard library source in .*pass the folder"):
        text.standard_library()
