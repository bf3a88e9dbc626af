"""Greedy text from a model, and how fast it comes: every rank's part of `flashcomm generate`."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import flashcomm
from flashcomm.integrations.transformers import compressed
from flashcomm.models.load import load


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompt: str, tokens: int, streamer: Any = None) -> str:
    """Greedy continuation of `prompt`, without it."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    inputs = inputs.to(model.device)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=streamer)[0]
    return tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class _Clock:
    """A transformers streamer that records when tokens arrive and passes them on."""

    def __init__(self, inner: Any):
        self.inner, self.times = inner, []

    def put(self, value: Any):
        self.times.append(time.perf_counter())
        if self.inner is not None:
            self.inner.put(value)

    def end(self):
        if self.inner is not None:
            self.inner.end()


def rank_main(
    directory: Path,
    spec: str,
    algorithm: str,
    prompt: str,
    new_tokens: int,
    dtype: str,
    stream: bool,
    calibration: Path | None = None,
) -> dict:
    """Generate on every rank; rank 0 prints the text as it comes. Returns the figures."""
    model, tokenizer = load(directory, getattr(torch, dtype))
    inner = None
    if stream and dist.get_rank() == 0:
        from transformers import TextStreamer

        inner = TextStreamer(tokenizer, skip_special_tokens=True)
    clock = _Clock(inner)
    flashcomm.reset_stats()
    if dist.get_world_size() > 1:
        algorithm = "plain" if spec == "none" else algorithm
        with compressed(model, spec, algorithm=algorithm, calibration=calibration):
            start = time.perf_counter()
            text = generate(model, tokenizer, prompt, new_tokens, clock)
    else:
        start = time.perf_counter()
        text = generate(model, tokenizer, prompt, new_tokens, clock)
    # The streamer is given the prompt first, then one token at a time.
    arrivals = clock.times[1:]
    between = (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1) if len(arrivals) > 1 else 0.0
    stats = flashcomm.stats()
    return {
        "codec": spec,
        "ranks": dist.get_world_size(),
        "prompt": prompt,
        "text": text,
        "new_tokens": len(arrivals),
        "ttft_ms": 1e3 * (arrivals[0] - start) if arrivals else None,
        "tokens_per_second": 1 / between if between else None,
        "stats": {**stats, "records": [asdict(record) for record in stats["records"]]},
    }
