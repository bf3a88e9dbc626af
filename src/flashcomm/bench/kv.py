"""Time from a prefill to the first token of another process, with the cache of the prompt on the link between them.

Rank 0 computes a prompt once. Then, by turns, its cache goes to rank 1 in each codec: layer by layer, so that one layer
is encoded, another is on the wire and a third is decoded. Rank 1 computes the prompt's last token meanwhile: a layer of
the model waits for its own part of the cache, not for all of it. ``raw`` sends the tensors as they lie, without header
or checksum.

Source: our own; DistServe and Splitwise (arXiv 2401.09670, 2311.18677) are the setting.
"""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashcomm import kv, settings
from flashcomm.integrations.loaded import cache_name
from flashcomm.lab.hosts import RATE_VARIABLE
from flashcomm.models.load import load_model

RAW = "raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRow:
    """One codec of the cache of one prompt."""

    op: str = "kv"
    model: str
    dtype: str
    link: str
    """The link between hosts: the rate of a lab's links, or ``local``."""
    repeats: int
    tokens: int
    """Tokens of the cache."""
    codec: str
    bits_per_value: float
    """Bits on the wire per value, headers included."""
    wire_bytes: int
    p50_ms: float
    p20_ms: float
    p80_ms: float
    """Percentile of the time from the end of the prefill to the first token of the other process."""
    speedup: float
    """Raw's median over this one."""
    transfer_ms: float
    """Median of the part up to the last decoded layer, while the layers before it compute."""
    transfer_speedup: float
    prefill_ms: float
    """Time of the prefill before; computed once."""
    same_token: bool
    """Whether the first token is raw's."""


def rank_main(
    directory: Path, name: str, specs: Sequence[str], tokens: int, repeats: int, dtype: torch.dtype
) -> list[KvRow]:
    """Measure on one of two ranks of a gloo group.

    Args:
        directory: a model directory of transformers, whose layers all have full attention.
        name: the model's name in rows.
        specs: codecs of `flashcomm.kv`; `RAW` is measured too, as the first.
        tokens: of the cache; the prompt, of random tokens, has one more.
        repeats: timed rounds, after one that is not.
        dtype: of weights and cache.

    Returns:
        A row for each codec on rank 1, which has the times; nothing on rank 0.
    """
    rank, model = dist.get_rank(), load_model(directory, dtype, split=False)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(
        model.config.get_text_config().vocab_size, (1, tokens + 1), generator=drawn, dtype=torch.int64, device="cpu"
    )
    prefill_s, layers = _prefill(model, ids[:, :-1]) if rank == 0 else (0.0, [])
    shared: list[Any] = [prefill_s, [tuple(x.shape for x in layer) for layer in layers]]
    dist.broadcast_object_list(shared, src=0)
    prefill_s, shapes = shared
    times: dict[str, list[tuple[float, float]]] = {spec: [] for spec in (RAW, *specs)}
    sizes, firsts = {}, {}
    for turn in range(-1, repeats):
        for spec in list(times) if turn % 2 else reversed(times):
            dist.barrier()
            # All processes of a machine read the same clock, and hosts of a lab are one machine.
            start = torch.tensor([time.monotonic()], dtype=torch.float64, device="cpu")
            dist.broadcast(start, src=0)
            if rank == 0:
                _send(layers, spec)
                continue
            layers_there = _Arrivals(shapes, spec, dtype)
            firsts[spec] = _first_token(model, layers_there, ids[:, -1:])
            sizes[spec] = layers_there.wire_bytes
            if turn >= 0:
                times[spec].append((layers_there.last_s - start.item(), time.monotonic() - start.item()))
    if rank == 0:
        return []
    median = {spec: [statistics.median(part) for part in zip(*pairs, strict=True)] for spec, pairs in times.items()}
    rows = []
    for spec, pairs in times.items():
        whole = sorted(end for _, end in pairs)
        rows.append(
            KvRow(
                model=name,
                dtype=str(dtype).removeprefix("torch."),
                link=settings.text(RATE_VARIABLE) or "local",
                repeats=repeats,
                tokens=tokens,
                codec=spec,
                bits_per_value=8 * dtype.itemsize * sizes[spec] / sizes[RAW],
                wire_bytes=sizes[spec],
                p50_ms=1e3 * median[spec][1],
                p20_ms=1e3 * whole[len(whole) // 5],
                p80_ms=1e3 * whole[len(whole) * 4 // 5],
                speedup=median[RAW][1] / median[spec][1],
                transfer_ms=1e3 * median[spec][0],
                transfer_speedup=median[RAW][0] / median[spec][0],
                prefill_ms=1e3 * prefill_s,
                same_token=firsts[spec] == firsts[RAW],
            )
        )
    return rows


@torch.inference_mode()
def _prefill(model: Any, ids: torch.Tensor) -> tuple[float, list[kv.KV]]:
    start = time.monotonic()
    cache = getattr(model(ids, use_cache=True, logits_to_keep=1), cache_name(model.forward))
    seconds = time.monotonic() - start
    return seconds, [kv.KV(layer.keys.contiguous(), layer.values.contiguous()) for layer in cache.layers]


def _send(layers: Sequence[kv.KV], spec: str):
    """Send all layers to rank 1; a layer is encoded while those before it travel."""
    pending = []

    def send(x: torch.Tensor):
        pending.append((dist.isend(x, 1), x))

    if spec == RAW:
        for layer in layers:
            for x in layer:
                send(x)
    else:
        # The length of a layer comes before the layer in front of it; see `_Arrivals`.
        before = None
        for layer in layers:
            data = torch.frombuffer(bytearray(kv.encode(*layer, spec)), dtype=torch.uint8)
            send(torch.tensor([data.numel()], dtype=torch.int64, device="cpu"))
            if before is not None:
                send(before)
            before = data
        assert before is not None
        send(before)
    for work, _ in pending:
        work.wait()


class _Arrivals:
    """The layers of a cache on their way from rank 0, in order.

    gloo receives only what has a known length. So a layer's length comes before the layer in front of it, and while one
    is on the wire the next one is expected already.

    Args:
        shapes: of each layer's keys and values.
        spec: codec, or `RAW`.
        dtype: of keys and values.
    """

    def __init__(self, shapes: Sequence[Sequence[Sequence[int]]], spec: str, dtype: torch.dtype):
        self.tokens, self.left, self.wire_bytes, self.last_s = shapes[0][0][-2], len(shapes), 0, 0.0
        self._raw, self._coming = spec == RAW, deque()
        if self._raw:
            layers = [[torch.empty(*shape, dtype=dtype, device="cpu") for shape in both] for both in shapes]
            self._coming.extend([_expect(x) for x in layer] for layer in layers)
        else:
            self._unasked, self._length = len(shapes), _expect(torch.empty(1, dtype=torch.int64, device="cpu"))
            self._ask()
            self._ask()

    def _ask(self):
        """Expect one layer more, whose length is on its way."""
        if self._unasked:
            self._unasked -= 1
            length, work = self._length
            work.wait()
            if self._unasked:
                self._length = _expect(torch.empty(1, dtype=torch.int64, device="cpu"))
            self._coming.append([_expect(torch.empty(int(length), dtype=torch.uint8, device="cpu"))])

    def next_layer(self) -> kv.KV:
        """Block until the next layer is there, decoded."""
        parts = self._coming.popleft()
        for x, work in parts:
            work.wait()
            self.wire_bytes += x.nbytes
        if self._raw:
            layer = kv.KV(*(x for x, _ in parts))
        else:
            self._ask()
            layer = kv.decode(parts[0][0].numpy().data)
        self.left, self.last_s = self.left - 1, time.monotonic()
        return layer


def _expect(x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    return x, dist.irecv(x, 0)


@torch.inference_mode()
def _first_token(model: Any, layers: _Arrivals, last: torch.Tensor) -> int:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Arriving(DynamicLayer):
        """A layer of the cache that the model waits for when it first needs it."""

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
            super().lazy_initialization(key_states, value_states)
            self.keys, self.values = layers.next_layer()

        def get_seq_length(self) -> int:
            return super().get_seq_length() if self.is_initialized else layers.tokens

    cache = DynamicCache()
    cache.layers[:] = [Arriving() for _ in range(layers.left)]
    logits = model(last, **{cache_name(model.forward): cache}, use_cache=True).logits
    return int(logits[0, -1].argmax())
