"""Time to first token of one model: plain, compressed, overlapped, and both, against the bound of link and cores.

No prompt can be faster than its compute or its communication, whichever takes longer, and nothing overlaps with the
segments before the first sum and after the last one. Both are measured in the same rounds, by a prompt in one piece
whose sums are timed. Compute counts on the slowest rank, a sum on the fastest, because early ranks only wait in it.

Source: our own; ISO (arXiv 2409.11155) reports times to first token too.
"""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import flashcomm
from flashcomm import settings
from flashcomm.bench.collectives import slowest
from flashcomm.bench.prompt import Prompt
from flashcomm.bench.timing import interleaved
from flashcomm.integrations.transformers import Compression, compress
from flashcomm.lab.hosts import RATE_VARIABLE
from flashcomm.models.load import load_model
from flashcomm.overlap import Overlap, wrap
from flashcomm.parts import turns
from flashcomm.parts.measuring import PartTimes, Stopwatch


@dataclass(frozen=True, slots=True, kw_only=True)
class TtftRow:
    """One way to run one prompt."""

    op: str = "ttft"
    model: str
    backend: str
    dtype: str
    link: str
    """The link between hosts: the rate of a lab's links, or ``local``."""
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
    """Percentile of the slowest rank's time."""
    speedup: float
    """Plain's median over this one."""
    predicted_ms: float | None
    """The planner's prediction, for the decoder alone."""
    compute_ms: float
    """Time of the prompt without its sums."""
    communication_ms: float
    """Time of the sums alone."""
    bound_ms: float
    """Lower bound of every overlap: the larger of the two, plus the segments that cannot overlap."""
    bound_share: float
    """The bound over the median: 1.0 is perfect overlap."""
    same_token: bool
    """Whether the first token is that of the same codec without overlap."""


class Span(NamedTuple):
    """A stretch of time that one rank spent computing or sending."""

    rank: int
    lane: str
    """``core`` or ``link``."""
    part: int
    start_s: float
    end_s: float


def rank_main(
    directory: Path, name: str, specs: Sequence[str], lengths: Sequence[int], repeats: int, dtype: torch.dtype
) -> tuple[list[TtftRow], dict[str, list[Span]]]:
    """Run on every rank: the rows, and all ranks' timelines of one plain and some overlapped prompts."""
    model = load_model(directory, dtype)
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


class _Runs(Prompt):
    """A prompt of `tokens` random ids, run in different ways."""

    overlap: Overlap

    def __init__(self, model: Any, handle: Compression, overlap: Overlap, tokens: int):
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(
            vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens), dtype=torch.long, device="cpu"
        )
        super().__init__(model, handle, ids, overlap)

    def timed(self, spec: str) -> PartTimes:
        """Run the prompt in one piece, its sums and what lies between them timed."""
        watch = Stopwatch(self.ids.device)
        self.handle.wait = watch.wait
        try:
            self.first_token(spec, 1)
        finally:
            self.handle.wait = None
        return watch.part()

    def rows(self, name: str, specs: Sequence[str], repeats: int) -> list[TtftRow]:
        """Measure every codec with and without overlap, all taking turns."""
        tokens: dict[tuple[str, bool], int] = {}
        splits: dict[str, tuple[str, float | None]] = {}
        self.overlap.profiles.clear()
        for spec in specs:
            tokens[spec, False] = self.first_token(spec, 1)
            self.first_token(spec, "auto")  # measures
            flashcomm.reset_stats()
            tokens[spec, True] = self.first_token(spec, "auto")
            split = self.overlap.last_split
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
                sizes, predicted_s = splits[spec] if overlapped else (str(len(self.ids)), None)
                rows.append(
                    TtftRow(
                        model=name,
                        backend=dist.get_backend(),
                        dtype=str(self.model.dtype).removeprefix("torch."),
                        link=settings.text(RATE_VARIABLE) or "local",
                        repeats=repeats,
                        ranks=dist.get_world_size(),
                        tokens=len(self.ids),
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
        """Record every rank's timeline of one prompt, in seconds since the first rank began."""
        dist.barrier()
        watch = _Watch(dist.get_rank())
        usual, self.overlap.wait = self.overlap.wait, watch.wait
        self.handle.wait = watch.wait if parts == 1 else None
        try:
            self.first_token(spec, parts)
        finally:
            self.overlap.wait, self.handle.wait = usual, None
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, list(map(tuple, watch.spans())))
        spans = [Span(*span) for rank in everyone for span in rank]
        first = min(span.start_s for span in spans)
        return [span._replace(start_s=span.start_s - first, end_s=span.end_s - first) for span in spans]


class _Watch:
    """Record when this rank computes and when its sums are under way, on a CPU; takes the place of `turns.wait`."""

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
        """End the recording, once the prompt is done, and return all spans."""
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
                # One after the other: they share the link.
                self._link.append(Span(self._rank, "link", part, max(start, free), now))
                seen, free = seen + 1, now
            else:
                time.sleep(self._POLL_S)


def _shared(ranks: Sequence[PartTimes]) -> tuple[float, float, float]:
    """(compute, communication, segments that cannot overlap) of a prompt in one piece, in seconds."""
    compute_s = max(sum(rank.segments) for rank in ranks)
    communication_s = sum(map(min, zip(*(rank.sums for rank in ranks), strict=True)))
    return compute_s, communication_s, max(rank.segments[0] + rank.segments[-1] for rank in ranks)
