"""What each rank of the demo does, and the rows that come out."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from flashcomm.bench import model as bench
from flashcomm.bench.progress import progress
from flashcomm.codecs import parse
from flashcomm.demo import text
from flashcomm.integrations.transformers import calibrate, compressed
from flashcomm.overlap import prefill as overlapping


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRow:
    """One codec's figures, as the table and the JSON show them."""

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
    """Of the decoder, by the planner of overlap."""

    def as_dict(self) -> dict:
        """The row as JSON stores it."""
        return asdict(self)


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
) -> tuple[list[DemoRow], int]:
    """Run on every rank: the rows and the number of held-out tokens. Times are those of the slowest rank."""
    model, tokenizer = bench.load(directory, getattr(torch, dtype))
    hidden = model.config.get_text_config().hidden_size
    # Special tokens between files are part of the stream, and a long text is no mistake here.
    ids = torch.tensor(tokenizer(text.held_out_text(), verbose=False)["input_ids"])
    windows = text.windows(ids, eval_tokens)
    calibration = None
    if any(parse(spec).unbound for spec in specs):
        calibration = calibrate(model, text.calibration_windows(tokenizer), origin="the demo")
    # Batch-invariant, so that the short messages of generated text are compressed too, not left plain.
    with compressed(model, "none", batch_invariant=True, calibration=calibration) as handle, _progress() as step:
        total = len(windows) * (len(specs) + 1)
        accuracy = bench.accuracy(model, handle, specs, windows, algorithm, step("accuracy", total))
        with overlapping(model) if overlap else nullcontext() as parts:
            advance = step("time to first token", repeats + 1)
            prefill = bench.prefill(model, handle, specs, windows[0], repeats, algorithm, advance, parts)
        advance = step("text", len(specs))
        rows = []
        for spec in specs:
            bench.switch(handle, spec, algorithm)
            continuation = bench.generate(model, tokenizer, prompt, new_tokens)
            advance()
            first = prefill[spec]
            plain_ms = prefill[specs[0]].times.p50_ms
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
                    **accuracy[spec].as_dict(),
                )
            )
    return rows, sum(len(window) for window in windows)


def _progress():
    """On rank 0 alone."""
    return progress() if dist.get_rank() == 0 else nullcontext(lambda name, total: lambda: None)
