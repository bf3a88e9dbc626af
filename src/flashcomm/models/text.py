"""The text of the bundled model: standard-library sources that it learns from, and others that it never sees.

The bundled model is trained on the Python standard library's own source and measured on a few of its
modules. Every Python brings those modules, so a measurement needs no download. The split is kept in one
place because the trainer and the measurements must agree on it: a module added to ``HELD_OUT`` after training
would be measured although the model has seen it.

The text differs a little between Python versions; compare figures of one version only.
"""

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashcomm.models.windows import windows

HELD_OUT = (
    "argparse",
    "bisect",
    "calendar",
    "configparser",
    "csv",
    "fractions",
    "gettext",
    "graphlib",
    "heapq",
    "json",
    "plistlib",
    "queue",
    "shlex",
    "statistics",
    "string",
    "tarfile",
    "textwrap",
    "timeit",
    "zipfile",
)
"""Top-level modules and packages that are only measured on. All exist in CPython 3.10 to 3.14, also where a
distribution leaves the test suite out; some are a file in one version and a package in another."""

RELATED = (
    "archiver_tests",
    "queues",
    "string_tests",
    "test_calltip",
    "test_code_module",
    "test_numeric_tower",
    "test_queues",
    "test_string_literals",
    "test_zipfile64",
)
"""Names, besides the held-out modules and their tests, of files that repeat text of a held-out module. Found by listing
the training files that share lines of 40 or more characters with the held-out ones."""

NOT_LIBRARY = ("site-packages", "dist-packages", "__pycache__", "config-", "_sysconfigdata")
"""Folders, and beginnings of file names, that are not part of the library's own source."""

CALIBRATION = 32 * 1024
"""Tokens to calibrate on."""

HELD_OUT_NAME = "the standard library's held-out modules"
"""Name of `held_out_text` in reports."""

END_OF_TEXT = "<|endoftext|>"
"""Placed before every file in the token stream, and after the last one."""


def standard_library() -> Path:
    """Return the folder of the running Python's standard library.

    Raises:
        RuntimeError: this Python has no standard library in source form on disk.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not (folder / "argparse.py").is_file():
        raise RuntimeError(
            f"no standard library source in {folder}: this Python ships it compiled or zipped; "
            "pass the folder of one that has its .py files"
        )
    return folder


def held_out_files(stdlib: Path | None = None) -> list[Path]:
    """Return the files that the model is measured on, sorted by module and path."""
    stdlib = stdlib or standard_library()
    files: list[Path] = []
    for module in HELD_OUT:
        single = stdlib / f"{module}.py"
        files += [single] if single.is_file() else sorted((stdlib / module).rglob("*.py"))
    return files


def training_files(stdlib: Path | None = None) -> list[Path]:
    """Return the files that the model learns from, sorted by path.

    They are all the library's ``.py`` files, the test suite where it is installed included, without the
    held-out modules, without anything named after one (``test_heapq.py``, ``test/test_json/...``) and
    without the files named in ``RELATED``.
    """
    stdlib = stdlib or standard_library()
    return [path for path in sorted(stdlib.rglob("*.py")) if is_training_path(path.relative_to(stdlib))]


def is_training_path(path: Path) -> bool:
    """Tell whether the file at ``path``, relative to the standard library, is one to learn from.

    >>> is_training_path(Path("ast.py")), is_training_path(Path("test/test_json/test_dump.py"))
    (True, False)
    """
    for part in path.parts:
        name = part.removesuffix(".py")
        if name.startswith(NOT_LIBRARY) or name in RELATED:
            return False
        if name.removeprefix("test_").lstrip("_") in HELD_OUT:
            return False
    return True


def read(files: list[Path]) -> list[str]:
    r"""Return the text of each file, in order, without the files that are empty or not UTF-8.

    Line endings come back as ``"\n"`` whatever the file has.
    """
    texts = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            texts.append(text)
    return texts


def held_out_text(stdlib: Path | None = None) -> str:
    """Return the held-out modules as one string, each after an ``END_OF_TEXT``, and one more at the end.

    About 0.7 MB of Python. A tokenizer with ``END_OF_TEXT`` as a special token gives the very stream that
    the model card's perplexity is measured on.
    """
    return END_OF_TEXT + "".join(text + END_OF_TEXT for text in read(held_out_files(stdlib)))


def calibration_text(stdlib: Path | None = None, characters: int = 400_000) -> str:
    """Return about `characters` of the text that the model learned from: whole files, spread over the library."""
    files = training_files(stdlib)
    total = sum(path.stat().st_size for path in files)
    chosen = files[:: max(1, total // characters)]
    return END_OF_TEXT + "".join(text + END_OF_TEXT for text in read(chosen))


def calibration_windows(tokenizer: Any, text: str | None = None, tokens: int = CALIBRATION) -> list[torch.Tensor]:
    """Return windows of token ids to calibrate on, from ``text`` or else from the text that the model learned from."""
    return windows(token_ids(tokenizer, [calibration_text() if text is None else text]), tokens)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Token ids of texts, one after another: [tokens], with the special tokens of each."""
    # A long text is no mistake here.
    found = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    return torch.tensor([i for ids in found for i in ids], dtype=torch.long, device="cpu")
