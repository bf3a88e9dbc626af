"""Measure every codec for the demo, on each rank, and make its rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashcomm.accuracy.on_ranks import accuracy
from flashcomm.bench.prompt import Prompt, prefill
from flashcomm.codecs import parse
from flashcomm.integrations.transformers import calibrate, compressed
from flashcomm.models import text
from flashcomm.models.generate import generate
from flashcomm.models.load import load, switch
from flashcomm.models.windows import WINDOW, rest, windows
from flashcomm.overlap import prefill as overlapping
from flashcomm.report.progress import progress


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRow:
    """One codec's figures."""

    codec: str
    algorithm: str
    bits_per_value: float
    wire_bytes_per_token: float
    """Bytes that one rank sends per prompt token during prefill."""
    ttft_ms: float
    ttft_vs_plain: float
    perplexity: float
    perplexity_change: float
    kl: float
    top1: float
    ranks_identical: bool
    text: str
    """Greedy continuation of the prompt."""
    parts: str | None = None
    """Tokens of each part of the prompt, if it was overlapped."""
    overlapped_ms: float | None = None
    """Time to first token with overlap."""
    overlapped_vs_plain: float | None = None
    predicted_ms: float | None = None
    """Predicted time to first token with overlap, for the decoder alone."""


def rank_main(
    directory: Path,
    specs: Sequence[str],
    algorithm: str,
    prompt: str,
    eval_tokens: int,
    new_tokens: int,
    repeats: int,
    dtype: str,
    overlap: bool = False,
    sources: Sequence[str] = (),
) -> tuple[list[DemoRow], int]:
    """Run on every rank and return the rows and the number of held-out tokens. Times are the slowest rank's.

    Raises:
        ValueError: `sources`, texts one after another, that are too short to measure on, or to calibrate on what is
            not measured.
    """
    model, tokenizer = load(directory, getattr(torch, dtype))
    hidden = model.config.get_text_config().hidden_size
    ids = text.token_ids(tokenizer, sources or [text.held_out_text()])
    if len(ids) < WINDOW:
        raise ValueError(f"--text has {len(ids):,} tokens: give {WINDOW:,} or more")
    held_out = windows(ids, eval_tokens)
    calibration = None
    if any(parse(spec).unbound for spec in specs):
        batches = _calibration_windows(tokenizer, ids, eval_tokens, bool(sources))
        with _progress() as step:
            calibration = calibrate(
                model, _told(batches, step("features to calibrate on", len(batches))), origin="the demo"
            )
    # Batch-invariant, so that the short messages of generated text are compressed too, not left plain.
    with compressed(model, "none", batch_invariant=True, calibration=calibration) as handle, _progress() as step:
        total = len(held_out) * (len(specs) + 1)
        judged = accuracy(model, handle, specs, held_out, algorithm, step("accuracy", total))
        with overlapping(model) if overlap else nullcontext() as overlapped:
            advance = step("time to first token", repeats + 1)
            read = Prompt(model, handle, held_out[0], overlapped, algorithm)
            times = prefill(read, specs, repeats, advance)
        advance = step("text", len(specs))
        rows = []
        for spec in specs:
            switch(handle, spec, algorithm)
            continuation = generate(model, tokenizer, prompt, new_tokens)
            advance()
            first = times[spec]
            plain_ms = times[specs[0]].times.p50_ms
            more = {}
            if first.overlapped and first.split:
                more = {
                    "parts": "+".join(map(str, first.split.sizes)),
                    "overlapped_ms": first.overlapped.p50_ms,
                    "overlapped_vs_plain": plain_ms / first.overlapped.p50_ms,
                    "predicted_ms": 1e3 * first.split.seconds if first.split.seconds else None,
                }
            rows.append(
                DemoRow(
                    codec=spec,
                    algorithm=first.algorithms,
                    bits_per_value=parse(spec).bits_per_value(hidden, model.dtype),
                    wire_bytes_per_token=first.wire_bytes_per_token,
                    ttft_ms=first.times.p50_ms,
                    ttft_vs_plain=plain_ms / first.times.p50_ms,
                    text=continuation,
                    **more,
                    **asdict(judged[spec]),
                )
            )
    return rows, sum(len(window) for window in held_out)


def _calibration_windows(tokenizer: Any, ids: torch.Tensor, eval_tokens: int, given: bool) -> list[torch.Tensor]:
    """Windows to calibrate on: of what a given text has left; else of what the bundled model learned from."""
    if not given:
        return text.calibration_windows(tokenizer)
    left = rest(ids, eval_tokens)
    if len(left) < WINDOW:
        raise ValueError(
            f"--text has {len(left):,} tokens besides those to measure on: formats that need a calibration get it from "
            "the others. Give a longer text, fewer --tokens, or --codecs without them"
        )
    return windows(left, text.CALIBRATION)


def _told(batches: list[torch.Tensor], advance: Callable[[], None]) -> Iterator[torch.Tensor]:
    """Yield the batches, and advance after each."""
    for batch in batches:
        yield batch
        advance()


def _progress():
    """Progress on rank 0; the other ranks show nothing."""
    return progress() if dist.get_rank() == 0 else nullcontext(lambda name, total: lambda: None)
