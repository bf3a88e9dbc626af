"""Time to first token of one model: plain, compressed, overlapped, and both, against what the link and the cores allow.

No prompt can be faster than its compute or its communication, whichever takes longer, and nothing overlaps with the
segments before the first sum and after the last one. Both are measured in the same rounds, by a prompt in one piece
whose sums are timed: of compute the slowest rank's, of a sum the shortest, because who is early only waits.

Models without weights are made here, with random ones: times do not depend on their values.

Source: our own; what ISO (arXiv 2409.11155) reports are times to first token too.
"""

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import flashcomm
from flashcomm.bench import model as bench
from flashcomm.bench.collectives import slowest
from flashcomm.bench.lab import RATE_VARIABLE
from flashcomm.bench.timing import interleaved
from flashcomm.integrations.transformers import Compression, compress
from flashcomm.overlap import Overlap, turns, wrap
from flashcomm.overlap.measuring import PartTimes, Stopwatch

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-160m": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12, intermediate_size=3072,
        vocab_size=32000, max_position_embeddings=4096,
    ),
    "llama-1b": dict(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192,
        vocab_size=128256, max_position_embeddings=4096, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""Shapes of Llamas that can be made without a download."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TtftRow:
    """One way to run one prompt."""

    op: str = "ttft"
    model: str
    backend: str
    dtype: str
    link: str
    """What is between hosts: the rate of a lab's links, or ``local``."""
    repeats: int
    ranks: int
    tokens: int
    codec: str
    overlap: bool
    parts: str
    """Tokens of each part that ran at once, 1,024 or 480+544."""
    p50_ms: float
    p20_ms: float
    p80_ms: float
    """Of the slowest rank."""
    speedup: float
    """Plain's median over this one."""
    predicted_ms: float | None
    """By the planner, for the decoder alone."""
    compute_ms: float
    """Without sums."""
    communication_ms: float
    """Of the sums alone."""
    bound_ms: float
    """What no overlap beats: the larger of the two, and what cannot overlap."""
    bound_share: float
    """The bound over the median: 1.0 is perfect overlap."""
    same_token: bool
    """Whether the first token is that of the same codec without overlap."""

    def as_dict(self) -> dict:
        """The row as JSON stores it."""
        return asdict(self)


class Span(NamedTuple):
    """What a rank did from when to when."""

    rank: int
    lane: str
    """``core`` or ``link``."""
    part: int
    start_s: float
    end_s: float


@contextmanager
def random_model(config: str, dtype: torch.dtype) -> Iterator[Path]:
    """A folder with a model of one of `CONFIGS`, for as long as the ``with`` block lasts."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="flashcomm-model-") as folder:
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIGS[config]))
        finally:
            torch.set_default_dtype(default)
        made.save_pretrained(folder)
        del made
        yield Path(folder)


def rank_main(
    directory: Path, name: str, specs: Sequence[str], lengths: Sequence[int], repeats: int, dtype: torch.dtype
) -> tuple[list[TtftRow], dict[str, list[Span]]]:
    """Run on every rank: the rows, and what all ranks did in one plain and some overlapped prompts."""
    model = bench.load_model(directory, dtype)
    rows, timelines = [], {}
    handle = compress(model, "none")
    overlap = wrap(model)
    for tokens in lengths:
        run = _Runs(model, handle, overlap, tokens)
        rows += run.rows(name, specs, repeats)
        if not timelines:
            timelines["none, in one piece"] = run.timeline("none", 1)
            timelines |= {f"{spec}, overlapped": run.timeline(spec, "auto") for spec in specs}
    return rows, timelines


class _Runs:
    """Prompts of one length, run in different ways."""

    def __init__(self, model: Any, handle: Compression, overlap: Overlap, tokens: int):
        self._model, self._handle, self._overlap, self._tokens = model, handle, overlap, tokens
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        self._ids = ids.to(model.device)

    @torch.inference_mode()
    def first_token(self, spec: str, parts: Any) -> int:
        """Run the prompt; the host reads the token, so on a GPU the time ends when it is there."""
        bench.switch(self._handle, spec, "auto")
        self._overlap.parts = parts
        return int(self._model(self._ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).item())

    def timed(self, spec: str) -> PartTimes:
        """Run the prompt in one piece, its sums and what lies between them timed."""
        watch = Stopwatch(self._ids.device)
        self._handle.wait = watch.wait
        try:
            self.first_token(spec, 1)
        finally:
            self._handle.wait = None
        return watch.part()

    def rows(self, name: str, specs: Sequence[str], repeats: int) -> list[TtftRow]:
        """Measure every codec with and without overlap, all taking turns."""
        tokens: dict[tuple[str, bool], int] = {}
        splits: dict[str, tuple[str, float | None]] = {}
        self._overlap.profiles.clear()
        for spec in specs:
            tokens[spec, False] = self.first_token(spec, 1)
            self.first_token(spec, "auto")  # measures
            flashcomm.reset_stats()
            tokens[spec, True] = self.first_token(spec, "auto")
            split = self._overlap.last_split
            assert split is not None
            splits[spec] = "+".join(map(str, split.sizes)), split.seconds
        laps: dict[str, list[PartTimes]] = {spec: [] for spec in specs}
        variants = {
            f"{spec} {n}": partial(self.first_token, spec, p) for spec in specs for n, p in enumerate((1, "auto"))
        }
        variants |= {f"{spec} timed": lambda spec=spec: laps[spec].append(self.timed(spec)) for spec in specs}
        times = interleaved(
            variants, repeats=repeats, warmup=1, before=dist.barrier, after=dist.barrier, combine=slowest
        )
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, {spec: list(map(tuple, laps[spec])) for spec in specs})
        parts = {
            spec: [_shared([PartTimes(*rank[spec][n]) for rank in everyone]) for n in range(repeats + 1)]
            for spec in specs
        }
        compute_s = statistics.median(c for spec in specs for c, _, _ in parts[spec][1:])
        ends_s = statistics.median(e for spec in specs for _, _, e in parts[spec][1:])
        rows = []
        for spec in specs:
            communication_s = statistics.median(m for _, m, _ in parts[spec][1:])
            bound_s = max(compute_s - ends_s, communication_s) + ends_s
            for overlapped in (False, True):
                measured = times[f"{spec} {int(overlapped)}"]
                sizes, predicted_s = splits[spec] if overlapped else (str(self._tokens), None)
                rows.append(
                    TtftRow(
                        model=name,
                        backend=dist.get_backend(),
                        dtype=str(self._model.dtype).removeprefix("torch."),
                        link=os.environ.get(RATE_VARIABLE) or "local",
                        repeats=repeats,
                        ranks=dist.get_world_size(),
                        tokens=self._tokens,
                        codec=spec,
                        overlap=overlapped,
                        parts=sizes,
                        p50_ms=measured.p50_ms,
                        p20_ms=measured.p20_ms,
                        p80_ms=measured.p80_ms,
                        speedup=times[f"{specs[0]} 0"].p50_ms / measured.p50_ms,
                        predicted_ms=1e3 * predicted_s if predicted_s is not None else None,
                        compute_ms=1e3 * compute_s,
                        communication_ms=1e3 * communication_s,
                        bound_ms=1e3 * bound_s,
                        bound_share=1e3 * bound_s / measured.p50_ms,
                        same_token=tokens[spec, overlapped] == tokens[spec, False],
                    )
                )
        return rows

    def timeline(self, spec: str, parts: Any) -> list[Span]:
        """What every rank did in one prompt, seconds counted from when the first of them began."""
        dist.barrier()
        watch = _Watch(dist.get_rank())
        usual, self._overlap.wait = self._overlap.wait, watch.wait
        self._handle.wait = watch.wait if parts == 1 else None
        try:
            self.first_token(spec, parts)
        finally:
            self._overlap.wait, self._handle.wait = usual, None
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, list(map(tuple, watch.spans())))
        spans = [Span(*span) for rank in everyone for span in rank]
        first = min(span.start_s for span in spans)
        return [span._replace(start_s=span.start_s - first, end_s=span.end_s - first) for span in spans]


class _Watch:
    """Notes when this rank computes and when its sums are under way, on a CPU; in place of `turns.wait`."""

    _POLL_S = 2e-4

    def __init__(self, rank: int):
        self._rank, self._core, self._link = rank, [], []
        self._works: list[tuple[int, float, Any]] = []
        self._resumed = time.perf_counter()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._see_arrivals)
        self._watcher.start()

    def wait(self, start: Callable[[], Any], name: str) -> torch.Tensor:
        part, now = turns.part() or 0, time.perf_counter()
        self._core.append(Span(self._rank, "core", part, self._resumed, now))
        work = start()
        self._works.append((part, now, work))
        self._resumed = time.perf_counter()
        result = turns.wait(work)
        self._resumed = time.perf_counter()
        return result

    def spans(self) -> list[Span]:
        """All, once the prompt is done."""
        end = time.perf_counter()
        self._done.set()
        self._watcher.join()
        return [*self._core, Span(self._rank, "core", turns.part() or 0, self._resumed, end), *self._link]

    def _see_arrivals(self):
        seen, free = 0, 0.0
        while not self._done.is_set() or seen < len(self._works):
            if seen < len(self._works) and self._works[seen][2].is_completed():
                part, start, _ = self._works[seen]
                now = time.perf_counter()
                # One after the other, as they share the link.
                self._link.append(Span(self._rank, "link", part, max(start, free), now))
                seen, free = seen + 1, now
            else:
                time.sleep(self._POLL_S)


def _shared(ranks: Sequence[PartTimes]) -> tuple[float, float, float]:
    """(compute, communication, what cannot overlap) of a prompt in one piece, in seconds, from each rank's times."""
    compute_s = max(sum(rank.segments) for rank in ranks)
    communication_s = sum(map(min, zip(*(rank.sums for rank in ranks), strict=True)))
    return compute_s, communication_s, max(rank.segments[0] + rank.segments[-1] for rank in ranks)
