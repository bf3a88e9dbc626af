"""The model and the text of `flashcomm accuracy` and `flashcomm tune-policy`."""

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import flashcomm
from flashcomm import machine
from flashcomm.calibration import Calibration
from flashcomm.lab.launch import Interrupted
from flashcomm.models.load import load
from flashcomm.models.text import HELD_OUT_NAME, held_out_text, token_ids
from flashcomm.models.windows import windows
from flashcomm.report.progress import Step, progress

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A model, the text that it is measured on, and the ranks that are simulated."""

    directory: Path
    model: str
    """The model's name in reports."""
    texts: Sequence[str] = ()
    """UTF-8 texts, one after another; the standard library's held-out modules if there is none."""
    text: str = HELD_OUT_NAME
    """The texts' name in reports."""
    ranks: int
    stages: int = 1
    """Pipeline stages, each of `ranks` ranks."""
    expert_ranks: int = 1
    """Ranks that share out the experts."""
    hosts: int
    algorithm: str
    tokens: int
    window: int
    dtype: str
    seed: int
    calibration: Path | None
    out: Path
    """Folder of the reports, and of figures from which an interrupted command goes on."""

    def load(self) -> tuple[Any, list[torch.Tensor], str]:
        """Load (model, windows, identity of the model).

        Raises:
            ValueError: less text than two windows.
        """
        model, tokenizer = load(self.directory, getattr(torch, self.dtype))
        if torch.cuda.is_available():
            model = model.to("cuda")
        ids = token_ids(tokenizer, self.texts or [held_out_text()])
        found = windows(ids, self.tokens, self.window)
        if len(found) < 2 or len(found[0]) < self.window:
            raise ValueError(
                f"{min(self.tokens, len(ids)):,} tokens of text: at least two windows of {self.window:,} are needed to "
                "say how certain the figures are. Give more text, or a smaller --window"
            )
        files = sorted(path for path in self.directory.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
        weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        versions = [flashcomm.__version__, torch.__version__, torch.get_num_threads(), str(model.device)]
        return model, found, json.dumps([weights, self.dtype, versions])

    def calibrated(self) -> Calibration | None:
        """Load the calibration that calibrated codecs need, if one is given."""
        return Calibration.load(self.calibration) if self.calibration else None

    def facts(self, tokens: int, seconds: float) -> dict:
        """The origin of figures, for reports."""
        return {
            "model": self.model,
            "ranks": self.ranks,
            **({"stages": self.stages} if self.stages > 1 else {}),
            **({"expert_ranks": self.expert_ranks} if self.expert_ranks > 1 else {}),
            "hosts": self.hosts,
            "algorithm": self.algorithm,
            "dtype": self.dtype,
            "text": self.text,
            "tokens": tokens,
            "window": self.window,
            "seed": self.seed,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time(), 1),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "machine": machine.describe(),
        }

    def keep(self, run: Callable[[Step], T]) -> T:
        """Call ``run(step)`` with the folder made and progress shown.

        Raises:
            Interrupted: Ctrl-C; figures found so far stay in the folder.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            with progress() as step:
                return run(step)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; the same command goes on from what is in {self.out}") from None
