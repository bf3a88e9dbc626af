"""Time from a prefill to the first token of another process, with the cache of the prompt on the link between them.

Rank 0 computes a prompt once. Then, by turns, its cache goes to rank 1 in each codec: layer by layer, so that one layer
is encoded, another is on the wire and a third is decoded. Rank 1 computes the prompt's last token on what has arrived.
``raw`` sends the tensors as they lie, without header or checksum.

Source: our own; DistServe and Splitwise (arXiv 2401.09670, 2311.18677) are the setting.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashcomm import kv, settings
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
    """Median of the part up to the last decoded layer."""
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
            cache, sizes[spec] = _receive(shapes, spec, dtype)
            arrived = time.monotonic()
            firsts[spec] = _first_token(model, cache, ids[:, -1:])
            if turn >= 0:
                times[spec].append((arrived - start.item(), time.monotonic() - start.item()))
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
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    seconds = time.monotonic() - start
    return seconds, [kv.KV(layer.keys.contiguous(), layer.values.contiguous()) for layer in cache.layers]


def _send(layers: Sequence[kv.KV], spec: str):
    """Send all layers to rank 1; a layer is encoded while those before it travel."""
    pending = []
    for layer in layers:
        if spec == RAW:
            messages = list(layer)
        else:
            data = torch.frombuffer(bytearray(kv.encode(*layer, spec)), dtype=torch.uint8)
            messages = [torch.tensor([data.numel()], dtype=torch.int64, device="cpu"), data]
        pending += [(dist.isend(message, 1), message) for message in messages]
    for work, _ in pending:
        work.wait()


def _receive(shapes: Sequence[Sequence[Sequence[int]]], spec: str, dtype: torch.dtype) -> tuple[list[kv.KV], int]:
    """Receive all layers from rank 0, and decode each while the next one arrives; returns them and their bytes."""
    if spec == RAW:
        layers = [kv.KV(*(torch.empty(*shape, dtype=dtype, device="cpu") for shape in both)) for both in shapes]
        for work in [dist.irecv(x, 0) for layer in layers for x in layer]:
            assert work is not None
            work.wait()
        return layers, sum(x.nbytes for layer in layers for x in layer)
    lengths = torch.empty(len(shapes), 1, dtype=torch.int64, device="cpu")
    layers, total, before = [], 0, None
    for length in lengths:
        dist.recv(length, 0)
        data = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        work = dist.irecv(data, 0)
        total += data.numel()
        if before is not None:
            layers.append(kv.decode(before.numpy().data))
        assert work is not None
        work.wait()
        before = data
    assert before is not None
    return [*layers, kv.decode(before.numpy().data)], total


@torch.inference_mode()
def _first_token(model: Any, layers: Sequence[kv.KV], last: torch.Tensor) -> int:
    from transformers import DynamicCache

    logits = model(last, past_key_values=DynamicCache([tuple(layer) for layer in layers]), use_cache=True).logits
    return int(logits[0, -1].argmax())
