"""One prompt, run again and again: with different codecs, in one piece or in parts that take turns."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import flashcomm
from flashcomm.bench.timing import Times, interleaved
from flashcomm.integrations.transformers import Compression
from flashcomm.models.load import switch
from flashcomm.overlap import Overlap
from flashcomm.planner.overlap import Split


class Prompt:
    """Token ids that a compressed model reads to say the first new one.

    Args:
        model: tensor parallel, compressed by `handle`.
        handle: its compression; the codec is switched before each run.
        ids: token ids, [tokens].
        overlap: the model's, to run the prompt in parts; None where it runs in one piece only.
        algorithm: of the compressed sums.
    """

    def __init__(
        self,
        model: Any,
        handle: Compression,
        ids: torch.Tensor,
        overlap: Overlap | None = None,
        algorithm: str = "auto",
    ):
        self.model, self.handle, self.overlap, self.algorithm = model, handle, overlap, algorithm
        self.ids = ids.to(model.device)

    @torch.inference_mode()
    def first_token(self, spec: str, parts: Any = 1) -> int:
        """Run the prompt with the codec `spec`, in `parts`, and return the first new token."""
        switch(self.handle, spec, self.algorithm)
        if self.overlap:
            self.overlap.parts = parts
        # The host reads the token, so on a GPU the time ends when it is there.
        return int(self.model(self.ids[None], use_cache=True, logits_to_keep=1).logits.argmax(-1).item())


class Prefill(NamedTuple):
    """Time to first token with one codec."""

    times: Times
    """Times of the slowest rank."""
    wire_bytes_per_token: float
    """Bytes that one rank sends."""
    algorithms: str
    """Names of the algorithms that ran, joined by ``+``."""
    overlapped: Times | None = None
    """The same as `times`, with `flashcomm.overlap`."""
    split: Split | None = None
    """The parts into which `flashcomm.overlap` cut the prompt."""


def prefill(prompt: Prompt, specs: Sequence[str], repeats: int, progress: Callable[[], object]) -> dict[str, Prefill]:
    """Measure the time to first token of each codec, all taking turns in one run; also in parts if `prompt` overlaps.

    Args:
        prompt: the same on every rank.
        specs: codecs.
        repeats: timed rounds.
        progress: called after each round, also the one that warms up.
    """
    facts, splits = {}, {}
    for spec in specs:
        flashcomm.reset_stats()
        prompt.first_token(spec)
        stats = flashcomm.stats()
        algorithms = sorted({record.algorithm for record in stats["records"]})
        facts[spec] = (stats["wire_bytes"] / len(prompt.ids), "+".join(algorithms))
        if prompt.overlap:
            prompt.first_token(spec, "auto")  # measures
            prompt.first_token(spec, "auto")
            splits[spec] = prompt.overlap.last_split
    variants: dict[str, Callable[[], object]] = {spec: partial(prompt.first_token, spec) for spec in specs}
    variants |= {f"{spec}, overlapped": partial(prompt.first_token, spec, "auto") for spec in splits}
    times = interleaved(variants, repeats=repeats, warmup=1, before=dist.barrier, after=dist.barrier, progress=progress)
    return {
        spec: Prefill(times[spec], wire, ran, times.get(f"{spec}, overlapped"), splits.get(spec))
        for spec, (wire, ran) in facts.items()
    }
