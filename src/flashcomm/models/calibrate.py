"""Calibrate a model on text: every rank's part of `flashcomm calibrate`."""

from pathlib import Path

import torch
import torch.distributed as dist

from flashcomm.integrations.transformers import calibrate
from flashcomm.models import text
from flashcomm.models.load import load


def rank_main(directory: Path, out: Path, source: str | None, source_name: str | None, tokens: int, dtype: str) -> dict:
    """Calibrate on every rank; rank 0 writes the file. Returns the figures."""
    model, tokenizer = load(directory, getattr(torch, dtype))
    windows = text.calibration_windows(tokenizer, source, tokens)
    origin = f"{directory.name}, {source_name or 'Python source'}"
    calibration = calibrate(model, windows, origin=origin)
    if dist.get_rank() == 0:
        calibration.save(out)
    return {"modules": len(calibration.features), "tokens": sum(len(window) for window in windows)}
